"""Critical freezing (Nguyen et al. 2022): freeze what lies before the layer that forgets most."""

from dataclasses import dataclass

from permafrost.strategies.base import strategy
from permafrost.strategies.layer_change import LayerChange


@strategy("critical_layer")
@dataclass(frozen=True)
class CriticalLayer(LayerChange):
    """Freeze all layers before the one whose activation maps change most.

    The post's account of Nguyen et al., "Explaining how deep neural networks forget by deep
    visualization"; they compare segmented maps, this the maps themselves.
    """

    def frozen_layers(self, changes: list[float]) -> list[int]:
        """Return the layers before the most changed one; the first of equals."""
        return list(range(changes.index(max(changes))))
