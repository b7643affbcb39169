"""Stage train_first: train the network on the first task."""

from permafrost.artifacts import file_digest, write_atomically
from permafrost.errors import InputError
from permafrost.experiment import train_first_task
from permafrost.stages.shared import FIRST, FIRST_RECORDS, INTEGRALS, TASKS, progress_bar, seed_file
from permafrost.stages.workspace import open_workspace, publish_run
from permafrost.tensors import load_tasks
from permafrost.training import TrainingDiverged


def run(seed: int) -> None:
    """Write the weights and the results of one seed's first task.

    Raises
    ------
    InputError
        If the training diverges; names the step and the learning rate.
    """
    with open_workspace("train_first", seed) as workspace:
        params, path = workspace.params, seed_file(TASKS, seed)
        with progress_bar(f"first task, seed {seed}", params.epochs(0)) as advance:
            try:
                record = train_first_task(
                    workspace.store,
                    params,
                    seed,
                    load_tasks(path),
                    file_digest(path),
                    workspace.device,
                    lambda _: advance(1),
                )
            except TrainingDiverged as error:
                raise InputError(f"train: {error}; set a lower learning rate") from error
        publish_run(
            workspace.store,
            record,
            seed_file(FIRST, seed),
            seed_file(FIRST_RECORDS, seed, ".json"),
        )
        kept = workspace.store.kept_path(record["key"]).read_bytes()
        write_atomically(seed_file(INTEGRALS, seed), kept)
        workspace.tell_unlogged(record)
        accuracy = record["row"]["acc_task1"]
        print(f"first task, seed {seed}: {accuracy:.1%} of the test images are right")
