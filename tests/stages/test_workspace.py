"""The workspace of stages that compute: what it reads must be of the network of the parameters."""

from pathlib import Path

import pytest
import torch

from permafrost.errors import DamagedError
from permafrost.runs.store import RunStore
from permafrost.stages.workspace import Workspace
from permafrost.tensors import save_tensors
from small_runs import make_orders, make_params


def test_a_ranking_of_another_network_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(make_params(), torch.device("cpu"), RunStore(tmp_path))
    orders, path = make_orders(), Path("models/rank/0.safetensors")
    save_tensors(path, {f"mse/{name}/order": order for name, order in orders.items()})
    found = workspace.orders(0, "mse")
    assert list(found) == list(orders)
    assert all(torch.equal(found[name], orders[name]) for name in orders)
    first = next(iter(orders))
    for other in (orders | {first: torch.arange(len(orders[first]) + 1)}, {first: orders[first]}):
        save_tensors(path, {f"mse/{name}/order": order for name, order in other.items()})
        with pytest.raises(DamagedError, match="has no ranking of layer"):
            workspace.orders(0, "mse")
