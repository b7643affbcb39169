"""Stage train_second: the variant is one of the sweep's trainings."""

from pathlib import Path

import pytest
import torch

from permafrost.artifacts import file_digest, save_record
from permafrost.errors import InputError
from permafrost.experiment import new_network
from permafrost.plan import sweep_runs
from permafrost.ranking.method import frozen_masks
from permafrost.tensors import save_tasks, save_tensors
from small_runs import FREEZE, chosen_for, key_of, make_orders, make_params


def test_the_variant_is_one_of_the_sweeps_cells(tmp_path, monkeypatch, make_sequence):
    """From stage freeze's file, with its keys in sorted order, comes the sweep's own key."""
    from permafrost.stages.run_pool import run_inputs
    from permafrost.stages.train_second import read_masks
    from permafrost.variants import variant_spec

    monkeypatch.chdir(tmp_path)
    params = make_params(
        freeze={"metric": "mse", "pct": 0.5}, sweep={"metrics": ["mse"], "pcts": [0.5]}
    )
    orders = make_orders()
    layers = {
        name: {"filters": len(mask), "frozen": mask.nonzero().flatten().tolist()}
        for name, mask in frozen_masks(orders, 0.5).items()
    }
    save_record(Path("models/freeze/0.json"), {"metric": "mse", "pct": 0.5, "layers": layers})
    save_tasks(Path("data/tasks/0.safetensors"), make_sequence())
    save_tensors(Path("models/train_first/0.safetensors"), new_network(params, 0).state_dict())
    spec, masks = variant_spec(params, 0), read_masks(0, params)
    assert spec in sweep_runs(params, chosen_for(params))
    assert list(masks) != list(orders)  # features.11 sorts before features.4
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        name: mask.tolist() for name, mask in frozen_masks(orders, 0.5).items()
    }
    inputs = run_inputs(0, None)
    assert inputs.tasks_digest == file_digest(Path("data/tasks/0.safetensors"))
    assert inputs.first_digest == file_digest(Path("models/train_first/0.safetensors"))
    with pytest.raises(InputError, match=r"models/consolidate/0\.safetensors: not found"):
        inputs.read_knowledge()  # only some methods need it
    known = Path("models/consolidate/0.safetensors")
    save_tensors(known, {"buffer/0/labels": torch.arange(3)})
    assert {name: value.tolist() for name, value in inputs.read_knowledge().items()} == {
        "buffer/0/labels": [0, 1, 2]
    }
    assert key_of(spec, inputs, masks) == key_of(FREEZE, inputs, frozen_masks(orders, 0.5))
    with pytest.raises(InputError, match="another variant"):
        read_masks(0, make_params(freeze={"pct": 0.25}))
