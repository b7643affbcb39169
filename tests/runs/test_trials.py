"""Trials: one training each, measured on validation images, blind to test images."""

import dataclasses

import torch

from permafrost.artifacts import file_digest
from permafrost.experiment import train_run
from permafrost.runs.outcome import Outcome
from permafrost.runs.store import RunRequest
from small_runs import CPU, FINETUNE, FREEZE, MASKS, make_params


def test_a_trial_is_measured_on_validation_images(store, inputs):
    validation = inputs.on_validation()
    assert (inputs.kind, validation.kind) == ("cell", "trial")
    for mine, theirs in zip(inputs.tasks.tasks, validation.tasks.tasks, strict=True):
        assert torch.equal(theirs.test.images, mine.validation.images)
        assert torch.equal(theirs.test.labels, mine.validation.labels)
        assert torch.equal(theirs.train.images, mine.train.images)
    run = train_run(store, make_params(), FINETUNE, inputs, None, CPU)
    trial = train_run(store, make_params(), FINETUNE, validation, None, CPU)
    assert (run["kind"], trial["kind"]) == ("cell", "trial")
    assert run["key"] != trial["key"]
    runs = [run.result for run in store.tracker.runs]
    assert [run.experiment for run in runs] == ["permafrost", "permafrost-trials"]
    assert [run.tags["kind"] for run in runs] == ["cell", "trial"]
    assert all(torch.__version__.startswith(run.tags["machine.torch"]) for run in runs)
    told = {f"machine.{name}" for name in ("libraries", "cpu", "gpu", "threads", "determinism")}
    assert all(told <= run.tags.keys() for run in runs)
    # One training, measured on other images.
    files = [file_digest(store.model_path(record["key"])) for record in (run, trial)]
    assert files[0] == files[1]
    losses = [[row["train_loss"] for row in r["history"]] for r in (run, trial)]
    assert losses[0] == losses[1]
    assert {count for entry in trial["R"][2] for count in entry["count"]} == {2}
    assert train_run(store, make_params(), FINETUNE, validation, None, CPU) == trial
    assert len(store.tracker.runs) == 2


def test_a_trial_never_sees_the_test_images(store, inputs):
    """Without any, the same comes out."""
    validation = inputs.on_validation()
    tasks = tuple(dataclasses.replace(task, test=task.validation) for task in inputs.tasks.tasks)
    poor = dataclasses.replace(inputs, tasks=dataclasses.replace(inputs.tasks, tasks=tasks))
    one = train_run(store, make_params(), FREEZE, validation, MASKS, CPU)
    other = train_run(store, make_params(), FREEZE, poor.on_validation(), MASKS, CPU)
    assert one == other
    everything = store.obtain(
        RunRequest("cell", "poor", {}, {}, ()),
        lambda progress, on_epoch: Outcome(
            train_run(Through(), make_params(), FREEZE, poor, MASKS, CPU), {}, 0.0
        ),
    )
    assert everything["row"]["R"] == one["row"]["R"]
    assert everything["drift"] == one["drift"]


class Through:
    """Trains at once and stores nothing."""

    def obtain(self, request, train, on_epoch):
        return train(None, lambda progress: None).facts
