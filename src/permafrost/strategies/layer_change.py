"""Freeze whole layers, chosen by how much their activation maps change on a trial of the next task.

Two methods that differ in which layers they freeze: see :class:`CriticalLayer` and
:class:`FragileLayer`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from permafrost.evaluation.drift import response_drift
from permafrost.explain import conv_layers
from permafrost.freezing import frozen_filters, plain_copy
from permafrost.models import TaskNetwork
from permafrost.strategies.base import Guard, Lesson, Memory, Phase, Strategy

TRIAL = "trial"


@dataclass(frozen=True)
class LayerChange(Strategy):
    """Fine-tune on trial, measure each layer's change, go back, and learn with layers frozen.

    The change is the relative change of the convolution's output (:func:`response_drift`, mean over
    its filters) on the training images of the task learned last. The trial costs as many epochs as
    the task itself.
    """

    remark: ClassVar[str] = "trains twice"

    def frozen_layers(self, changes: list[float]) -> list[int]:
        """Return which layers to freeze.

        Parameters
        ----------
        changes : list of float
            Of each convolution, from the input on.
        """
        raise NotImplementedError

    def phases(self, lesson: Lesson) -> list[Phase]:
        """Try, then learn."""
        epochs = lesson.epochs(lesson.learned)
        return [Phase(lesson.learned, epochs, TRIAL), Phase(lesson.learned, epochs)]

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold the chosen layers, with their BatchNorms."""
        chosen = {} if phase.name == TRIAL else lesson.memory
        with frozen_filters(lesson.network, chosen):
            yield Guard()

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Choose the layers after the trial, and undo it."""
        del guard
        if phase.name != TRIAL:
            return lesson.memory
        after = cast(TaskNetwork, plain_copy(lesson.network))
        lesson.network.load_state_dict(lesson.start)
        layers = {name: layer.out_channels for name, layer in conv_layers(lesson.network).items()}
        last = lesson.learned - 1
        drift = response_drift(
            lesson.network.view(lesson.head, last, lesson.learned + 1),
            after.view(lesson.head, last, lesson.learned + 1),
            lesson.batches(last),
            list(layers),
        )
        names = list(layers)
        frozen = self.frozen_layers([drift[name].mean().item() for name in names])
        return {names[i]: torch.ones(layers[names[i]], dtype=torch.bool) for i in frozen}

    def frozen(self, network: TaskNetwork, memory: Memory) -> dict[str, Tensor]:
        """Return the filters of the chosen layers."""
        del network
        return memory
