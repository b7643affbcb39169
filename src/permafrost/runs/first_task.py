"""How the first task is learned: plainly, with what every strategy needs of it recorded."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace

import torch

from permafrost.data import TaskSequence
from permafrost.runs.description import Description
from permafrost.runs.network import new_network
from permafrost.runs.outcome import OnEpoch, Outcome, accuracy_facts
from permafrost.runs.spec import Settings
from permafrost.strategies.base import Guard, Lesson, Strategy
from permafrost.strategies.learner import Learner, Progress
from permafrost.strategies.path_integral import PathIntegral
from permafrost.strategies.quadratic import common_parameters


@dataclass(frozen=True)
class _Recorded(Strategy):
    """Plain training that records the path integral, which SI needs of the first task."""

    integral: PathIntegral

    def while_learning_first(self, lesson: Lesson) -> AbstractContextManager[Guard]:
        del lesson
        return nullcontext(Guard(observer=self.integral))


def learn_first(
    settings: Settings,
    seed: int,
    tasks: TaskSequence,
    device: torch.device,
    progress: Progress | None,
    after_epoch: OnEpoch,
) -> Outcome:
    """Learn the first task; the outcome keeps the path integral.

    Parameters
    ----------
    settings : Settings
        How.
    seed : int
        Of all random draws.
    tasks : TaskSequence
        The images; those of the first task are read.
    device : torch.device
        Where to train.
    progress : Progress or None
        Where to go on.
    after_epoch : callable
        Told the progress after each epoch.

    Raises
    ------
    TrainingDiverged
        If the training diverges.
    """
    # The first task is answered by the first head under every head mode.
    first = replace(tasks, tasks=tasks.tasks[:1])
    learner = Learner(first, settings.train, head="shared", seed=seed, device=device)
    network = new_network(settings, tasks, seed).to(device)
    progress = progress or Progress(0, [learner.measure(network, 0)])
    watched = common_parameters(network, "shared", learned=1)
    recorder = _Recorded("shared", PathIntegral(watched))
    learner.learn_task(network, recorder, progress, after_epoch)
    return Outcome(
        accuracy_facts(progress),
        network.state_dict(),
        progress.seconds,
        recorder.integral.tensors,
        asdict(Description.of(settings, tasks, learned=1)),
    )
