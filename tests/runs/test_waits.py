"""Within an epoch nothing is read back: to read a number waits for all that runs before."""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from permafrost.experiment import train_first_task
from permafrost.training import loop
from small_runs import CPU, make_params

# What gives Python a number, or a tensor whose size depends on numbers.
_READING = {"aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten.nonzero"}


class Readings(TorchDispatchMode):
    """Counts what reads numbers."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0]
        if name in _READING and args[0].device.type == "cpu":
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def readings(monkeypatch):
    """Return, for each epoch that is trained, how many steps it has and what it reads."""
    epochs, plain = [], loop.train_epoch

    def train_epoch(steps, *rest):
        batches = list(steps)
        with Readings() as mode:
            row = plain(batches, *rest)
        epochs.append((len(batches), mode.found.total()))
        return row

    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    return epochs


def test_no_step_waits_for_the_device(store, make_sequence, readings):
    for size in (4, 2):
        params = make_params(train={"batch_size": size})
        train_first_task(store, params, 0, make_sequence(), "tasks", CPU)
    assert len(dict(readings)) > 1
    assert len(set(dict(readings).values())) == 1
