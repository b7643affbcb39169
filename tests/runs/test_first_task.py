"""The first task: trained once for every head, and resumed to the same bits."""

import pytest

from permafrost.artifacts import file_digest
from permafrost.experiment import new_network, train_first_task
from permafrost.runs.rows import row_accuracies
from permafrost.runs.store import with_row
from permafrost.tensors import load_tensors
from small_runs import CPU, as_json, make_params


def test_the_first_task(store, make_sequence):
    params, tasks = make_params(model={"head": "multi"}), make_sequence()
    record = train_first_task(store, params, 0, tasks, "tasks", CPU)
    assert as_json(with_row(store.load(record["key"]))) == as_json(record)
    assert record["kind"] == "first_task"
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert record["row"]["acc_task1"] == row_accuracies(record["R"][1])[0].overall
    # The path integral, which one method needs.
    integral, _ = load_tensors(store.kept_path(record["key"]))
    weights, _ = load_tensors(store.model_path(record["key"]))
    assert set(integral) == {
        name
        for name, _ in new_network(params, 0).named_parameters()
        if not name.startswith("heads.1.")  # the first head serves every task where it is shared
    }
    for name, value in integral.items():
        assert value.shape == weights[name].shape
        assert value.isfinite().all()
        assert value.abs().sum() > 0
    assert store.seconds(record["key"]) > 0
    # One first task serves every head mode.
    shared = train_first_task(store, make_params(), 0, tasks, "tasks", CPU)
    assert shared["key"] == record["key"]
    assert len(store.tracker.runs) == 1


@pytest.mark.parametrize(("optimizer", "last"), [("sgd", 1), ("adam", 2)])
def test_a_killed_first_task_goes_on_to_the_same_bits(make_store, make_sequence, optimizer, last):
    """With the path integral, which is recorded on the way."""
    params, tasks = make_params(train={"optimizer": optimizer}), make_sequence()
    whole, killed = make_store("whole"), make_store("killed")
    record = train_first_task(whole, params, 0, tasks, "tasks", CPU)
    epochs = []

    def kill(progress):
        epochs.append(progress.training.epoch)
        if epochs == list(range(1, last + 1)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_first_task(killed, params, 0, tasks, "tasks", CPU, kill)
    again = train_first_task(killed, params, 0, tasks, "tasks", CPU, kill)
    assert epochs == [1, 2]
    assert as_json(again) == as_json(record)
    for path in ("model_path", "kept_path"):
        files = [getattr(store, path)(record["key"]) for store in (whole, killed)]
        assert file_digest(files[0]) == file_digest(files[1])
