"""Stage consolidate: what the sweep's methods need from the first task."""

import time

from torch import Tensor

from permafrost.experiment import knowledge_name, run_settings
from permafrost.first_weights import first_weights, weights_path
from permafrost.runs.knowledge import first_lesson
from permafrost.stages.shared import INTEGRALS, KNOWLEDGE, TASKS, note_seconds, seed_file
from permafrost.stages.workspace import open_workspace
from permafrost.strategies import STRATEGIES
from permafrost.tensors import load_tasks, load_tensors, save_tensors


def run(seed: int) -> None:
    """Write what is needed of Fisher information, path integral, old answers and old images."""
    with open_workspace("consolidate", seed) as workspace:
        integral, _ = load_tensors(seed_file(INTEGRALS, seed))
        weights = first_weights(weights_path(workspace.params))
        lesson = first_lesson(
            run_settings(workspace.params, weights, workspace.device),
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
