"""Rows, edges, circuits and soft protection: what holds still, bit for bit, and how much of it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lessons import CONFIGS, CPU, RANKING, SGD, learn, make_lesson, one_batch
from permafrost.models.channels import trace_channels
from permafrost.ranking.ablation import silenced
from permafrost.ranking.features import feature_layers
from permafrost.strategies import (
    Circuit,
    CircuitLwf,
    Edges,
    Finetune,
    Learner,
    Lwf,
    PackNet,
    Phase,
    Progress,
    Rnf,
    Rows,
    Soft,
    rnf,
)
from permafrost.strategies.circuit import CIRCUIT
from permafrost.strategies.lwf import teacher_memory
from permafrost.strategies.rescaling import rescale, weight_norms
from permafrost.strategies.sized import weight_scores
from permafrost.strategies.soft import held_parts
from permafrost.training import part_of

SHARES = ("uniform", "explained", "magnitude", "depth")


def convolutions(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}


def sizes(memory, task):
    chosen = part_of(memory, f"{CIRCUIT}{task}/channels/")
    return {name: int(mask.sum()) for name, mask in chosen.items()}


def answers(strategy, network, task, head, memory, images):
    network = strategy.network_for(network, task, memory).eval()
    with torch.no_grad():
        return network.view(head, task, 3)(images)


def randomise_outside(network, memory):
    """Change all that no circuit holds: other weights, norms, biases and heads."""
    generator = torch.Generator().manual_seed(9)
    channels = trace_channels(network.features, "features.")
    layers = convolutions(network)
    held = {f"{name}.weight": torch.zeros_like(m.weight).bool() for name, m in layers.items()}
    for task in {name.split("/")[1] for name in memory if name.startswith(CIRCUIT)}:
        chosen = part_of(memory, f"{CIRCUIT}{task}/channels/")
        for name, group in channels.gives.items():
            read = channels.reads[name]
            inputs = torch.ones(3).bool() if read is None else chosen[read]
            held[f"{name}.weight"] |= (chosen[group][:, None] & inputs)[:, :, None, None]
    state = network.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator) + 0.1
            state[name] = torch.where(held.get(name, torch.zeros(()).bool()), value, noise)
    network.load_state_dict(state)


@pytest.mark.parametrize("optimizer", list(CONFIGS))
@pytest.mark.parametrize("head", ["shared", "multi", "expanding"])
@pytest.mark.parametrize("lwf", [False, True], ids=["alone", "with lwf"])
def test_a_circuit_answers_the_same_bits_for_good(
    make_network, make_sequence, head, optimizer, lwf
):
    """After three tasks, also when all that is not frozen is randomised."""
    network, sequence = make_network(tasks=4), make_sequence(tasks=4)
    strategy = circuit = Circuit(head, 0.3, relearn=1, ranking=RANKING)
    if lwf:
        strategy = CircuitLwf(head, circuit, Lwf(head, 0.7, 2.0))
    images = torch.rand(5, 3, 32, 32)
    seen = {}
    memory = teacher_memory(make_lesson(network, sequence, 0, head)) if lwf else {}

    def note(progress):
        for task in (0, 1):
            if f"{CIRCUIT}{task}/own/features.1.weight" in progress.memory and task not in seen:
                kept = progress.memory
                seen[task] = answers(strategy, copy.deepcopy(network), task, head, kept, images)

    config = CONFIGS[optimizer]
    memory = learn(strategy, network, sequence, config, memory, on_epoch=note).memory
    assert seen.keys() == {0, 1}
    before = copy.deepcopy(network)
    randomise_outside(network, memory)
    for task in (0, 1):
        for state in (before, network):
            assert torch.equal(answers(strategy, state, task, head, memory, images), seen[task])
    own = before.view(head, 0, 3)
    with torch.no_grad():  # the negative control: the whole network does not
        assert not torch.equal(own.eval()(images), seen[0])


def test_a_moved_weight_of_a_circuit_is_seen(make_network, make_sequence):
    """What the bits are compared by can fail."""
    network, sequence = make_network(tasks=2), make_sequence(tasks=2)
    strategy = Circuit("multi", 0.3, relearn=1, ranking=RANKING)
    memory = learn(strategy, network, sequence).memory
    images = torch.rand(5, 3, 32, 32)
    before = answers(strategy, network, 0, "multi", memory, images)
    first = part_of(memory, f"{CIRCUIT}0/channels/")["features.0"].nonzero()[0, 0]
    with torch.no_grad():
        network.features[0].weight[first] += 0.1
    assert not torch.equal(answers(strategy, network, 0, "multi", memory, images), before)


@pytest.mark.parametrize("shares", SHARES)
def test_a_circuit_takes_its_part_of_the_weights(make_network, make_sequence, shares):
    network, sequence = make_network(tasks=3, width=0.1), make_sequence(tasks=3)
    strategy = Circuit("multi", 0.2, shares, relearn=0, ranking=RANKING)
    memory = learn(strategy, network, sequence, replace(SGD, epochs=1)).memory
    channels = trace_channels(network.features, "features.")
    layers, held = convolutions(network), {}
    for task in (0, 1):
        chosen, new = part_of(memory, f"{CIRCUIT}{task}/channels/"), 0
        for name, group in channels.gives.items():
            read = channels.reads[name]
            inputs = torch.ones(3).bool() if read is None else chosen[read]
            inside = (chosen[group][:, None] & inputs)[:, :, None, None].expand_as(
                layers[name].weight
            )
            new += int((inside & ~held.get(name, torch.zeros_like(inside))).sum())
            held[name] = held.get(name, torch.zeros_like(inside)) | inside
        part = new / sum(layer.weight.numel() for layer in layers.values())
        assert part <= 0.2
        assert part > 0.12 or shares == "depth"  # which has no more to give: one filter a layer
    assert 2 not in {int(name.split("/")[1]) for name in memory if name.startswith(CIRCUIT)}


def test_shares_and_twins_of_a_circuit_differ(make_network, make_sequence):
    network, sequence = make_network(width=0.1), make_sequence()
    other, found = make_network(seed=5, width=0.1), {}
    base = Circuit("multi", 0.2, relearn=0, ranking=RANKING)
    strategies = {shares: replace(base, shares=shares) for shares in SHARES}
    strategies |= {f"twin by {twin}": base.as_twin(twin) for twin in Circuit.twins}
    for name, strategy in strategies.items():
        mine = copy.deepcopy(network)
        lesson = make_lesson(mine, sequence, 1, untrained=other.state_dict())
        with strategy.while_learning(lesson, Phase(0, 0, "relearn")) as guard:
            found[name] = {n: m.tolist() for n, m in guard.chosen.items()}
    counts = {name: [sum(mask) for mask in masks.values()] for name, masks in found.items()}
    assert counts["twin by chance"] == counts["explained"]  # a ranking's twin keeps the shares
    assert found["twin by chance"] != found["explained"]
    for twin in ("magnitude", "depth"):
        assert found[f"twin by {twin}"] == found[twin]
        assert counts[twin] != counts["explained"]
    assert counts["twin by untrained"] != counts["explained"]


def test_what_a_circuit_does_not_hold_is_given_back(make_network, make_sequence):
    network, sequence = make_network(), make_sequence()
    start = copy.deepcopy(network.state_dict())
    strategy = Circuit("multi", 0.2, relearn=2, ranking=RANKING)
    lesson = make_lesson(network, sequence, 1, start=start)
    with strategy.while_learning(lesson, Phase(0, 2, "relearn")) as guard, torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    memory = strategy.after_phase(lesson, Phase(0, 2, "relearn"), guard)
    chosen = part_of(memory, f"{CIRCUIT}0/channels/")
    outside = ~chosen["features.0"]
    after = network.state_dict()
    for name, value in start.items():
        if name.endswith("0.weight") and name.startswith("features.0."):
            assert torch.equal(after[name][outside], value[outside])
            assert not torch.equal(after[name][~outside], value[~outside])
        elif "features.0" not in name and value.ndim == 1:
            assert torch.equal(after[name], value)


def test_scaling_changes_no_answer_behind_a_norm(make_network, make_sequence):
    network, images = make_network().eval(), torch.rand(4, 3, 32, 32)
    learn_plainly(network, make_sequence())
    norms, view = weight_norms(network), network.view("multi", 0, 1)
    with torch.no_grad():
        before = view(images)
        for name, conv in convolutions(network).items():
            norm = network.get_submodule(f"features.{int(name.split('.')[1]) + 1}")
            for value, power in [(conv.weight, 1), (conv.bias, 1), (norm.running_mean, 1)]:
                value.mul_(0.3**power)
            norm.running_var.mul_(0.3**2)
        torch.testing.assert_close(view(images), before, rtol=1e-2, atol=1e-3)  # but for the ε
        rescale(network, norms)
        torch.testing.assert_close(view(images), before)
        network.features[0].weight.zero_()
        rescale(network, norms)
    torch.testing.assert_close(weight_norms(network), norms | {"features.0": torch.tensor(0.0)})


@pytest.mark.parametrize(("made", "tasks"), [("circuit", [1, 2]), ("edges", [1])])
def test_what_is_left_of_a_layer_has_its_former_norm(
    make_strategy, make_network, make_sequence, made, tasks
):
    """Of each layer that holds nothing of earlier tasks."""
    network, sequence = make_network(tasks=3), make_sequence(tasks=3)
    strategy, norms, seen = make_strategy(made, "multi"), weight_norms(network), []
    name = strategy.phases(make_lesson(network, sequence, 1))[0].name
    for learned in tasks:
        memory = seen[-1] if seen else {}
        start = copy.deepcopy(network.state_dict())
        lesson = make_lesson(network, sequence, learned, memory=memory, start=start)
        phase = Phase(learned - 1, 0, name)
        with strategy.while_learning(lesson, phase) as guard:
            now = weight_norms(network)
        seen.append(strategy.after_phase(lesson, phase, guard))
        is_whole = [torch.allclose(now[layer], norms[layer], rtol=1e-4) for layer in norms]
        assert all(is_whole) == (learned == 1)
        norms = weight_norms(network)


def test_a_full_layer_is_read_whole(make_network, make_sequence):
    """By a later circuit, and by depth later tasks take the layers behind."""
    network, sequence = make_network(tasks=4, width=0.1), make_sequence(tasks=4)
    strategy = Circuit("multi", 0.25, "depth", relearn=0, ranking=RANKING)
    memory = learn(strategy, network, sequence, replace(SGD, epochs=1)).memory
    first, *_, last = trace_channels(network.features, "features.").widths.items()
    found = [sizes(memory, task)[first[0]] for task in (0, 1, 2)]
    assert found[0] >= first[1] - 1
    assert found[1:] == [first[1]] * 2
    assert sizes(memory, 0)[last[0]] == 1
    edges = Edges("multi", shares="depth")
    owners = part_of(learn(edges, make_network(tasks=4), sequence).memory, "owner/")
    assert all((owner == 1).any() for owner in owners.values())
    total = sum(owner.numel() for owner in owners.values())
    for task in (1, 2, 3):
        mine = sum(int((owner == task).sum()) for owner in owners.values())
        assert mine / total == pytest.approx(0.25, abs=0.02)


def test_earlier_tasks_are_not_measured_while_a_circuit_relearns(make_network, make_sequence):
    network, sequence = make_network(tasks=3), make_sequence(tasks=3)
    strategy = Circuit("multi", 0.3, relearn=1, ranking=RANKING)
    history = learn(strategy, network, sequence, replace(SGD, epochs=1)).history
    found = {
        (row["task"], row["phase"]): {n for n in row if n.startswith("acc")} for row in history
    }
    everything = {"acc_task1", "acc_task2", "acc_task3"}
    assert found == {
        (2, "relearn"): {"acc_task1"},
        (2, "learn"): everything,
        (3, "relearn"): {"acc_task2"},
        (3, "learn"): everything,
    }


@pytest.mark.parametrize("teacher", ["network", "labels"])
def test_a_circuit_relearns_among_the_known_classes(make_network, make_sequence, teacher):
    """Under an expanding head, which has the next task's outputs already."""
    network, sequence = make_network(tasks=3), make_sequence(tasks=3)
    strategy = Circuit("expanding", 0.3, relearn=1, teacher=teacher, ranking=RANKING)
    lesson = make_lesson(network, sequence, 2, "expanding")
    with strategy.while_learning(lesson, Phase(1, 1, "relearn")) as guard:
        batch = one_batch(sequence, 1)
        batch = replace(batch, labels=batch.labels + 2)
        loss, logits, _ = guard.objective(lesson.view(1), batch)
        loss.backward()
    assert logits.shape[1] == 4
    assert network.heads[2].weight.grad is None or not network.heads[2].weight.grad.any()


@pytest.mark.parametrize(
    ("by", "share", "parts"), [("score", 0.2, (0.2, 0.16)), ("magnitude", 0.0, (1 / 3, 1 / 3))]
)
@pytest.mark.parametrize("head", ["shared", "multi"])
def test_edges_keep_old_answers_and_their_part(make_network, make_sequence, head, by, share, parts):
    """Of what the task trained, or an equal part for each."""
    network, sequence = make_network(tasks=3), make_sequence(tasks=3)
    strategy = Edges(head, share, by=by)
    images, seen = torch.rand(5, 3, 32, 32), {}

    def note(progress):
        if progress.learned == 2 and not seen:
            seen[0] = answers(strategy, network, 0, head, progress.memory, images)

    memory = learn(strategy, network, sequence, on_epoch=note).memory
    assert torch.equal(answers(strategy, network, 0, head, memory, images), seen[0])
    owners = part_of(memory, "owner/")
    total = sum(owner.numel() for name, owner in owners.items() if "features" in name)
    for task, part in enumerate(parts, 1):
        mine = sum(int((o == task).sum()) for n, o in owners.items() if "features" in n)
        assert mine / total == pytest.approx(part, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_mixed_shares_find_as_many_free_weights_as_they_want(make_network, make_sequence, share):
    """Also of later tasks, where the explained part has filled the first layers."""
    network, sequence = make_network(tasks=5), make_sequence(tasks=5)
    mixed, equal = (
        part_of(learn(made, copy.deepcopy(network), sequence).memory, "owner/")
        for made in (
            Edges("multi", share, mix=0.5, by="magnitude"),
            Edges("multi", share, shares="uniform", by="magnitude"),
        )
    )
    total = sum(owner.numel() for owner in mixed.values())
    for task in (1, 2, 3, 4):
        counts = [sum(int((o == task).sum()) for o in owners.values()) for owners in (mixed, equal)]
        assert counts[0] / total == pytest.approx(counts[1] / total, abs=2e-3)


def test_edges_by_magnitude_of_equal_shares_are_packnets(make_network, make_sequence, same_bits):
    network, sequence = make_network(), make_sequence()
    chosen = []
    for strategy in (
        Edges("multi", share=0.4, shares="uniform", by="magnitude"),
        PackNet("multi", 0.6),
    ):
        lesson = make_lesson(copy.deepcopy(network), sequence, 1)
        with strategy.while_learning(lesson, Phase(0, 1, "retrain")) as guard:
            chosen.append(guard.chosen)
    assert same_bits(*chosen)
    # Of later tasks as many, whatever was learned in between.
    counts = []
    for strategy in (
        Edges("multi", share=0.4, shares="uniform", by="magnitude"),
        PackNet("multi", 0.6),
    ):
        memory = learn(strategy, make_network(tasks=3), make_sequence(tasks=3)).memory
        owners = part_of(memory, "owner/")
        counts.append([int((owner == 2).sum()) for owner in owners.values()])
    assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(*counts, strict=True))


def test_a_score_is_the_weight_times_the_gradient(make_network, make_sequence):
    network, sequence = make_network(), make_sequence()
    lesson = make_lesson(network, sequence, 1, untrained=make_network(seed=3).state_dict())
    plain, chance, other = (weight_scores(lesson, t) for t in (None, "chance", "untrained"))
    for name, layer in convolutions(network).items():
        sizes = layer.weight.detach().abs()
        known = (sizes > 1e-6) & (plain[name] > 0)
        left, right = (values[name] / sizes for values in (plain, chance))
        torch.testing.assert_close(
            left.flatten().sort().values, right.flatten().sort().values, rtol=1e-4, atol=1e-8
        )
        assert known.any()
        assert not torch.allclose(left, right)
        assert not torch.allclose(plain[name], other[name])


def test_rows_are_of_each_layer_what_the_shares_say(make_network, make_sequence):
    network, sequence = make_network(tasks=3), make_sequence(tasks=3)
    start = copy.deepcopy(network.state_dict())
    strategy = Rows("multi", 0.25, "depth", ranking=RANKING)
    frozen = strategy.frozen(network, learn(strategy, network, sequence).memory)
    assert all(mask.any() for mask in frozen.values())  # at least one of each
    first, *_, last = frozen.values()
    assert first.all()
    assert not last.all()
    state = network.state_dict()
    assert torch.equal(state["features.0.weight"], start["features.0.weight"])


@pytest.mark.parametrize("optimizer", list(CONFIGS))
def test_soft_protection_holds_by_degrees(make_network, make_sequence, optimizer):
    """The best filters of neighbouring layers hold still, the last move as without it."""
    network, sequence = make_network(), make_sequence()
    start, plain = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    channels = trace_channels(network.features, "features.")
    orders = RANKING.orders(make_lesson(network, sequence, 1))
    learn(Soft("multi", 1.0, ranking=RANKING), network, sequence, CONFIGS[optimizer])
    learn(Soft("multi", 100.0, ranking=RANKING), plain, sequence, CONFIGS[optimizer])
    state = network.state_dict()
    for name in channels.gives:
        best, read = orders[name][0], channels.reads[name]
        inputs = [0] if read is None else [orders[read][0]]
        for index in inputs:
            assert torch.equal(
                state[f"{name}.weight"][best, index], start[f"{name}.weight"][best, index]
            )
        worst = orders[name][-1]
        assert not torch.equal(state[f"{name}.weight"][worst], start[f"{name}.weight"][worst])
    moved = {n: (state[n] - start[n]).abs().mean() for n in state if n.endswith("0.weight")}
    free = {n: (plain.state_dict()[n] - start[n]).abs().mean() for n in moved}
    assert sum(moved.values()) < sum(free.values())


def test_one_step_moves_by_what_is_not_held(make_network):
    """Against the rule, weight by weight."""
    network = make_network()
    channels = trace_channels(network.features, "features.")
    importance = {n: torch.rand(m.out_channels) for n, m in convolutions(network).items()}
    held = held_parts(network, channels, importance, 2.0)
    for name, read in channels.reads.items():
        weight = held[f"{name}.weight"]
        for out, into in [(0, 0), (1, 1), (-1, -1)]:
            above = 1.0 if read is None else float(importance[read][into])
            expected = min(float(importance[name][out]), above) ** 2
            assert torch.allclose(weight[out, into], torch.tensor(expected))
        assert torch.equal(held[f"{name}.bias"], importance[name] ** 2)
    norm = next(iter(channels.norms))
    assert torch.equal(held[f"{norm}.weight"], importance[channels.norms[norm]] ** 2)


def test_twins_of_soft_protection(make_network, make_sequence):
    """Chance permutes within the layer; equal weights hold as much of each layer."""
    network, sequence = make_network(), make_sequence()
    base, lesson = Soft("multi", 1.0, ranking=RANKING), make_lesson(network, sequence, 1)
    made = {}
    for name, strategy in ({"soft": base} | {t: base.as_twin(t) for t in Soft.twins}).items():
        with strategy.while_learning(lesson, Phase(1, 1)) as guard:
            made[name] = guard.observer._made
    for plain, chance, equal in zip(*made.values(), strict=True):
        assert equal.unique().numel() == 1
        assert float(chance.mean()) == pytest.approx(float(plain.mean()), abs=0.05)
        assert float(equal.flatten()[0]) == pytest.approx(float(plain.mean()), abs=1e-5)
        if plain.ndim == 1 and len(plain) > 2:
            assert torch.equal(chance.sort().values, plain.sort().values)
    assert any(not torch.equal(p, c) for p, c in zip(made["soft"], made["chance"], strict=True))


def test_filters_are_set_free_until_the_accuracy_falls(make_network, make_sequence):
    """The kept ones are all above one threshold, and one step further too much is lost."""
    network, sequence = make_network(width=0.1), make_sequence(train=20, validation=20)
    learn_plainly(network, sequence)
    lesson = make_lesson(network.eval(), sequence, 1)
    scores = rnf._relevance(lesson)
    whole = rnf._silencing(lesson)({})
    kept = Rnf("multi", 0.1).choose(lesson)
    free = {name: ~mask for name, mask in kept.items()}
    every = torch.cat(list(scores.values()))
    is_free = torch.cat(list(free.values()))
    assert 0 < int(is_free.sum()) < len(every)
    assert every[is_free].max() <= every[~is_free].min()
    assert rnf._silencing(lesson)(free) >= whole - 0.1
    more = dict(
        zip(
            scores,
            torch.zeros_like(is_free)
            .index_fill(
                0,
                every.argsort(stable=True)[: int(is_free.sum()) + round(len(every) / 100 + 0.5)],
                True,
            )
            .split([len(v) for v in scores.values()]),
            strict=True,
        )
    )
    assert rnf._silencing(lesson)(more) < whole - 0.1
    assert not torch.cat(list(Rnf("multi", 1.0).choose(lesson).values())).any()
    twin = Rnf("multi", 0.1).as_twin("chance").choose(lesson)
    assert {n: int(m.sum()) for n, m in twin.items()} == {n: int(m.sum()) for n, m in kept.items()}
    assert any(not torch.equal(twin[name], kept[name]) for name in kept)


def learn_plainly(network, sequence):
    """Learn the first task by the first head."""
    course = Learner(sequence, replace(SGD, epochs=6), head="multi", seed=0, device=CPU)
    course.learn_task(network, Finetune("multi"), Progress(0, []))


def test_silenced_maps_are_zeros(make_network):
    network, images = make_network().eval(), torch.rand(2, 3, 32, 32)
    view = network.view("multi", 0, 1)
    layers = feature_layers(view, images)
    mask = torch.zeros(network.features[0].out_channels, dtype=torch.bool)
    mask[1] = True
    with silenced(view, layers, {"features.0": mask}), torch.no_grad():
        maps = network.features[:2](images)
    assert not maps[:, 1].any()
    with torch.no_grad():
        whole = network.features[:2](images)
    assert torch.equal(maps[:, 0], whole[:, 0])
    assert whole[:, 1].any()
