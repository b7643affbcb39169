"""Frozen filters with a second method: frozen ones keep their bits, live ones are held by it."""

import copy

import pytest
import torch
from torch import nn

from lessons import (
    CONFIGS,
    HEADS,
    copied_state,
    distance,
    learn,
    make_lesson,
    one_batch,
    penalty_memory,
)
from permafrost.freezing import current_weights
from permafrost.strategies import Ewc, Freeze, FreezeEwc, FreezeLwf, Lwf, Phase, common_parameters
from permafrost.strategies.lwf import teacher_memory
from permafrost.strategies.quadratic import CENTRE, PRECISION, penalised
from permafrost.training import TrainingConfig, cross_entropy


def frozen_rows(network, masks):
    """Yield all tensors that belong to the masks' filters, frozen and live rows apart."""
    state = network.state_dict()
    for name, mask in masks.items():
        norm = f"features.{int(name.split('.')[1]) + 1}"
        for tensor in [f"{name}.weight", f"{name}.bias"] + [
            f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")
        ]:
            yield tensor, state[tensor][mask].clone(), state[tensor][~mask].clone()


@pytest.mark.parametrize("optimizer", list(CONFIGS))
@pytest.mark.parametrize("method", ["freeze_ewc", "freeze_lwf"])
def test_frozen_filters_keep_their_bits_beside_a_second_method(
    make_stirred, make_sequence, half_masks, same_bits, method, optimizer
):
    network, sequence = make_stirred(), make_sequence()
    config, masks = CONFIGS[optimizer], half_masks(network)
    freeze = Freeze("multi", half_masks)
    if method == "freeze_ewc":
        memory = penalty_memory(network, shift=0.05)
        make, weak, strong = FreezeEwc, Ewc("multi", 0.0), Ewc("multi", 5.0)
    else:
        memory = teacher_memory(make_lesson(network, sequence, 0))
        make, weak, strong = FreezeLwf, Lwf("multi", 0.0), Lwf("multi", 5.0)
    before, trained = list(frozen_rows(network, masks)), {}
    for name, strategy in {
        "plain": freeze,
        "weak": make("multi", freeze, weak),
        "strong": make("multi", freeze, strong),
    }.items():
        trained[name] = copy.deepcopy(network)
        learn(strategy, trained[name], sequence, config, memory)
        after = frozen_rows(trained[name], masks)
        for (tensor, frozen, live), (_, still, moved) in zip(before, after, strict=True):
            assert torch.equal(frozen, still), tensor
            assert not torch.equal(live, moved), tensor
    assert same_bits(trained["plain"].state_dict(), trained["weak"].state_dict())
    assert not same_bits(trained["plain"].state_dict(), trained["strong"].state_dict())


def test_a_strong_penalty_holds_the_live_filters(make_stirred, make_sequence, half_masks):
    network, sequence = make_stirred(heads=0.3, batch_norm=False), make_sequence()
    config = TrainingConfig(epochs=20, lr=0.001, batch_size=8, padding=0)
    memory, before = penalty_memory(network, precision=1.0), copied_state(network)
    freeze, names = Freeze("multi", half_masks), list(common_parameters(network, "multi", 1))
    bound = 2 * (1 + config.momentum) / config.lr

    def move(strength):
        trained = copy.deepcopy(network)
        strategy = FreezeEwc("multi", freeze, Ewc("multi", strength))
        learn(strategy, trained, sequence, config, memory)
        return distance(before, trained.state_dict(), names)

    assert move(bound / 2) < 0.1 * move(0.0)


@pytest.mark.parametrize("head", HEADS)
def test_the_penalty_sees_the_whole_weights_of_a_partly_frozen_network(
    make_stirred, make_sequence, half_masks, head
):
    """Frozen rows that are off their centre add to it too, but nothing pulls them."""
    network, sequence = make_stirred(), make_sequence()
    memory, batch = penalty_memory(network, shift=0.1), one_batch(sequence, 1)
    lesson = make_lesson(network, sequence, 1, head, memory=memory)
    plain, _, _ = penalised(lesson, 1.5)(lesson.view(1), batch)
    strategy = FreezeEwc(head, Freeze(head, half_masks), Ewc(head, 3.0))
    with strategy.while_learning(lesson, Phase(1, 1)) as guard:
        lesson.view(1).eval()
        loss, _, _ = guard.objective(lesson.view(1), batch)
        assert type(network.features[0]) is not nn.Conv2d
        weights = current_weights(network)
        assert set(weights) == {name for name, _ in plain_names(network)}
        pulled = loss - cross_entropy(lesson.view(1), batch)[0]
        gradient = torch.autograd.grad(
            pulled, list(network.heads[0].parameters()), allow_unused=True
        )
    torch.testing.assert_close(loss, plain)
    for name, found in zip(("weight", "bias"), gradient, strict=True):
        if head == "multi":
            assert found is None
        else:
            off = network.heads[0].get_parameter(name) - memory[f"{CENTRE}heads.0.{name}"]
            expected = 3 * memory[f"{PRECISION}heads.0.{name}"] * off
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def plain_names(network):
    """Return the names that the network has outside of any block."""
    for name, value in network.named_parameters():
        yield name.replace("weight_rows.live", "weight").replace("bias_rows.live", "bias"), value


@pytest.mark.parametrize("method", ["freeze_ewc", "freeze_lwf"])
def test_what_was_frozen_last_is_told(make_network, make_sequence, half_masks, method):
    """As by freezing alone, also after the last task, of which the companion keeps nothing."""
    sequence, found = make_sequence(tasks=4), {}

    def more(lesson, frozen):
        masks = {name: torch.zeros_like(mask) for name, mask in half_masks(lesson).items()}
        for mask in masks.values():
            mask[: lesson.learned] = True
        return masks

    freeze = Freeze("multi", more)
    other = {"freeze_ewc": (FreezeEwc, Ewc("multi", 0.0)), "freeze_lwf": (FreezeLwf, Lwf("multi"))}
    made, companion = other[method]
    for name, strategy in {"alone": freeze, "beside": made("multi", freeze, companion)}.items():
        network = make_network(tasks=4)
        lesson = make_lesson(network, sequence, 0)
        memory = type(strategy).knowledge(lesson) if type(strategy).knowledge else {}
        kept = learn(strategy, network, sequence, memory=memory).memory
        found[name] = {n: int(m.sum()) for n, m in strategy.frozen(network, kept).items()}
    assert found["alone"] == found["beside"]
    assert set(found["alone"].values()) <= {3, 2, 1}
    assert max(found["alone"].values()) == 3
