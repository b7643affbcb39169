"""Stage consolidate: what the sweep's methods need from the first task."""

import time

from torch import Tensor

from permafrost.artifacts import load_tasks, load_tensors, save_tensors
from permafrost.experiment import first_lesson, knowledge_name
from permafrost.stages.workspace import (
    INTEGRALS,
    KNOWLEDGE,
    TASKS,
    note_seconds,
    open_stage,
    seed_file,
)
from permafrost.strategies import STRATEGIES


def run(seed: int) -> None:
    """Write what is needed of Fisher information, path integral, old answers and old images."""
    with open_stage("consolidate", seed) as workspace:
        integral, _ = load_tensors(seed_file(INTEGRALS, seed))
        lesson = first_lesson(
            workspace.params,
            seed,
            load_tasks(seed_file(TASKS, seed)),
            workspace.first_network(seed),
            integral,
            workspace.device,
        )
        tensors: dict[str, Tensor] = {}
        strategies = [STRATEGIES[name] for name in workspace.params.sweep.strategies]
        needed = {knowledge_name(made): made.knowledge for made in strategies}
        for name, make in needed.items():
            if make is None:
                continue
            began = time.perf_counter()
            tensors |= {f"{name}/{entry}": value for entry, value in make(lesson).items()}
            note_seconds("consolidate", {f"{name}@{seed}": time.perf_counter() - began})
        save_tensors(seed_file(KNOWLEDGE, seed), tensors)
