"""The typed schema of params.yaml: the only place that knows its keys, bounds and defaults."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from permafrost.data import DATASETS
from permafrost.errors import InputError
from permafrost.explain import SALIENCY_METHODS
from permafrost.models import ARCHITECTURES, HEADS
from permafrost.ranking import AGGREGATES, check_criterion
from permafrost.strategies import STRATEGIES


def _one_of(*allowed: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"{value!r} is unknown; allowed: {', '.join(allowed)}")
        return value

    return AfterValidator(check)


def _criterion(name: str) -> str:
    try:
        check_criterion(name)
    except InputError as error:
        raise ValueError(str(error)) from error
    return name


def _unique(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("a value stands twice; list each once")
    return values


Criterion = Annotated[str, AfterValidator(_criterion)]
Share = Annotated[float, Field(ge=0, le=1)]
HeadName = Annotated[str, _one_of(*HEADS)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Split(_Section):
    """Which images and classes make up the tasks."""

    dataset: Annotated[str, _one_of(*DATASETS)] = "digits"
    root: str | None = None
    image_size: int = Field(32, ge=32, le=512)
    classes_per_task: int = Field(5, ge=2, le=1000)
    tasks: int = Field(2, ge=2, le=100)
    selection: Literal["first", "random"] = "first"
    validation: float = Field(0.0, ge=0, lt=1)
    test_share: float = Field(0.25, gt=0, lt=1)

    @model_validator(mode="after")
    def _root_is_given(self) -> "Split":
        if self.dataset != "digits" and self.root is None:
            raise ValueError(
                f"root: dataset {self.dataset!r} needs the folder where its images lie"
            )
        return self


class Model(_Section):
    """The network."""

    arch: Annotated[str, _one_of(*ARCHITECTURES)] = "vgg16"
    width: float = Field(0.25, gt=0, le=4)
    batch_norm: bool = True
    head: HeadName = "shared"


class Train(_Section):
    """How every task is trained."""

    epochs: int = Field(10, ge=1, le=10_000)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(1e-3, gt=0, le=10)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, le=10)
    batch_size: int = Field(64, ge=2, le=65_536)
    flip: bool = False
    padding: int = Field(4, ge=0, le=64)
    precision: Literal["float32", "bfloat16", "auto"] = "float32"


class Saliency(_Section):
    """The maps of what the network looks at, per class."""

    method: Annotated[str, _one_of(*SALIENCY_METHODS)] = "fullgrad"
    reading: Literal["layer", "channel"] = "layer"


class Visualize(_Section):
    """The pictures of what each filter looks for."""

    steps: int = Field(30, ge=1, le=10_000)
    lr: float = Field(0.1, gt=0, le=100)
    weight_decay: float = Field(1e-6, ge=0, le=10)
    start_seed: int = Field(0, ge=0, le=2**31)
    heat_map: Literal["change", "intensity", "max"] = "change"


class Rank(_Section):
    """How filters are scored and ordered."""

    metrics: Annotated[list[Criterion], AfterValidator(_unique), Field(min_length=1)] = [
        "mse",
        "pearson",
        "random",
        "magnitude",
    ]
    aggregate: Annotated[str, _one_of(*AGGREGATES)] = "union"
    reverse: bool = False


class Freeze(_Section):
    """The variant: which filters stay frozen."""

    metric: str = "mse"
    pct: Share = 0.25
    batch_norm: Literal["full", "affine", "none"] = "full"


class Consolidate(_Section):
    """How much methods keep of each task."""

    fisher_images: int = Field(500, ge=1, le=10_000_000)
    buffer_images: int = Field(50, ge=1, le=10_000_000)


Grid = Annotated[list[dict[str, float]], Field(min_length=1, max_length=1000)]


class Tune(_Section):
    """What is tried for each method; a single entry is taken as it is."""

    freeze: Grid = [{"pct": 0.5}]
    ewc: Grid = [{"strength": 100.0}]
    si: Grid = [{"strength": 1.0}]
    lwf: Grid = [{"weight": 1.0, "temperature": 2.0}]
    packnet: Grid = [{"prune": 0.5}]
    fragile_layer: Grid = [{"layers": 0.5}]
    freeze_ewc: Grid = [{"strength": 100.0}]
    freeze_lwf: Grid = [{"weight": 1.0, "temperature": 2.0}]

    @model_validator(mode="after")
    def _entries_fit_their_methods(self) -> "Tune":
        for name, grid in self:
            bounds = STRATEGIES[name].hyper
            for entry in grid:
                if entry.keys() != bounds.keys():
                    raise ValueError(f"{name}: {entry} must name exactly {', '.join(bounds)}")
                for key, (low, high) in bounds.items():
                    if not low <= entry[key] <= high:
                        raise ValueError(f"{name}: {key} must lie in {low:g}..{high:g}")
        return self


class Sweep(_Section):
    """The cells that are compared."""

    strategies: Annotated[
        list[Annotated[str, _one_of(*STRATEGIES)]], AfterValidator(_unique), Field(min_length=1)
    ] = ["finetune", "freeze", "linear_probe", "joint"]
    metrics: Annotated[list[str], AfterValidator(_unique)] = ["mse"]
    pcts: Annotated[list[Share], AfterValidator(_unique)] = [0.25, 0.5, 0.75]
    heads: Annotated[list[HeadName], AfterValidator(_unique), Field(min_length=1)] = ["shared"]
    workers: int = Field(2, ge=1, le=256)


class Runtime(_Section):
    """Where and with how many threads it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(1, ge=1, le=1024)


class Params(_Section):
    """All of params.yaml."""

    profile: str = "custom"
    seeds: Annotated[
        list[Annotated[int, Field(ge=0, le=2**31)]], AfterValidator(_unique), Field(min_length=1)
    ] = [0, 1, 2]
    split: Split = Split()
    model: Model = Model()
    train: Train = Train()
    saliency: Saliency = Saliency()
    visualize: Visualize = Visualize()
    rank: Rank = Rank()
    freeze: Freeze = Freeze()
    consolidate: Consolidate = Consolidate()
    tune: Tune = Tune()
    sweep: Sweep = Sweep()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _metrics_are_ranked(self) -> "Params":
        ranked = self.rank.metrics
        for key, metric in [("freeze.metric", self.freeze.metric)] + [
            ("sweep.metrics", metric) for metric in self.sweep.metrics
        ]:
            if metric not in ranked:
                raise ValueError(
                    f"{key}: {metric!r} is not ranked; allowed: what rank.metrics lists "
                    f"({', '.join(ranked)})"
                )
        if "freeze" in self.sweep.strategies and not self.sweep.metrics:
            raise ValueError("sweep: the strategy freeze needs at least one of sweep.metrics")
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> "Params":
        if "packnet" in self.sweep.strategies and "expanding" in self.sweep.heads:
            raise ValueError(
                "sweep.strategies: packnet needs to know an image's task, which the head expanding "
                "does not tell; allowed: shared, multi"
            )
        tried = {
            name: len(grid)
            for name, grid in self.tune
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


def load_params(path: Path) -> Params:
    """Read and validate params.yaml.

    Raises
    ------
    InputError
        One line that names the key, what was wrong and what is allowed.
    """
    try:
        # DVC's parser and version of YAML, so that both read the same values (1e-3 is a number).
        values = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; run the command in a clone of the project, or write the file "
            "with `permafrost profile demo`"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {_one_line(error)}") from None
    except (YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold sections such as `freeze:`, not {values!r:.40}")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path.name}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """Put pydantic's first finding into one line."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_suggest(first['loc'])}"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    # A section's own check names the key within the section.
    within = first["type"] == "value_error" and key in Params.model_fields and key != "seeds"
    text = f"{key}{'.' if within else ': '}{message}" if key else message
    return _one_line(text if first["type"] == "value_error" else f"{text}, not {given!r:.60}")


def _suggest(location: tuple[int | str, ...]) -> str:
    section: Any = Params
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]
