"""Stage freeze: the variant's frozen filters."""

from permafrost.artifacts import save_record
from permafrost.ranking import filters_of
from permafrost.ranking.method import frozen_masks
from permafrost.stages.workspace import FROZEN, open_stage, seed_file


def run(seed: int) -> None:
    """Write which filters of each layer stay frozen while the second task is learned."""
    with open_stage("freeze", seed) as workspace:
        freeze = workspace.params.freeze
        masks = frozen_masks(workspace.orders(seed, freeze.metric), freeze.pct)
        layers = {
            name: {"filters": len(mask), "frozen": filters_of(mask)} for name, mask in masks.items()
        }
        save_record(
            seed_file(FROZEN, seed, ".json"),
            {"metric": freeze.metric, "pct": freeze.pct, "layers": layers},
        )
