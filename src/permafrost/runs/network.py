"""The network that a run trains."""

from permafrost.data import TaskSequence
from permafrost.models import TaskNetwork, build_network
from permafrost.runs.spec import Settings


def new_network(settings: Settings, tasks: TaskSequence, seed: int) -> TaskNetwork:
    """Build the untrained network of a seed."""
    return build_network(
        settings.arch,
        classes=[len(task.classes) for task in tasks.tasks],
        seed=seed,
        image_size=tasks.image_size,
        width=settings.width,
        batch_norm=settings.batch_norm,
        weights=settings.weights,
    )
