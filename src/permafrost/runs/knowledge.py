"""What strategies know of the first task, which was learned before it was known for which."""

import torch

from permafrost.data import TaskSequence
from permafrost.models import TaskNetwork
from permafrost.runs.network import new_network
from permafrost.runs.spec import Settings
from permafrost.strategies.base import Lesson, Memory
from permafrost.strategies.path_integral import INTEGRAL


def first_lesson(
    settings: Settings,
    seed: int,
    tasks: TaskSequence,
    network: TaskNetwork,
    integral: Memory,
    device: torch.device,
) -> Lesson:
    """Return the lesson that the first task was, to make what strategies need of it.

    Parameters
    ----------
    settings : Settings
        How it was learned.
    seed : int
        Of the training.
    tasks : TaskSequence
        The images.
    network : TaskNetwork
        After the first task.
    integral : dict of str to Tensor
        The path integral that its training recorded.
    device : torch.device
        Where to compute.
    """
    return Lesson(
        network=network,
        learned=0,
        sequence=tasks,
        config=settings.train,
        head="shared",  # under every head mode the first head answers
        seed=seed,
        device=device,
        keep=settings.keep,
        memory={f"{INTEGRAL}{name}": value.to(device) for name, value in integral.items()},
        start=new_network(settings, tasks, seed).state_dict(),
    )
