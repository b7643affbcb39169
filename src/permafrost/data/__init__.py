"""Data sets, their split into tasks, and batches that live on the device."""

from permafrost.data.batches import Batches, normalize
from permafrost.data.datasets import DATASETS, dataset, load_dataset
from permafrost.data.from_python import load_image, tasks_from_dataset, tasks_from_tensors
from permafrost.data.images import ImageDataset, LabeledImages, resize
from permafrost.data.tasks import (
    Normalization,
    Task,
    TaskFrom,
    TaskSequence,
    split_tasks,
    tasks_of,
)

__all__ = [
    "DATASETS",
    "Batches",
    "ImageDataset",
    "LabeledImages",
    "Normalization",
    "Task",
    "TaskFrom",
    "TaskSequence",
    "dataset",
    "load_dataset",
    "load_image",
    "normalize",
    "resize",
    "split_tasks",
    "tasks_from_dataset",
    "tasks_from_tensors",
    "tasks_of",
]
