"""params.yaml: what is accepted, and the one line that refuses the rest."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from permafrost.errors import InputError
from permafrost.hyper import is_allowed, is_word
from permafrost.names import load_checked
from permafrost.params import Params
from permafrost.strategies import STRATEGIES

PROFILES = sorted((Path(__file__).parents[1] / "profiles").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """Return a function that reads params from text or bytes."""

    def load(content):
        path = tmp_path / "params.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_checked(path)

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
    wanted = {"demo", "paper", "photos", "sequence", "split-digits"}
    assert wanted <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_says_what_is_loaded(path):
    params, written = load_checked(path), plain(path)
    assert params.model_dump() == written
    assert params.profile == path.stem


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_key_of_the_schema_stands_in_every_profile(path):
    tuned = {name: [made.defaults()] for name, made in STRATEGIES.items() if made.hyper}
    assert keys(plain(path)) == keys(Params(tune=tuned).model_dump())


def test_the_paper_profile_is_the_posts_protocol():
    params = load_checked(next(path for path in PROFILES if path.stem == "paper"))
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
    params = load_checked(next(path for path in PROFILES if path.stem == "demo"))
    assert (params.split.dataset, params.split.classes_per_task) == ("digits", 5)
    assert not params.train.flip


def test_classes_by_name_decide_the_tasks_and_their_sizes(load):
    split = load("split: {classes: [[a, b], [c, d]], tasks: 7, selection: random}").split
    assert split.sizes == [2, 2]
    unequal = "split: {classes: [[a, b, c], [d, e, f, g, h], [i, j]]}"
    heads = "model: {head: multi}, sweep: {heads: [expanding]}"
    assert load(f"{{{unequal}, {heads}}}").split.sizes == [3, 5, 2]
    assert load("split: {classes_per_task: 4, tasks: 3}").split.sizes == [4, 4, 4]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1E-3", 0.001), ("1.0e-3", 0.001), ("1", 1.0)]
)
def test_numbers(load, text, value):
    lr = load(f"train: {{lr: {text}}}").train.lr
    assert lr == value
    assert type(lr) is float


def test_a_whole_share_is_the_same_number_however_it_is_written(load):
    """Else one run would have two keys."""
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
    "lr 0": ("train: {lr: 0}", ["train.lr:", "greater than 0", "not 0"]),
    "no epochs": ("train: {epochs: 0}", ["train.epochs:", "greater than or equal to 1"]),
    "momentum 1": ("train: {momentum: 1}", ["train.momentum:", "less than 1"]),
    "batches of one": ("train: {batch_size: 1}", ["train.batch_size:", "or equal to 2"]),
    "width 0": ("model: {width: 0}", ["model.width:", "greater than 0"]),
    "one class": ("split: {classes_per_task: 1}", ["split.classes_per_task:", "or equal to 2"]),
    "one task of named classes": (
        "split: {classes: [[a, b]]}",
        ["split.classes:", "at least 2 items"],
    ),
    "one class in a task": (
        "split: {classes: [[a, b], [c]]}",
        ["split.classes.1:", "at least 2 items"],
    ),
    "a class in two tasks": (
        "split: {classes: [[a, b], [c, a]]}",
        ["split.classes:", "'a' stands twice", "once"],
    ),
    "a number for a class": (
        "split: {classes: [[0, 1], [2, 3]]}",
        ["split.classes.0.0:", "valid string", "not 0"],
    ),
    "unequal tasks under the variant's shared head": (
        "{split: {classes: [[a, b], [c, d, e]]}, sweep: {heads: [multi]}}",
        ["split.classes:", "unequal", "model.head", "multi, expanding"],
    ),
    "unequal tasks under a shared head of the sweep": (
        "{split: {classes: [[a, b], [c, d, e]]}, model: {head: multi}}",
        ["split.classes:", "unequal", "sweep.heads", "multi, expanding"],
    ),
    "one task": ("split: {tasks: 1}", ["split.tasks:", "or equal to 2"]),
    "validation 1": ("split: {validation: 1}", ["split.validation:", "less than 1"]),
    "small images": ("split: {image_size: 7}", ["split.image_size", "or equal to 8"]),
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
        "rank: {metrics: ['no_such_module:f', mse]}",
        ["rank.metrics.0:", "no_such_module"],
    ),
    "unknown arch": ("model: {arch: vgg12}", ["model.arch:", "'vgg12'", "vgg11, vgg13, vgg16"]),
    "unknown head": ("model: {head: two}", ["model.head:", "'two'", "shared, multi, expanding"]),
    "unknown strategy": (
        "sweep: {strategies: [ewcc]}",
        ["sweep.strategies.0:", "'ewcc'", "finetune"],
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
    "freeze without metrics": (
        "sweep: {metrics: []}",
        ["sweep:", "freeze", "one of sweep.metrics"],
    ),
    "no images for Fisher": (
        "consolidate: {fisher_images: 0}",
        ["consolidate.fisher_images:", "greater than or equal to 1", "not 0"],
    ),
    "an empty buffer": (
        "consolidate: {buffer_images: 0}",
        ["consolidate.buffer_images:", "greater than or equal to 1", "not 0"],
    ),
    "half an image": ("consolidate: {buffer_images: 1.5}", ["consolidate.buffer_images:", "1.5"]),
    "unknown method": ("tune: {ewcc: [{strength: 1}]}", ["tune.ewcc:", "did you mean ewc?"]),
    "a method that has nothing to tune": ("tune: {replay: [{}]}", ["tune.replay:", "has no"]),
    "nothing to try": ("tune: {ewc: []}", ["tune.ewc:", "at least 1"]),
    "one trial that is no list": ("tune: {ewc: {strength: 1}}", ["tune.ewc:", "list"]),
    "a trial that is a number": ("tune: {ewc: [1]}", ["tune.ewc.0:", "dictionary", "not 1"]),
    "a trial's word": (
        "tune: {ewc: [{strength: big}]}",
        ["tune.ewc:", "strength must lie in", "not 'big'"],
    ),
    "a trial's bool": ("tune: {ewc: [{strength: true}]}", ["tune.ewc.0.strength:", "not True"]),
    "a trial's nan": ("tune: {ewc: [{strength: .nan}]}", ["tune.ewc.0.strength:", "finite"]),
    "a trial's inf": ("tune: {si: [{strength: .inf}]}", ["tune.si.0.strength:", "finite"]),
    "an empty trial": ("tune: {ewc: [{}]}", ["tune.ewc:", "must name exactly strength"]),
    "another method's key": (
        "tune: {packnet: [{pct: 0.5}]}",
        ["tune.packnet:", "'pct'", "must name exactly prune"],
    ),
    "a key too few": (
        "tune: {lwf: [{weight: 1}]}",
        ["tune.lwf:", "must name exactly weight, temperature"],
    ),
    "a key too many": (
        "tune: {freeze: [{pct: 0.5, metric: 1}]}",
        ["tune.freeze:", "must name exactly pct"],
    ),
    "a bad second trial": (
        "{split: {validation: 0.1}, tune: {freeze: [{pct: 0.5}, {prune: 0.5}]}}",
        ["tune.freeze:", "'prune'", "must name exactly pct"],
    ),
    "a trial's pct too high": ("tune: {freeze: [{pct: 1.01}]}", ["tune.freeze: pct", "0..1"]),
    "a trial's pct too low": ("tune: {freeze: [{pct: -0.01}]}", ["tune.freeze: pct", "0..1"]),
    "prune too much": ("tune: {packnet: [{prune: 1.01}]}", ["tune.packnet: prune", "0..1"]),
    "prune too little": ("tune: {packnet: [{prune: -0.01}]}", ["tune.packnet: prune", "0..1"]),
    "layers too many": ("tune: {fragile_layer: [{layers: 2}]}", ["tune.fragile_layer: layers"]),
    "a negative strength": ("tune: {ewc: [{strength: -1}]}", ["tune.ewc: strength", "0..1e+12"]),
    "a negative c": ("tune: {si: [{strength: -1}]}", ["tune.si: strength", "0..1e+12"]),
    "a huge strength": (
        "tune: {freeze_ewc: [{strength: 1.0e+13}]}",
        ["tune.freeze_ewc: strength", "0..1e+12"],
    ),
    "temperature 0": (
        "tune: {lwf: [{weight: 1, temperature: 0}]}",
        ["tune.lwf: temperature", "0.01..1000"],
    ),
    "a negative weight": (
        "tune: {freeze_lwf: [{weight: -1, temperature: 2}]}",
        ["tune.freeze_lwf: weight", "0..1e+06"],
    ),
    "unequal numbers of trials": (
        "{split: {validation: 0.1}, sweep: {strategies: [freeze, ewc, si]}, "
        "tune: {freeze: [{pct: 0}, {pct: 1}], ewc: [{strength: 1}, {strength: 2}, {strength: 3}]}}",
        ["tune:", "as many trials", "freeze 2", "ewc 3"],
    ),
    "unequal, and freeze is not compared": (
        "{split: {validation: 0.1}, sweep: {strategies: [ewc]}, "
        "tune: {freeze: [{pct: 0}, {pct: 1}], ewc: [{strength: 1}, {strength: 2}, {strength: 3}]}}",
        ["tune:", "as many trials", "freeze 2", "ewc 3"],
    ),
    "trials without validation images": (
        "tune: {freeze: [{pct: 0.5}, {pct: 0.75}]}",
        ["tune:", "validation images", "split.validation above 0", "single entry"],
    ),
    "packnet without the task's identity": (
        "sweep: {strategies: [packnet], heads: [shared, expanding]}",
        ["sweep.strategies:", "packnet", "expanding", "allowed: shared, multi"],
    ),
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


def test_a_section_that_is_gone(load):
    with pytest.raises(InputError, match=r"report: unknown key"):
        load("report: {pct: 0.5}")


def test_the_least_and_the_greatest_value_may_be_tried(load):
    for name, strategy in STRATEGIES.items():
        if strategy.hyper:
            for end in (0, 1):
                entry = {
                    key: allowed[end] if is_word(allowed) else float(allowed[end])
                    for key, allowed in strategy.hyper.items()
                }
                params = load(f"tune: {{{name}: [{entry}]}}")
                assert params.tune[name] == [entry]


def test_the_defaults_of_hyperparameters_are_allowed():
    for made in STRATEGIES.values():
        assert made.defaults().keys() == made.hyper.keys()
        for name, allowed in made.hyper.items():
            assert is_allowed(made.defaults()[name], allowed)


def test_trials(load):
    tried = "freeze: [{pct: 0}, {pct: 1}], ewc: [{strength: 1}, {strength: 2}], si: [{strength: 9}]"
    other = "lwf: [{weight: 1, temperature: 1}, {weight: 1, temperature: 2}]"
    sweep = "sweep: {strategies: [finetune, ewc, si]}"  # lwf is not compared, si is taken as it is
    params = load(
        f"{{split: {{validation: 0.1}}, {sweep}, tune: {{{tried}, {other}, "
        "packnet: [{prune: 0.1}, {prune: 0.2}, {prune: 0.3}]}}"
    )
    assert params.tune["freeze"] == [{"pct": 0.0}, {"pct": 1.0}]
    assert params.tune["si"] == [{"strength": 9.0}]
    assert all(type(entry["pct"]) is float for entry in params.tune["freeze"])
    # Trials that nobody asks for need no validation images.
    assert load("tune: {ewc: [{strength: 1}, {strength: 2}]}").split.validation == 0


def test_a_sweep_of_the_chosen_share_alone(load):
    assert load("sweep: {pcts: []}").sweep.pcts == []


@pytest.mark.parametrize("heads", ["shared", "multi", "shared, multi"])
def test_packnet_where_the_task_is_known(load, heads):
    assert load(f"sweep: {{strategies: [packnet], heads: [{heads}]}}").sweep.strategies == [
        "packnet"
    ]
    assert load("{sweep: {strategies: [packnet]}, model: {head: expanding}}")  # the variant's


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"params\.yaml: not found; .*cloned project") as caught:
        load_checked(tmp_path / "params.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_in_the_files_place(tmp_path):
    with pytest.raises(InputError):
        load_checked(tmp_path)


def test_a_root_makes_image_folder_valid(load):
    params = load("split: {dataset: image_folder, root: photos}")
    assert params.split.root == "photos"


OWN = """
from permafrost.explain import saliency_method
from permafrost.ranking import map_metric, weights_criterion

@map_metric(higher_is_better=True)
def score(filter_maps, class_maps):
    return filter_maps.flatten(1) @ class_maps.flatten(1).T

@weights_criterion
def peak(evidence):
    return {name: weight.flatten(1).amax(1, True) for name, weight in evidence.weights.items()}

@saliency_method
def brightness(model, images, targets):
    return images.mean(1)

def plain(images):
    return images
"""


def test_users_own_criteria_and_saliency_methods(load, write_own):
    own = write_own(OWN)
    ranked = f"rank: {{metrics: [mse, '{own}:score', '{own}:peak']}}"
    used = f"freeze: {{metric: '{own}:peak'}}, sweep: {{metrics: ['{own}:score']}}"
    params = load(f"{{{ranked}, {used}, saliency: {{method: '{own}:brightness'}}}}")
    assert params.rank.metrics[1:] == [f"{own}:score", f"{own}:peak"]
    assert params.saliency.method == f"{own}:brightness"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("rank: {metrics: [mse, 'OWN:other']}", "custom.own.* has no 'other'"),
        ("rank: {metrics: [mse, 'OWN:plain']}", "is none; decorate it with map_metric.*network_"),
        ("rank: {metrics: [mse, 'OWN:brightness']}", "is none; decorate it with map_metric"),
        ("saliency: {method: 'OWN:plain'}", "is none; decorate it with saliency_method"),
        ("saliency: {method: 'OWN:score'}", "is none; decorate it with saliency_method"),
    ],
)
def test_what_of_users_own_is_refused(load, write_own, section, message):
    with pytest.raises(InputError, match=message) as caught:
        load(section.replace("OWN", write_own(OWN)))
    assert str(caught.value).startswith(f"params.yaml: {section.partition(':')[0]}.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["os;rm:f", "custom/x:f", "a b", "", ":f", "custom.x:f()"])
def test_names_that_no_module_has(load, name):
    with pytest.raises(InputError, match=r"is no criterion; allowed: .*mse.*, or module:Name"):
        load(f"rank: {{metrics: [mse, '{name}']}}")
    with pytest.raises(InputError, match=r"is no saliency method; allowed: .*fullgrad"):
        load(f"saliency: {{method: '{name}'}}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit", r"cannot be imported \(SystemExit"),
        ("raise RuntimeError('two\\nlines')", r"cannot be imported \(RuntimeError: two lines"),
        ("def broken(", r"cannot be imported \(SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported(load, write_own, text, message):
    with pytest.raises(InputError, match=message) as caught:
        load(f"rank: {{metrics: [mse, '{write_own(text)}:score']}}")
    assert "\n" not in str(caught.value)


def test_a_module_outside_of_custom_is_refused(load, write_own, tmp_path):
    write_own("")
    (tmp_path / "own_metric_of_a_test.py").write_text(OWN)
    with pytest.raises(InputError, match=r"neither in custom/ nor installed: move it to custom/"):
        load("rank: {metrics: [mse, 'own_metric_of_a_test:score']}")


def test_images_may_be_rectangles():
    assert Params(split={"image_size": [28, 40]}).split.height_and_width == (28, 40)
    assert Params(split={"image_size": 28}).split.height_and_width == (28, 28)
    with pytest.raises(ValueError, match=r"train\.padding: .* less than split\.image_size, 28"):
        Params(split={"image_size": [40, 28]}, train={"padding": 28})


def test_two_data_sets_may_have_classes_of_the_same_name(load):
    mine = "{dataset: image_folder, root: data/digits, classes: ['0', '1']}"
    split = load(f"split: {{tasks: [{{classes: ['0', '1']}}, {mine}]}}").split
    assert split.sizes == [2, 2]


def test_tasks_of_several_data_sets(load):
    photos = "{dataset: image_folder, root: data/photos, classes: [a, b, c]}"
    digits = "{dataset: digits, classes: ['0', '1'], flip: false, padding: 0}"
    others = photos.replace("a, b, c", "d, e")
    split = f"split: {{tasks: [{photos}, {digits}, {others}]}}"
    split = load(f"{split}\nmodel: {{head: multi}}\nsweep: {{heads: [multi]}}").split
    assert split.sizes == [3, 2, 2]
    assert split.sources == [("image_folder", "data/photos"), ("digits", None)]
    assert split.tasks[1].flip is False
    listed = [{"classes": ["0", "1"]}, {"classes": ["2", "3"], "epochs": 3}]
    params = Params(split={"tasks": listed})
    assert [params.epochs(task) for task in (0, 1)] == [10, 3]
    assert (params.joint_epochs(1), params.joint_epochs(2)) == (6, 13)  # of 10 and 3
    assert (Params().epochs(1), Params().joint_epochs(2)) == (10, 20)
    assert split.tasks[0].flip is None


LISTED = {
    "one task": ("tasks: [{classes: [a, b]}]", ["split.tasks:", "at least 2"]),
    "no classes": ("tasks: [{}, {classes: [a, b]}]", ["split.tasks.0.classes:", "required"]),
    "another key": (
        "tasks: [{classes: [a, b], flop: true}, {classes: [c, d]}]",
        ["split.tasks.0.flop: unknown key; did you mean flip?"],
    ),
    "a class twice": (
        "tasks: [{classes: [a, b]}, {classes: [a, c]}]",
        ["split.tasks: 'a' stands twice"],
    ),
    "classes besides": (
        "classes: [[a, b], [c, d]], tasks: [{classes: [a, b]}, {classes: [c, d]}]",
        ["split.classes:", "leave them null"],
    ),
    "a wide crop": (
        "tasks: [{classes: [a, b]}, {classes: [c, d], padding: 32}]",
        ["split.tasks.1.padding: with 32"],
    ),
    "no folder": (
        "tasks: [{classes: [a, b]}, {dataset: image_folder, classes: [c, d]}]",
        ["split.tasks.1.root:", "needs the folder"],
    ),
    "no data set": (
        "tasks: [{classes: [a, b]}, {dataset: digit, classes: [c, d]}]",
        ["split.tasks.1.dataset:", "'digit'"],
    ),
    "a word": ("tasks: many", ["split.tasks:", "not 'many'"]),
    "one": ("tasks: 1", ["split.tasks:", "2", "not 1"]),
}


@pytest.mark.parametrize(("text", "fragments"), LISTED.values(), ids=LISTED)
def test_bad_lists_of_tasks(load, text, fragments):
    with pytest.raises(InputError) as caught:
        load(f"split: {{{text}}}")
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
