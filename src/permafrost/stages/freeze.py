"""Stage freeze: the variant's frozen filters."""

from permafrost.artifacts import save_record
from permafrost.shares import first_filters
from permafrost.stages.shared import FROZEN, open_stage, read_orders, seed_file


def run(seed: int) -> None:
    """Write which filters of each layer stay frozen while the second task is learned."""
    with open_stage("freeze", seed) as params:
        metric, pct = params.freeze.metric, params.freeze.pct
        layers = {
            name: {"filters": len(order), "frozen": first_filters(order, pct)}
            for name, order in read_orders(seed, metric).items()
        }
        save_record(
            seed_file(FROZEN, seed, ".json"), {"metric": metric, "pct": pct, "layers": layers}
        )
