"""Stage train_second: learn the further tasks with the variant's filters frozen."""

from torch import Tensor

from permafrost.artifacts import load_record, require
from permafrost.errors import InputError
from permafrost.evaluation import accuracy_name
from permafrost.experiment import train_run
from permafrost.first_weights import weights_path
from permafrost.params import Params
from permafrost.ranking import mask_of
from permafrost.stages.run_pool import run_inputs
from permafrost.stages.shared import FROZEN, SECOND, SECOND_RECORDS, progress_bar, seed_file
from permafrost.stages.workspace import open_workspace, publish_run
from permafrost.variants import variant_spec


def read_masks(seed: int, params: Params) -> dict[str, Tensor]:
    """Read the frozen filters that stage freeze has written."""
    path = seed_file(FROZEN, seed, ".json")
    frozen = load_record(path)
    freeze = params.freeze
    same = frozen.get("metric") == freeze.metric and frozen.get("pct") == freeze.pct
    require(same, path, "is of another variant than params.yaml names")
    layers = frozen["layers"].items()
    return {name: mask_of(layer["frozen"], layer["filters"]) for name, layer in layers}


def run(seed: int) -> None:
    """Write the weights and the results of one seed's variant.

    Raises
    ------
    InputError
        If the training diverges; names the step and the learning rate.
    """
    with open_workspace("train_second", seed) as workspace:
        params = workspace.params
        epochs = sum(map(params.epochs, range(1, len(params.split.sizes))))
        with progress_bar(f"further tasks, seed {seed}", epochs) as advance:
            record = train_run(
                workspace.store,
                params,
                variant_spec(params, seed),
                run_inputs(seed, weights_path(params)),
                read_masks(seed, params),
                workspace.device,
                lambda _: advance(1),
            )
        if record["row"]["status"] == "failed":
            raise InputError(f"train: {record['row']['error']}; set a lower learning rate")
        publish_run(
            workspace.store,
            record,
            seed_file(SECOND, seed),
            seed_file(SECOND_RECORDS, seed, ".json"),
        )
        workspace.tell_unlogged(record)
        row = record["row"]
        shown = ", ".join(
            f"task {task + 1} {row[accuracy_name(task)]:.1%}"
            for task in range(len(params.split.sizes))
        )
        print(f"{record['name']}: {shown}")
