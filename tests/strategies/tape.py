"""What a CUDA graph does, on the CPU: operations are noted with their tensors and done again.

Python that ran between them runs once, and the tensors stay where they were, as on a GPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What gives Python a number, a tensor whose size depends on numbers, or one of Python's numbers.
# A GPU is waited for in each of them, and can record none.
WAITING = {
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.is_nonzero",
    "aten.lift_fresh",
    "aten.nonzero",
}


class Tape(TorchDispatchMode):
    """Notes all operations; refuses those that a GPU cannot record."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0]
        # An optimizer's count of steps is on the CPU there, unless it is told to be capturable.
        if name in WAITING:
            raise AssertionError(f"{name} within a step")
        result = function(*args, **(kwargs or {}))
        self.noted.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        """Do all again; what an operation makes is written where it was made first."""
        for function, args, kwargs, result in self.noted:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def on_tape(operations):
    """Record as :func:`permafrost.training.steps.on_gpu` does, for any device."""
    with torch.random.fork_rng([]):
        operations()
        with Tape() as tape:
            results = operations()
    return tape.replay, results
