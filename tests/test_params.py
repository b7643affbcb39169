"""params.yaml: what is accepted, and the one line that refuses the rest."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from permafrost.errors import InputError
from permafrost.params import Params, load_params

PROFILES = sorted((Path(__file__).parents[1] / "profiles").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """Return a function that reads params from text or bytes."""

    def load(content):
        path = tmp_path / "params.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_params(path)

    return load


def plain(path):
    return YAML(typ="safe", pure=True).load(path)


def keys(values):
    """List the keys of all sections."""
    return {
        name: sorted(value) if isinstance(value, dict) else None for name, value in values.items()
    }


def test_the_defaults_are_valid():
    params = Params()
    assert Params.model_validate(params.model_dump()) == params
    assert params.split.dataset == "digits"
    assert params.freeze.pct == 0.25
    assert params.model.head == "shared"
    assert (params.train.lr, params.train.momentum, params.train.batch_size) == (1e-3, 0.9, 64)
    assert (params.train.epochs, params.split.tasks, params.freeze.batch_norm) == (10, 2, "full")
    assert (params.visualize.steps, params.visualize.lr) == (30, 0.1)
    assert params.visualize.weight_decay == 1e-6


def test_there_are_profiles():
    assert {"demo", "paper", "photos"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_says_what_is_loaded(path):
    params, written = load_params(path), plain(path)
    assert params.model_dump() == written
    assert params.profile == path.stem


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_key_of_the_schema_stands_in_every_profile(path):
    assert keys(plain(path)) == keys(Params().model_dump())


def test_the_paper_profile_is_the_seeds_protocol():
    params = load_params(next(path for path in PROFILES if path.stem == "paper"))
    split, model, train = params.split, params.model, params.train
    assert (split.dataset, split.classes_per_task, split.tasks) == ("cifar100", 10, 2)
    assert split.selection == "first"
    assert (model.arch, model.width) == ("vgg16", 1)
    assert (train.optimizer, train.lr, train.epochs, train.weight_decay) == ("sgd", 1e-3, 10, 0)
    assert params.sweep.heads == ["shared", "multi"]
    assert params.freeze.metric == "mse"
    assert set(params.sweep.pcts) == {0.25, 0.5, 0.75}
    assert {"mse", "pearson", "random"} <= set(params.sweep.metrics)
    assert {"finetune", "freeze", "joint"} <= set(params.sweep.strategies)


def test_the_demo_profile_needs_nothing():
    params = load_params(next(path for path in PROFILES if path.stem == "demo"))
    assert (params.split.dataset, params.split.classes_per_task) == ("digits", 5)
    assert not params.train.flip


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1E-3", 0.001), ("1.0e-3", 0.001), ("1", 1.0)]
)
def test_numbers(load, text, value):
    lr = load(f"train: {{lr: {text}}}").train.lr
    assert lr == value
    assert type(lr) is float


def test_a_whole_share_is_the_same_number_however_it_is_written(load):
    """Else one cell would have two keys."""
    one, other = load("freeze: {pct: 1}"), load("freeze: {pct: 1.0}")
    assert repr(one.model_dump()) == repr(other.model_dump())


def test_what_is_left_out_has_its_default(load):
    assert load("train: {epochs: 3}") == Params(train={"epochs": 3})
    assert load("train: {epochs: 3}").train.lr == 1e-3


def test_params_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Params().train.lr = 1.0


# Each with what the line must name: the key, what was wrong, what is allowed.
BAD = {
    "unknown section": ("freze: {pct: 0.5}", ["freze:", "unknown", "did you mean freeze?"]),
    "unknown key": ("freeze: {metrics: mse}", ["freeze.metrics:", "did you mean metric?"]),
    "far from any key": ("train: {zzz: 1}", ["train.zzz:", "unknown", "allowed: epochs, opt"]),
    "far from any section": ("zzz: 1", ["zzz:", "unknown", "allowed:", "split, model, train"]),
    "string for a number": ("train: {lr: '0.1'}", ["train.lr:", "number", "not '0.1'"]),
    "word for a number": ("train: {lr: fast}", ["train.lr:", "number", "not 'fast'"]),
    "bool for a number": ("train: {lr: true}", ["train.lr:", "number", "not True"]),
    "bool for an integer": ("train: {epochs: true}", ["train.epochs:", "integer", "not True"]),
    "fraction for an integer": ("train: {epochs: 1.5}", ["train.epochs:", "integer", "1.5"]),
    "number for a bool": ("train: {flip: 1}", ["train.flip:", "boolean", "not 1"]),
    "number for a name": ("freeze: {metric: 3}", ["freeze.metric:", "string", "not 3"]),
    "pct too high": ("freeze: {pct: 1.5}", ["freeze.pct:", "less than or equal to 1", "1.5"]),
    "pct too low": ("freeze: {pct: -0.1}", ["freeze.pct:", "greater than or equal to 0", "-0.1"]),
    "a pct of the sweep": ("sweep: {pcts: [0.5, 2]}", ["sweep.pcts.1:", "or equal to 1", "2"]),
    "pct of the report": ("report: {pct: 7}", ["report.pct:", "less than or equal to 1", "7"]),
    "lr 0": ("train: {lr: 0}", ["train.lr:", "greater than 0", "not 0"]),
    "no epochs": ("train: {epochs: 0}", ["train.epochs:", "greater than or equal to 1"]),
    "momentum 1": ("train: {momentum: 1}", ["train.momentum:", "less than 1"]),
    "batches of one": ("train: {batch_size: 1}", ["train.batch_size:", "or equal to 2"]),
    "width 0": ("model: {width: 0}", ["model.width:", "greater than 0"]),
    "one class": ("split: {classes_per_task: 1}", ["split.classes_per_task:", "or equal to 2"]),
    "one task": ("split: {tasks: 1}", ["split.tasks:", "or equal to 2"]),
    "validation 1": ("split: {validation: 1}", ["split.validation:", "less than 1"]),
    "small images": ("split: {image_size: 31}", ["split.image_size:", "or equal to 32"]),
    "nan": ("train: {lr: .nan}", ["train.lr:", "finite"]),
    "inf": ("train: {weight_decay: .inf}", ["train.weight_decay:", "finite"]),
    "unknown metric": ("rank: {metrics: [mse, foo]}", ["rank.metrics.1:", "'foo'", "pearson"]),
    "variant's metric not ranked": (
        "{rank: {metrics: [mse]}, sweep: {metrics: [mse]}, freeze: {metric: ssim}}",
        ["freeze.metric:", "'ssim' is not ranked", "rank.metrics", "(mse)"],
    ),
    "sweep's metric not ranked": (
        "sweep: {metrics: [mse, js]}",
        ["sweep.metrics:", "'js' is not ranked", "mse, pearson, random, magnitude"],
    ),
    "own metric that is nowhere": (
        "rank: {metrics: ['no_such_module:f']}",
        ["rank.metrics.0:", "no_such_module"],
    ),
    "unknown arch": ("model: {arch: vgg12}", ["model.arch:", "'vgg12'", "vgg11, vgg13, vgg16"]),
    "unknown head": ("model: {head: two}", ["model.head:", "'two'", "shared, multi, expanding"]),
    "unknown strategy": (
        "sweep: {strategies: [ewcc]}",
        ["sweep.strategies.0:", "'ewcc'", "finetune, freeze"],
    ),
    "unknown dataset": ("split: {dataset: mnist}", ["split.dataset:", "'mnist'", "digits"]),
    "unknown aggregate": ("rank: {aggregate: sum}", ["rank.aggregate:", "'sum'", "union"]),
    "unknown optimizer": ("train: {optimizer: lion}", ["train.optimizer:", "'lion'", "'adamw'"]),
    "unknown device": ("runtime: {device: tpu}", ["runtime.device:", "'tpu'", "'cuda'"]),
    "unknown batch_norm": ("freeze: {batch_norm: on}", ["freeze.batch_norm:", "'affine'", "on"]),
    "a seed twice": ("seeds: [0, 1, 0]", ["seeds:", "twice", "once"]),
    "a pct twice": ("sweep: {pcts: [1, 1.0]}", ["sweep.pcts:", "twice"]),
    "no seeds": ("seeds: []", ["seeds:", "at least 1"]),
    "a negative seed": ("seeds: [-1]", ["seeds.0:", "greater than or equal to 0", "-1"]),
    "seeds that are no list": ("seeds: 3", ["seeds:", "list", "not 3"]),
    "no metrics": ("rank: {metrics: []}", ["rank.metrics:", "at least 1"]),
    "no heads": ("sweep: {heads: []}", ["sweep.heads:", "at least 1"]),
    "freeze without pcts": ("sweep: {pcts: []}", ["sweep", "sweep.pcts", "at least one"]),
    "a section that is a number": ("train: 3", ["train:", "not 3"]),
    "an empty section": ("train:", ["train:", "dictionary"]),
    "a list": ("- train", ["sections", "['train']"]),
    "a word": ("train", ["sections", "'train'"]),
    "an empty file": ("", ["sections", "None"]),
    "a comment": ("# nothing\n", ["sections", "None"]),
    "a number as a key": ("1: 2", ["1:", "string"]),
    "bad YAML": ("train: [1,\nmodel: {", ["no valid YAML", "line"]),
    "a tab": ("train:\n\tlr: 1", ["no valid YAML", "line 2"]),
    "a key twice": ("train: {lr: 1, lr: 2}", ["no valid YAML", "duplicate key", "lr"]),
    "a section twice": ("train: {lr: 1}\ntrain: {}\n", ["no valid YAML", "duplicate key", "train"]),
    "two documents": ("seeds: [0]\n---\nseeds: [1]\n", ["no valid YAML", "single document"]),
    "an object": ("!!python/object:os.system {}", ["no valid YAML", "python/object"]),
    "binary": (bytes(range(256)), ["no valid YAML"]),
    "zeros": (bytes(100), ["no valid YAML"]),
    "latin-1": ("profile: größe".encode("latin-1"), ["no valid YAML"]),
    "no folder of images": (
        "split: {dataset: image_folder}",
        ["split", "root", "'image_folder'", "needs the folder"],
    ),
    "no folder of CIFAR": ("split: {dataset: cifar100}", ["split", "root", "'cifar100'"]),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_refused_in_one_line(load, name):
    content, fragments = BAD[name]
    with pytest.raises(InputError) as caught:
        load(content)
    message = str(caught.value)
    for fragment in ["params.yaml: ", *fragments]:
        assert fragment in message
    assert len(message.splitlines()) == 1
    assert len(message) < 700


def test_a_missing_file(tmp_path):
    with pytest.raises(
        InputError, match=r"params\.yaml: not found; .*permafrost profile"
    ) as caught:
        load_params(tmp_path / "params.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_in_the_files_place(tmp_path):
    with pytest.raises(InputError):
        load_params(tmp_path)


def test_a_root_makes_image_folder_valid(load):
    params = load("split: {dataset: image_folder, root: photos}")
    assert params.split.root == "photos"


def test_a_users_own_metric(load, tmp_path, monkeypatch):
    (tmp_path / "own_metric_of_a_test.py").write_text(
        "from permafrost.ranking import map_metric\n\n\n"
        "@map_metric(higher_is_better=True)\n"
        "def score(filter_maps, class_maps):\n"
        "    return filter_maps.flatten(1) @ class_maps.flatten(1).T\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    params = load("rank: {metrics: [mse, pearson, 'own_metric_of_a_test:score']}")
    assert params.rank.metrics[-1] == "own_metric_of_a_test:score"
