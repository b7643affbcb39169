"""Keys: they change with all that a training depends on, and with nothing else."""

import dataclasses
import sys

import pytest
import torch
from safetensors.torch import save_file

from permafrost import registry
from permafrost.errors import InputError
from permafrost.experiment import RunInputs, knowledge_name
from permafrost.first_weights import first_weights
from permafrost.models import NETWORKS
from permafrost.runs import key
from permafrost.source import PACKAGE_SOURCES, reached
from permafrost.strategies import STRATEGIES
from small_runs import (
    EWC,
    FINETUNE,
    FREEZE,
    LWF,
    MASKS,
    REPLAY,
    cell_of,
    key_of,
    make_joint,
    unread,
)


def other_masks():
    masks = {name: mask.clone() for name, mask in MASKS.items()}
    masks["features.0"] = ~masks["features.0"]
    return masks


# The same run, but for one thing.
CHANGES = {
    "seed": {"spec": dataclasses.replace(FREEZE, seed=1)},
    "strategy": {"spec": FINETUNE, "masks": None},
    "pct": {"spec": dataclasses.replace(FREEZE, pct=0.25)},
    "metric": {"spec": dataclasses.replace(FREEZE, metric="pearson")},
    "head": {"spec": dataclasses.replace(FREEZE, head="multi")},
    "masks": {"masks": other_masks()},
    "lr": {"train": {"lr": 0.02}},
    "epochs": {"train": {"epochs": 3}},
    "optimizer": {"train": {"optimizer": "adam"}},
    "momentum": {"train": {"momentum": 0.5}},
    "weight_decay": {"train": {"weight_decay": 0.1}},
    "batch_size": {"train": {"batch_size": 5}},
    "flip": {"train": {"flip": True}},
    "padding": {"train": {"padding": 2}},
    "arch": {"model": {"arch": "vgg13"}},
    "width": {"model": {"width": 0.06}},
    "model.batch_norm": {"model": {"batch_norm": False}},
    "freeze.batch_norm": {"freeze": {"batch_norm": "affine"}},
}


@pytest.mark.parametrize(
    ("strategy", "ways"), [("rows", 3), ("rnf", 3), ("freeze_lwf", 3), ("circuit", 1)]
)
def test_the_key_changes_with_how_norms_are_frozen(inputs, strategy, ways):
    """Of all strategies that are built with it, ranked or not; of no other."""
    spec, known = cell_of(strategy), dataclasses.replace(inputs, read_knowledge=dict)
    masks = None if spec.metric is None else MASKS
    keys = {
        key_of(spec, known, masks, freeze={"batch_norm": way}) for way in ("full", "affine", "none")
    }
    assert len(keys) == ways


def test_the_code_of_a_ranking_is_reached():
    """By name, or when chance takes its place."""
    assert "permafrost.ranking.relevance" in reached([STRATEGIES.home("rnf")], PACKAGE_SOURCES)


@pytest.mark.parametrize("name", list(CHANGES))
def test_the_key_changes_with(inputs, name):
    assert key_of(**({"spec": FREEZE, "inputs": inputs} | CHANGES[name])) != key_of(FREEZE, inputs)


def test_the_key_changes_with_the_inputs(inputs, monkeypatch):
    keys = [key_of(FREEZE, inputs)]
    keys.append(key_of(FREEZE, dataclasses.replace(inputs, tasks_digest="others")))
    keys.append(key_of(FREEZE, dataclasses.replace(inputs, first_digest="another")))
    keys.append(key_of(FREEZE, inputs.on_validation()))
    joint = make_joint(0, "shared", 1)
    keys += [key_of(make_joint(0, "shared", passes), inputs, None) for passes in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(key, "code_identity", lambda roots: {"code": "other"})
        keys.append(key_of(FREEZE, inputs))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 64)
        keys.append(key_of(FREEZE, inputs))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        keys.append(key_of(FREEZE, inputs))
    with monkeypatch.context() as patch:
        patch.setattr(NETWORKS, "home", lambda name: "permafrost.models.torchvision_networks")
        keys.append(key_of(FREEZE, inputs))
    assert len(set(keys)) == len(keys)
    assert key_of(FREEZE, inputs) == keys[0]
    # Joint training does not start from the first task's weights.
    other = dataclasses.replace(inputs, first_digest="another")
    assert key_of(joint, other, None) == key_of(joint, inputs, None)


def test_the_key_changes_with_what_the_first_weights_hold(inputs, tmp_path):
    file, keys = tmp_path / "weights.safetensors", [key_of(FREEZE, inputs)]
    for value in (0.0, 1.0):
        save_file({"0.weight": torch.tensor([value])}, file)
        begun = dataclasses.replace(inputs, weights=first_weights(file))
        keys.append(key_of(FREEZE, begun, model={"weights": str(file)}))
    assert len(set(keys)) == 3
    file.unlink()
    with pytest.raises(InputError, match=r"^model\.weights: .*weights\.safetensors is not there"):
        first_weights(file)


def test_the_key_changes_with_what_the_strategy_needs(inputs):
    def known(text):
        value = torch.tensor(list(text.encode()))
        names = {knowledge_name(strategy) for strategy in STRATEGIES.values()}
        everything = {f"{name}/values": value for name in names}
        return dataclasses.replace(inputs, read_knowledge=lambda: everything)

    for spec in (EWC, LWF, REPLAY, cell_of("si")):
        assert key_of(spec, known("a"), None) != key_of(spec, known("b"), None)
    for strategy in ("freeze_ewc", "freeze_lwf"):
        spec = dataclasses.replace(FREEZE, strategy=strategy, hyper=cell_of(strategy).hyper)
        assert key_of(spec, known("a")) != key_of(spec, known("b"))
    for spec in (FINETUNE, cell_of("packnet"), cell_of("critical_layer")):
        assert key_of(spec, known("a"), None) == key_of(spec, known("b"), None)
    # Before a third task it is made anew, with as many images.
    for spec in (EWC, REPLAY):
        keys = {
            key_of(spec, known("a"), None, consolidate=section)
            for section in ({}, {"fisher_images": 7}, {"buffer_images": 7})
        }
        assert len(keys) > 1


def test_the_key_changes_with_the_hyperparameters(inputs):
    known = dataclasses.replace(inputs, read_knowledge=dict)
    for strategy, made in STRATEGIES.items():
        for name in made.hyper if strategy != "freeze" else ():
            spec = cell_of(strategy)
            masks = None if spec.metric is None else MASKS
            hyper = spec.hyperparameters
            assert set(hyper) == set(made.hyper)
            value = hyper[name]
            hyper[name] = "depth" if isinstance(value, str) else value / 2 + 0.125
            other = dataclasses.replace(spec, hyper=tuple(hyper.items()))
            assert key_of(spec, known, masks) != key_of(other, known, masks), (strategy, name)


@pytest.mark.parametrize(
    "sections",
    [
        {"sweep": {"workers": 7}},
        {"sweep": {"pcts": [0.5]}},
        {"tune": {"freeze": [{"pct": 0.25}], "ewc": [{"strength": 7}]}},
        {"consolidate": {"buffer_images": 7}},  # of other strategies
        {"consolidate": {"fisher_images": 7}},
        {"profile": "other"},
        {"seeds": [0, 1]},
        {"freeze": {"pct": 1.0, "metric": "random"}},
        {"rank": {"aggregate": "mean"}},  # what it leads to lies in the masks
        {"saliency": {"reading": "channel"}},
        {"model": {"head": "multi"}},  # the variant's; the cell's own stands in the spec
        {"runtime": {"threads": 9}},  # what counts is how many there are
    ],
)
def test_the_key_does_not_change_with(inputs, sections):
    assert key_of(FREEZE, inputs, **sections) == key_of(FREEZE, inputs)


def test_the_key_does_not_change_with_the_order_of_the_masks(inputs):
    turned = {name: MASKS[name] for name in reversed(MASKS)}
    assert list(turned) != list(MASKS)
    assert key_of(FREEZE, inputs, turned) == key_of(FREEZE, inputs)


def test_the_key_of_a_third_task_changes_with_how_it_is_ranked(make_sequence):
    inputs = RunInputs(make_sequence(tasks=3), "tasks", {}, "first", unread)
    keys = {
        key_of(FREEZE, inputs, split={"tasks": 3}, **sections)
        for sections in (
            {},
            {"visualize": {"steps": 3}},
            {"visualize": {"start_seed": 3}},
            {"rank": {"reverse": True}},
        )
    }
    assert len(keys) == 4


def test_the_key_changes_with_the_code_of_ones_own_criterion(make_sequence, tmp_path, monkeypatch):
    """Also with what it imports of its folder, where filters are ranked anew by it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    helper = tmp_path / "custom/helper.py"
    helper.parent.mkdir()
    (tmp_path / "custom/score.py").write_text(
        "from custom.helper import WEIGHT\n"
        "from permafrost.ranking import map_metric\n\n"
        "@map_metric(higher_is_better=True)\n"
        "def score(saliency, filters):\n    return WEIGHT * filters\n"
    )
    spec = dataclasses.replace(FREEZE, metric="custom.score:score")
    for tasks, count in ((3, 2), (2, 1)):
        inputs = RunInputs(make_sequence(tasks=tasks), "tasks", {}, "first", unread)
        keys = set()
        for text in ("WEIGHT = 1.0\n", "WEIGHT = 1.0  # as before\n", "WEIGHT = 2.0\n"):
            helper.write_text(text)
            as_in_a_new_process(monkeypatch)
            keys.add(key_of(spec, inputs, split={"tasks": tasks}))
        assert len(keys) == count
    as_in_a_new_process(monkeypatch)


def as_in_a_new_process(monkeypatch):
    """Forget what of ``custom`` was read and imported."""
    key._sources.cache_clear()
    registry._snapshots.clear()
    for name in [name for name in sys.modules if name.startswith("custom")]:
        monkeypatch.delitem(sys.modules, name)
