"""Counts of right answers, which accuracies are made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy on one task.

    Attributes
    ----------
    correct : tuple of int
        How many images of each of the task's C classes are classified correctly; of equal logits
        the first counts.
    count : tuple of int
        How many images each class has.
    """

    correct: tuple[int, ...]
    count: tuple[int, ...]

    @property
    def overall(self) -> float:
        """Return the share of all images that are classified correctly, 0..1."""
        return sum(self.correct) / sum(self.count)

    @property
    def per_class(self) -> tuple[float, ...]:
        """Return the same for each class; 0 for a class without images."""
        pairs = zip(self.correct, self.count, strict=True)
        return tuple(correct / max(count, 1) for correct, count in pairs)


def accuracy_name(task: int) -> str:
    """Return what the accuracy on a task, 0 .. T - 1, is called in rows and curves."""
    return f"acc_task{task + 1}"
