"""What the tests share: one thread, and tasks, networks and strategies that train in a moment."""

import copy
import enum
import gc
import importlib
import itertools
import re
import signal
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from lessons import RANKING
from permafrost import registry
from permafrost.data import LabeledImages, Normalization, Task, TaskSequence
from permafrost.models import build_network
from permafrost.runs.store import RunStore
from permafrost.strategies import (
    INTEGRAL,
    Afc,
    AfcRanked,
    Circuit,
    CircuitLwf,
    CriticalLayer,
    Edges,
    Ewc,
    Finetune,
    FragileLayer,
    Freeze,
    FreezeEwc,
    FreezeLwf,
    Guard,
    Joint,
    Keep,
    Learner,
    Lesson,
    LinearProbe,
    Lwf,
    Lwm,
    PackNet,
    PathIntegral,
    Progress,
    Replay,
    Rnf,
    Rows,
    Rrr,
    Si,
    Soft,
    SoftLwf,
    common_parameters,
)
from project import Project

WORKFLOWS = {"project", "undisturbed", "before_sweep"}  # fixtures that have run a whole one
LONGEST = (
    *("test_kill.py", "test_disk.py", "test_clone.py", "test_pipeline.py", "test_stages.py"),
    *("test_three_tasks.py", "test_extend.py", "test_unequal_tasks.py"),
)

PLAIN = str | bytes | float | int | complex | re.Pattern | enum.Enum  # has a name of its own


def pytest_addoption(parser):
    """Add the long form of the table of networks."""
    parser.addoption("--networks", action="store_true", help="measure all networks' table anew")


def pytest_collection_modifyitems(items):
    """Begin with the longest files, so that no worker is left alone with one at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    for item in items:
        if WORKFLOWS & set(item.fixturenames):
            item.add_marker("workflow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_make_parametrize_id(val):
    """Call a list, a dict and the like in a test's name by what they hold, not by a number."""
    if val is None or hasattr(val, "__name__") or isinstance(val, PLAIN):
        return None  # pytest has a name
    text = in_words(val).encode("unicode_escape").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def in_words(value):
    if value is None or isinstance(value, PLAIN):
        return str(value)
    if isinstance(value, dict):
        return ",".join(f"{name}={in_words(part)}" for name, part in value.items()) or "empty"
    if isinstance(value, list | tuple | set):
        words = [in_words(part) for part in value]
        return ",".join(sorted(words) if isinstance(value, set) else words) or "empty"
    if isinstance(value, torch.dtype | torch.memory_format):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.Tensor):
        return f"{in_words(value.dtype)} {'x'.join(map(str, value.shape))}"
    if isinstance(value, BaseException):
        return f"{type(value).__name__} {value}".rstrip()
    return getattr(value, "__name__", type(value).__name__)


def pytest_sessionfinish():
    """Collect at the end what commands that were called in this process froze."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a copy of the project whose workflow has run."""
    project = Project(tmp_path_factory.mktemp("project") / "permafrost")
    project.run("dvc", "repro")
    return project


@pytest.fixture
def one_run_for_each_training(project):
    """After the test, MLflow must hold one finished run for each training."""
    yield
    assert project.runs() == project.expected_runs()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks gain nothing from threads, and sums must not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_signals():
    """A stage's command, called in a test's own process, leaves Ctrl-C to pytest."""
    heard = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in heard}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make_part(patterns, per_class, generator):
    count = len(patterns) * per_class
    labels = torch.arange(len(patterns)).repeat_interleave(per_class)
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=generator)
    images = (patterns[labels] + noise).clamp(0, 255).to(torch.uint8)
    return LabeledImages(images, labels)


def sizes(classes, tasks):
    """Return how many classes each task has: of one number so many each."""
    return classes if isinstance(classes, list) else [classes] * tasks


@pytest.fixture
def make_sequence():
    """Return a builder of tasks: every class is a coarse random pattern under noise."""

    def build(tasks=2, classes=2, train=4, test=3, seed=0, validation=0):
        generator = torch.Generator().manual_seed(seed)
        built = []
        for task, count in enumerate(sizes(classes, tasks)):
            coarse = torch.rand(count, 3, 4, 4, generator=generator)
            patterns = (coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) * 195).long()
            built.append(
                Task(
                    tuple(f"class {index} of task {task}" for index in range(count)),
                    make_part(patterns, train, generator),
                    make_part(patterns, validation, generator),
                    make_part(patterns, test, generator),
                )
            )
        return TaskSequence(tuple(built), Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))

    return build


@pytest.fixture
def make_network():
    """Return a builder of small networks, of two classes per task by default."""

    def build(arch="vgg11", width=0.05, batch_norm=True, tasks=2, seed=0, classes=2):
        return build_network(
            arch,
            width=width,
            batch_norm=batch_norm,
            classes=sizes(classes, tasks),
            seed=seed,
        )

    return build


@pytest.fixture
def same_bits():
    """Return a check that two state dicts hold the same names and the same bits."""

    def check(left, right):
        return list(left) == list(right) and all(
            torch.equal(left[name], right[name]) for name in left
        )

    return check


@pytest.fixture
def half_masks():
    """Return a source of masks that freeze every other filter of each layer.

    It takes a network too, in the place of a lesson.
    """

    def choose(lesson, frozen=None):
        network = getattr(lesson, "network", lesson)
        return {
            name: torch.arange(layer.out_channels) % 2 == 0
            for name, layer in network.named_modules()
            if isinstance(layer, torch.nn.Conv2d)
        }

    return choose


@pytest.fixture
def make_strategy(half_masks):
    """Return a builder of strategies by name; ``masks`` is for those that freeze filters."""

    def build(name, head, masks=half_masks):
        circuit = Circuit(head, 0.3, relearn=2, ranking=RANKING)
        return {
            "finetune": lambda: Finetune(head),
            "freeze": lambda: Freeze(head, masks),
            "linear_probe": lambda: LinearProbe(head),
            "joint": lambda: Joint(head),
            "ewc": lambda: Ewc(head, 30.0),
            "si": lambda: Si(head, 0.5),
            "packnet": lambda: PackNet(head, 0.4),
            "lwf": lambda: Lwf(head, 0.7, 2.0),
            "critical_layer": lambda: CriticalLayer(head),
            "fragile_layer": lambda: FragileLayer(head, 0.4),
            "replay": lambda: Replay(head),
            "rrr": lambda: Rrr(head, 10.0),
            "lwm": lambda: Lwm(head, 0.7, 2.0, 0.5),
            "afc": lambda: Afc(head, 0.7, 2.0, 0.5),
            "afc_ranked": lambda: AfcRanked(head, 0.7, 2.0, 0.5, ranking=RANKING),
            "freeze_ewc": lambda: FreezeEwc(head, Freeze(head, masks), Ewc(head, 30.0)),
            "freeze_lwf": lambda: FreezeLwf(head, Freeze(head, masks), Lwf(head, 0.7, 2.0)),
            "rows": lambda: Rows(head, 0.3, ranking=RANKING),
            "rnf": lambda: Rnf(head, 0.3),
            "edges": lambda: Edges(head, share=0.3),
            "soft": lambda: Soft(head, 0.5, ranking=RANKING),
            "circuit": lambda: circuit,
            "circuit_lwf": lambda: CircuitLwf(head, circuit, Lwf(head, 0.7, 2.0)),
            "soft_lwf": lambda: SoftLwf(head, Soft(head, ranking=RANKING), Lwf(head, 0.7, 2.0)),
        }[name]()

    return build


@pytest.fixture
def keep():
    """Return how much is kept of each task: less than there is."""
    return Keep(fisher_images=5, buffer_images=3)


@pytest.fixture
def learn_first(keep):
    """Return a function that learns the first task, plainly, by the first head.

    It returns what a strategy keeps of it.
    """

    def learn(network, sequence, config, strategy):
        device, start = torch.device("cpu"), copy.deepcopy(network.state_dict())
        integral = PathIntegral(common_parameters(network, "shared", 1))

        class Recorder(Finetune):
            def while_learning_first(self, lesson):
                return nullcontext(Guard(observer=integral))

        first = replace(sequence, tasks=sequence.tasks[:1])
        learner = Learner(first, config, head="shared", seed=0, device=device)
        learner.learn_task(network, Recorder("shared"), Progress(0, []))
        make = type(strategy).knowledge
        if make is None:
            return {}
        memory = {f"{INTEGRAL}{name}": value for name, value in integral.tensors.items()}
        lesson = Lesson(
            network, 0, sequence, config, "shared", 0, device, keep, memory=memory, start=start
        )
        return make(lesson)

    return learn


class FakeTracker:
    """Notes what MLflow would be told."""

    def __init__(self):
        self.runs = []
        self.written = []

    @contextmanager
    def live(self, record):
        run = FakeRun(record)
        self.runs.append(run)
        yield run

    def write(self, record):
        self.written.append(record)


class FakeRun:
    def __init__(self, record):
        self.record, self.steps, self.result = record, [], None

    def log(self, rows):
        self.steps += [row["step"] for row in rows]

    def finish(self, record):
        self.result = record


@pytest.fixture
def make_store(tmp_path, monkeypatch):
    """Return a builder of stores that tell no MLflow."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PERMAFROST_FRESH", raising=False)

    def build(name="project"):
        store = RunStore(tmp_path / name)
        store.tracker = FakeTracker()
        return store

    return build


@pytest.fixture
def store(make_store):
    """Return a store that tells no MLflow."""
    return make_store()


_count = itertools.count()


@pytest.fixture
def write_own(tmp_path, monkeypatch):
    """Return a function that writes a file of the user's own and returns its module's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "custom").mkdir()

    def write(text):
        name = f"own{next(_count)}"
        (tmp_path / "custom" / f"{name}.py").write_text(text)
        monkeypatch.setattr(registry, "_snapshots", {})  # as in a new process
        importlib.invalidate_caches()
        return f"custom.{name}"

    return write
