"""Tasks learned from Python: the same bits as the workflow's runs, and what is refused."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

import permafrost
from permafrost.artifacts import save_record
from permafrost.data import Batches
from permafrost.errors import InputError
from permafrost.experiment import (
    RunInputs,
    knowledge_name,
    new_network,
    run_settings,
    train_first_task,
    train_run,
)
from permafrost.first_weights import FirstWeights
from permafrost.ranking.method import frozen_masks, rank_network
from permafrost.runs.knowledge import first_lesson
from permafrost.runs.spec import RunSpec
from permafrost.strategies import STRATEGIES
from permafrost.tensors import load_tensors, save_tensors
from permafrost.training import TrainingDiverged
from project import REPOSITORY
from small_data import put
from small_runs import CPU, make_params

SHORT = permafrost.TrainingConfig(epochs=2, lr=0.01, batch_size=4)
SMALL = {"network": "vgg11", "width": 0.05, "training": SHORT}


def learn(tasks, **settings):
    return permafrost.learn(tasks, **SMALL | settings)


def workflow_row(store, tasks, spec, folder):
    """Return a run's row as the stages make it, each from what the one before has stored."""
    params = make_params(model={"head": spec.head})
    first = train_first_task(store, params, 0, tasks, "tasks", CPU)
    weights, _ = load_tensors(store.model_path(first["key"]))
    integral, _ = load_tensors(store.kept_path(first["key"]))
    network = new_network(params, 0)
    network.load_state_dict(weights)
    masks = None
    if spec.metric:
        view, norm = network.view("shared", 0, 1), tasks.normalization
        batches, config = Batches(tasks.tasks[0].train, norm, CPU), permafrost.ExplainConfig()
        orders = rank_network(view, batches, 2, norm, spec.metric, config, 0)
        masks = frozen_masks(orders, spec.pct)
    made = STRATEGIES[spec.strategy]

    def read_knowledge():
        settings = run_settings(params, FirstWeights(), CPU)
        lesson = first_lesson(settings, 0, tasks, network, integral, CPU)
        name = knowledge_name(made)
        known = {f"{name}/{entry}": value for entry, value in made.knowledge(lesson).items()}
        save_tensors(folder / "known", known)
        return load_tensors(folder / "known")[0]

    inputs = RunInputs(tasks, "tasks", weights, "first", read_knowledge)
    record = train_run(store, params, spec, inputs, masks, CPU)
    return record["row"], load_tensors(store.model_path(record["key"]))


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (RunSpec("finetune", 0, "shared"), {}),
        (
            RunSpec("freeze", 0, "multi", "taylor", 0.5),
            {"strategy": "freeze", "criterion": "taylor", "pct": 0.5, "head": "multi"},
        ),
        (
            RunSpec("ewc", 0, "expanding", hyper=(("strength", 3.0),)),
            {"strategy": "ewc", "hyper": {"strength": 3.0}, "head": "expanding"},
        ),
        (
            RunSpec("si", 0, "shared", hyper=(("strength", 0.1),)),
            {"strategy": "si", "hyper": {"strength": 0.1}},
        ),
    ],
    ids=["finetune", "freeze", "ewc", "si"],
)
def test_the_same_bits_as_the_workflows_run(
    store, make_sequence, same_bits, tmp_path, spec, settings
):
    tasks = make_sequence()
    row, (weights, about) = workflow_row(store, tasks, spec, tmp_path)
    result = learn(tasks, **settings)
    assert result.accuracy == row["R"]
    assert result.measures.items() <= row.items()
    assert {"acc_mean", "forgetting", "bwt", "fwt", "acc_task2"} <= result.measures.keys()
    assert same_bits(weights, {name: result.network.state_dict()[name] for name in weights})
    result.save(tmp_path / "saved")
    assert load_tensors(tmp_path / "saved")[1] == about


def test_three_tasks_are_ranked_anew(make_sequence):
    result = learn(make_sequence(tasks=3), strategy="freeze", criterion="magnitude", pct=0.5)
    assert [len(row) for row in result.accuracy] == [3] * 4
    assert 0.2 < result.measures["free_filters"] < 0.35


def test_results_as_tables_of_pandas(make_sequence, tmp_path):
    result = learn(make_sequence(tasks=3), strategy="finetune")
    table = result.frame()
    assert list(table.columns) == ["task 1", "task 2", "task 3"]
    assert table.index.name == "tasks learned"
    assert table.to_numpy().tolist() == result.accuracy
    rows = [{"strategy": "ewc", "hyper": {"strength": 3.0}}, {"strategy": "finetune", "hyper": {}}]
    save_record(tmp_path / "metrics/sweep.json", rows)
    runs = permafrost.read_runs(tmp_path)
    assert runs["strategy"].tolist() == ["ewc", "finetune"]
    assert runs["hyper.strength"].fillna(-1).tolist() == [3.0, -1.0]
    with pytest.raises(InputError, match=r"sweep\.json"):
        permafrost.read_runs(tmp_path / "nowhere")


def test_tasks_of_tensors():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.rand(count, 3, 8, 8, generator=generator) for count in (6, 4))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    levels = (train * 255).round().to(torch.uint8)
    tasks = permafrost.tasks_from_tensors(
        [(train, labels, test, labels[:4]), (levels, labels % 2, levels, labels % 2)]
    )
    first, second = tasks.tasks
    assert torch.equal(first.train.images, levels)
    assert torch.equal(second.test.labels, labels % 2)
    assert [task.classes for task in tasks.tasks] == [("0", "1", "2"), ("3", "4")]
    assert tasks.image_size == (8, 8)
    assert tasks.normalization.mean == pytest.approx((levels / 255).mean((0, 2, 3)).tolist())
    named = permafrost.tasks_from_tensors([(train, labels, test, labels[:4])], [["a", "b", "c"]])
    assert named.tasks[0].classes == ("a", "b", "c")


IMAGES, LABELS = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
GOOD = (IMAGES, LABELS, IMAGES, LABELS)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([], "tasks: there are none"),
        ([GOOD[:3]], "task 1: 3 tensors; wanted: training images,"),
        ([(IMAGES.numpy(), *GOOD[1:])], "task 1, training: ndarray and Tensor; wanted: tensors"),
        (
            [(IMAGES[:, :1], *GOOD[1:])],
            "task 1, training images: shape (4, 1, 8, 8); wanted: (N, 3",
        ),
        ([(*GOOD[:2], IMAGES[:0], LABELS[:0])], "task 1, test images: shape (0, 3, 8, 8)"),
        ([GOOD, (IMAGES.int(), *GOOD[1:])], "task 2, training images: torch.int32; allowed: uint8"),
        ([(IMAGES.float() - 0.1, *GOOD[1:])], "task 1, training images: a value is not in 0..1"),
        ([(IMAGES.float() * torch.nan, *GOOD[1:])], "a value is not in 0..1"),
        (
            [(IMAGES, LABELS.float(), *GOOD[2:])],
            "labels: torch.float32 of shape (4,); wanted: integ",
        ),
        (
            [(IMAGES, LABELS[:3], *GOOD[2:])],
            "torch.int64 of shape (3,); wanted: integers of shape (4,)",
        ),
        ([(IMAGES, LABELS - 1, *GOOD[2:])], "task 1, training labels: -1; allowed: from 0"),
        (
            [(IMAGES, LABELS * 2, *GOOD[2:])],
            "task 1, training labels: a class below 2 has no image",
        ),
        ([(*GOOD[:3], LABELS * 2)], "task 1, test labels: 2 is no class of the training images"),
        ([GOOD, (IMAGES[..., 1:], *GOOD[1:])], "task 2: its images are not all of task 1's size"),
    ],
)
def test_tensors_that_are_no_tasks(tasks, said):
    with pytest.raises(InputError, match=re.escape(said)):
        permafrost.tasks_from_tensors(tasks)


def test_names_that_do_not_fit():
    with pytest.raises(InputError, match=r"classes: names of \[1\] classes; the tasks have \[2\]"):
        permafrost.tasks_from_tensors([GOOD], [["a"]])


def test_an_image_folder(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for name, colour in (("a", "red"), ("b", "green"), ("c", "blue"), ("d", "white")):
            for number in range(count):
                put(tmp_path / part / name / f"{number}.png", Image.new("RGB", (40, 50), colour))
    tasks = permafrost.tasks_from_dataset("image_folder", tmp_path, classes_per_task=2)
    assert [task.classes for task in tasks.tasks] == [("a", "b"), ("c", "d")]
    assert [len(tasks.tasks[0].train), len(tasks.tasks[1].test)] == [6, 4]
    assert learn(tasks).accuracy[2][1] is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network": "none"}, "network 'none' is unknown"),
        ({"strategy": "none"}, "strategy 'none' is unknown"),
        ({"strategy": "freeze"}, "criterion: is None with strategy 'freeze'; wanted: what ranks"),
        ({"criterion": "mse"}, "criterion: is 'mse' with strategy 'finetune'; allowed: None"),
        ({"strategy": "freeze", "criterion": "none"}, "'none' is unknown"),
        ({"strategy": "freeze", "criterion": "mse", "pct": 2}, "pct: is 2; allowed: 0..1"),
        (
            {"strategy": "packnet", "head": "expanding"},
            "head: packnet cannot answer under 'expanding'",
        ),
        ({"strategy": "ewc", "hyper": {"stress": 1}}, "has no 'stress'; allowed: strength"),
        (
            {"strategy": "ewc", "hyper": {"strength": -1}},
            "hyper: strength is -1; allowed: 0..1e+12",
        ),
        (
            {"strategy": "freeze", "criterion": "mse", "hyper": {"pct": 0.5}},
            "hyper: strategy 'freeze' has no 'pct'; allowed: none",
        ),
    ],
)
def test_settings_that_cannot_be_used(make_sequence, settings, said):
    with pytest.raises(InputError, match=re.escape(said)):
        learn(make_sequence(), **settings)


def test_a_training_that_diverges_is_an_error(make_sequence):
    wild = dataclasses.replace(SHORT, lr=1e30)
    with pytest.raises(TrainingDiverged, match="task 1: "):
        learn(make_sequence(), training=wild)
    with pytest.raises(TrainingDiverged, match=r"task 2: .* set a lower learning rate"):
        learn(make_sequence(), strategy="ewc", hyper={"strength": 1e12})


ALONE = """
import sys
import permafrost

assert "torch" not in sys.modules
permafrost.learn, permafrost.load_network, permafrost.tasks_from_tensors, permafrost.Keep
assert "torch" in sys.modules
assert not {"dvc", "mlflow", "pydantic", "permafrost.params"} & sys.modules.keys()
assert set(permafrost.__all__) == set(permafrost._HOMES)
"""


def test_neither_dvc_nor_mlflow_is_imported():
    subprocess.run([sys.executable, "-c", ALONE], check=True)


def test_the_readmes_lines_work_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [(REPOSITORY / name).read_text() for name in ("README.md", "docs/library.md")]
    short, blocks = (re.findall(r"```python\n(.*?)```", text, re.DOTALL) for text in texts)
    assert set(short) <= set(blocks)
    (ten,) = [block for block in blocks if "permafrost.learn(" in block]
    (five,) = [block for block in blocks if "permafrost.load_network(" in block]
    known = {}
    exec(ten.replace("epochs=10", "epochs=1"), known)
    (tmp_path / "models/train_second").mkdir(parents=True)
    known["result"].save("models/train_second/0.safetensors")
    put(tmp_path / "cat.jpg", Image.new("RGB", (30, 40), "white"))
    exec(five, known)
    assert known["network"].classes == ("5", "6", "7", "8", "9")
