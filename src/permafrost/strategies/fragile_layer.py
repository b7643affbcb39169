"""Freeze the layers that change most (Nguyen et al. 2020)."""

from dataclasses import dataclass
from typing import ClassVar

from permafrost.hyper import Allowed
from permafrost.strategies.base import strategy
from permafrost.strategies.layer_change import LayerChange


@strategy("fragile_layer")
@dataclass(frozen=True)
class FragileLayer(LayerChange):
    """Freeze the layers whose activation maps change most.

    After Nguyen et al., "Dissecting catastrophic forgetting in continual learning by deep
    visualization"; they compare segmented maps, this the maps themselves.

    Attributes
    ----------
    layers : float
        Share of the convolutions that is frozen, 0..1.
    """

    layers: float = 0.5

    hyper: ClassVar[dict[str, Allowed]] = {"layers": (0, 1)}

    def frozen_layers(self, changes: list[float]) -> list[int]:
        """Return the most changed layers, in network order; the first of equals."""
        ranked = sorted(range(len(changes)), key=lambda layer: -changes[layer])
        return sorted(ranked[: round(self.layers * len(changes))])
