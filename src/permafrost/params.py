"""The typed schema of params.yaml: the only place that knows its keys, bounds and defaults.

Whether what it names is there, :mod:`permafrost.names` knows.
"""

import difflib
import reprlib
from collections import Counter
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from ruamel.yaml import YAML

from permafrost.errors import InputError, printable

# The profiles have 3000. The parser takes seconds for much more.
MAX_BYTES = 100_000
MAX_NAME = 200


def shown(value: object) -> str:
    """Return the beginning of a value's text: through aliases, all of it may not fit in memory."""
    try:
        return f"{reprlib.repr(value):.60}"
    except ValueError:
        return "an integer of thousands of digits"


def _unique(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("a value stands twice; list each once")
    return values


def _label(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= MAX_NAME:
        raise ValueError(f"must be 1 to {MAX_NAME} printable characters, not {shown(text)}")
    return text


def _path(text: str) -> str:
    # A file's name has no half of a surrogate pair.
    if not text or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"must be a folder's path, not {shown(text)}")
    return text


# -0.0 would give the training of 0.0 another key.
Number = Annotated[float, AfterValidator(lambda value: value + 0.0)]
Share = Annotated[Number, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


ClassList = Annotated[list[str], Field(min_length=2, max_length=1000)]


Side = Annotated[int, Field(ge=8, le=512)]


class Source(NamedTuple):
    """A data set, and the folder where its images lie."""

    dataset: str
    root: str | None


class TaskOf(_Section):
    """A task of a data set of its own, and how it is trained where not as ``train`` says."""

    dataset: str = "digits"
    root: Annotated[str, AfterValidator(_path)] | None = None
    classes: ClassList
    flip: bool | None = None
    padding: Annotated[int, Field(ge=0, le=64)] | None = None
    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None

    @property
    def source(self) -> Source:
        """Return where its images are from."""
        return Source(self.dataset, self.root)


def _form(tasks: object) -> str:
    return "list" if isinstance(tasks, list) else "count"


# How many tasks, or each with its data set.
Tasks = Annotated[
    Annotated[Annotated[int, Field(ge=2, le=100)], Tag("count")]
    | Annotated[list[TaskOf], Field(min_length=2, max_length=100), Tag("list")],
    Discriminator(_form),
]


class Split(_Section):
    """Which images and classes make up the tasks.

    ``classes`` lists the names of each task's classes; where it does, ``classes_per_task``,
    ``tasks`` and ``selection`` are not read. ``tasks`` may list tasks of several data sets; then
    ``dataset``, ``root``, ``classes_per_task`` and ``selection`` are not read.
    """

    dataset: str = "digits"
    root: Annotated[str, AfterValidator(_path)] | None = None
    image_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] = 32
    classes_per_task: int = Field(5, ge=2, le=1000)
    tasks: Tasks = 2
    classes: Annotated[list[ClassList], Field(min_length=2, max_length=100)] | None = None
    selection: Literal["first", "random"] = "first"
    validation: Number = Field(0.0, ge=0, lt=1)
    test_share: Number = Field(0.25, gt=0, lt=1)

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Return the size of the images, in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def sizes(self) -> list[int]:
        """Return how many classes each task has."""
        if self.named is not None:
            return [len(names) for names in self.named]
        assert isinstance(self.tasks, int)
        return [self.classes_per_task] * self.tasks

    @property
    def named(self) -> list[list[str]] | None:
        """Return the names of each task's classes, where they are given."""
        if isinstance(self.tasks, int):
            return self.classes
        return [task.classes for task in self.tasks]

    @property
    def sources(self) -> list[Source]:
        """Return the data sets, each once, in the order of the tasks."""
        if isinstance(self.tasks, int):
            return [Source(self.dataset, self.root)]
        return list(dict.fromkeys(task.source for task in self.tasks))

    @property
    def roots(self) -> str:
        """Return the folders of the images, for people; empty where there are none."""
        return ", ".join(source.root for source in self.sources if source.root)

    @property
    def datasets(self) -> str:
        """Return the names of the data sets, each once, for people."""
        return ", ".join(dict.fromkeys(source.dataset for source in self.sources))

    @model_validator(mode="after")
    def _classes_stand_once(self) -> "Split":
        if not isinstance(self.tasks, int) and self.classes is not None:
            raise ValueError("classes: split.tasks lists each task's; leave them null")
        if isinstance(self.tasks, int):
            key, names = "classes", [("", name) for task in self.classes or [] for name in task]
        else:  # two data sets may have classes of the same name
            key = "tasks"
            names = [(str(task.source), name) for task in self.tasks for name in task.classes]
        for (_, name), count in Counter(names).items():
            if count > 1:
                raise ValueError(f"{key}: {shown(name)} stands twice; list each class once")
        return self


class Model(_Section):
    """The network."""

    arch: str = "vgg16"
    width: Number = Field(0.25, gt=0, le=4)
    batch_norm: bool = True
    weights: Annotated[str, AfterValidator(_path)] | None = None
    head: str = "shared"


class Train(_Section):
    """How every task is trained."""

    epochs: int = Field(10, ge=1, le=10_000)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Number = Field(1e-3, gt=0, le=10)
    momentum: Number = Field(0.9, ge=0, lt=1)
    weight_decay: Number = Field(0.0, ge=0, le=10)
    batch_size: int = Field(64, ge=2, le=65_536)
    flip: bool = False
    padding: int = Field(4, ge=0, le=64)
    precision: Literal["float32", "tf32", "bfloat16", "auto"] = "float32"


class Saliency(_Section):
    """The maps of what the network looks at, per class."""

    method: str = "fullgrad"
    reading: Literal["layer", "channel"] = "layer"


class Visualize(_Section):
    """The pictures of what each filter looks for."""

    steps: int = Field(30, ge=1, le=10_000)
    lr: Number = Field(0.1, gt=0, le=100)
    weight_decay: Number = Field(1e-6, ge=0, le=10)
    start_seed: int = Field(0, ge=0, le=2**31)
    starts: int = Field(1, ge=1, le=100)
    jitter: int = Field(0, ge=0, le=64)
    pictures: Literal["maximised", "natural"] = "maximised"
    heat_map: Literal["change", "intensity", "max"] = "change"


class Rank(_Section):
    """How filters are scored and ordered."""

    metrics: Annotated[list[str], AfterValidator(_unique), Field(min_length=1)] = [
        "mse",
        "pearson",
        "random",
        "magnitude",
    ]
    aggregate: str = "union"
    reverse: bool = False


class Stability(_Section):
    """Of which criteria it is measured how far their rankings can be trusted."""

    metrics: Annotated[list[str], AfterValidator(_unique)] = []


class Freeze(_Section):
    """The variant: which filters stay frozen."""

    metric: str = "mse"
    pct: Share = 0.25
    batch_norm: Literal["full", "affine", "none"] = "full"


class Consolidate(_Section):
    """How much methods keep of each task."""

    fisher_images: int = Field(500, ge=1, le=10_000_000)
    buffer_images: int = Field(50, ge=1, le=10_000_000)


def _hyper(value: object) -> float | str:
    """Return a hyperparameter: a finite number, or a word."""
    if isinstance(value, str):
        return _label(value)
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            return value + 0.0
    except OverflowError:
        pass
    raise ValueError(f"must be a finite number or a word, not {shown(value)}")


Hyper = Annotated[
    float | str, PlainValidator(_hyper), WithJsonSchema({"type": ["number", "string"]})
]
Grid = Annotated[
    list[dict[str, Hyper]],
    Field(min_length=1, max_length=1000),
]


# What is tried for each method; a single entry is taken as it is, none is the method's default.
Tune = dict[str, Grid]


class Sweep(_Section):
    """The runs that are compared."""

    strategies: Annotated[
        list[str],
        AfterValidator(_unique),
        Field(min_length=1),
    ] = ["finetune", "freeze", "linear_probe", "joint"]
    metrics: Annotated[list[str], AfterValidator(_unique)] = ["mse"]
    pcts: Annotated[list[Share], AfterValidator(_unique)] = [0.25, 0.5, 0.75]
    heads: Annotated[list[str], AfterValidator(_unique), Field(min_length=1)] = ["shared"]
    twins: bool = False
    joint_seeds: Annotated[int, Field(ge=1)] | None = None
    workers: int = Field(2, ge=1, le=256)


class Runtime(_Section):
    """Where and with how many threads it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(1, ge=1, le=1024)


class Params(_Section):
    """All of params.yaml."""

    profile: Annotated[str, AfterValidator(_label)] = "custom"
    seeds: Annotated[
        list[Annotated[int, Field(ge=0, le=2**31)]], AfterValidator(_unique), Field(min_length=1)
    ] = [0, 1, 2]
    split: Split = Split()
    model: Model = Model()
    train: Train = Train()
    saliency: Saliency = Saliency()
    visualize: Visualize = Visualize()
    rank: Rank = Rank()
    stability: Stability = Stability()
    freeze: Freeze = Freeze()
    consolidate: Consolidate = Consolidate()
    tune: Tune = {}
    sweep: Sweep = Sweep()
    runtime: Runtime = Runtime()

    def epochs(self, task: int) -> int:
        """Return for how many epochs a task is trained."""
        listed = [] if isinstance(self.split.tasks, int) else self.split.tasks
        return (listed[task].epochs if listed else None) or self.train.epochs

    def joint_epochs(self, passes: float) -> int:
        """Return for how many epochs all tasks are trained at once."""
        epochs = [self.epochs(task) for task in range(len(self.split.sizes))]
        return round(passes * sum(epochs) / len(epochs))

    @model_validator(mode="after")
    def _network_and_images_fit(self) -> "Params":
        for key in ("rank", "stability"):
            if "bn_gamma" in getattr(self, key).metrics and not self.model.batch_norm:
                raise ValueError(f"{key}.metrics: bn_gamma needs model.batch_norm: true")
        side = min(self.split.height_and_width)
        listed = enumerate([] if isinstance(self.split.tasks, int) else self.split.tasks)
        paddings = {f"split.tasks.{place}.padding": task.padding or 0 for place, task in listed}
        for key, padding in ({"train.padding": self.train.padding} | paddings).items():
            if padding >= side:
                raise ValueError(
                    f"{key}: with {padding} a crop can miss the image; allowed: "
                    f"less than split.image_size, {side}"
                )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> "Params":
        if len(set(self.split.sizes)) > 1 and "shared" in [self.model.head, *self.sweep.heads]:
            raise ValueError(
                "split.classes: tasks of unequal size cannot be answered by one head; allowed for "
                "model.head and sweep.heads: multi, expanding"
            )
        return self

    @model_validator(mode="after")
    def _precision_fits(self) -> "Params":
        if self.train.precision == "tf32" and self.runtime.device == "cpu":
            raise ValueError(
                "train.precision: tf32 needs a GPU; allowed on a CPU: float32, bfloat16, auto"
            )
        return self

    @model_validator(mode="after")
    def _trials_are_fair(self) -> "Params":
        tried = {
            name: len(grid)
            for name, grid in self.tune.items()
            if len(grid) > 1 and name in {"freeze", *self.sweep.strategies}
        }
        if len(set(tried.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in tried.items())
            raise ValueError(f"tune: every method must have as many trials, not {counts}")
        if tried and self.split.validation == 0:
            raise ValueError(
                "tune: trials are measured on validation images; set split.validation above 0 or "
                "give each method a single entry"
            )
        return self


_SECTIONS = {name for name, section in Params() if isinstance(section, _Section)} | {"tune"}


def load_params(path: Path) -> Params:
    """Read and validate params.yaml.

    Raises
    ------
    InputError
        One line that names the key, what was wrong and what is allowed.
    """
    try:
        # DVC's parser, encoding and version of YAML, so that both read the same values (1e-3 is a
        # number).
        values = YAML(typ="safe", pure=True).load(_read(path).decode())
    except InputError:
        raise
    except Exception as error:  # bad YAML makes the parser raise almost anything
        raise InputError(f"{path}: is no valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold sections such as `freeze:`, not {shown(values)}")
    return validate_params(values, path.name)


def validate_params(values: dict[str, Any], source: str) -> Params:
    """Validate the sections of parameters; raise as :func:`load_params`."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error)}") from None


def _read(path: Path) -> bytes:
    try:
        # A pipe would be waited for.
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no regular file; allowed: the file of the parameters")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        if (path.parent / "profiles").is_dir():
            advice = "write the file with `permafrost profile demo`"
        else:
            advice = "run the command in the folder of a cloned project"
        raise InputError(f"{path}: not found; {advice}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {_one_line(error)}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: is too large; allowed: {MAX_BYTES} bytes")
    return content


def _explain(error: ValidationError) -> str:
    """Put pydantic's first finding into one line."""
    first = error.errors(include_url=False)[0]
    place = first["loc"]
    if place[:2] == ("split", "tasks"):  # behind it pydantic names the form that it takes them for
        place = (*place[:2], *place[3:])
    key = ".".join(shown_key(part) for part in place)
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_suggest(place)}"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    # A section's own check names the key within the section.
    within = first["type"] == "value_error" and key in _SECTIONS
    text = f"{key}{'.' if within else ': '}{message}" if key else message
    return _one_line(text if first["type"] == "value_error" else f"{text}, not {shown(given)}")


def shown_key(part: int | str) -> str:
    """Return a part of a key with escapes: a letter that only looks like the right one is seen."""
    return str(part)[:MAX_NAME].encode("unicode_escape").decode()


def _suggest(location: tuple[int | str, ...]) -> str:
    section: Any = Params
    for part in location[:-1]:
        if part == "tasks":
            section = TaskOf
            break
        section = section.model_fields[part].annotation
    return advise(str(location[-1]), section.model_fields)


def advise(name: str, known: Iterable[str]) -> str:
    """Return the known name that a wrong one is close to, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"


def _one_line(error: object) -> str:
    return printable(str(error))[:500]
