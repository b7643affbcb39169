"""The command line: parses, calls, prints."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from permafrost import PARENT, __version__
from permafrost.errors import InputError
from permafrost.imports import require_workflow, uncollected
from permafrost.stopping import stop_if_requested


class _PlainFlags:
    """Help without a type behind options that take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_PlainFlags, TyperCommand):
    pass


class _Group(_PlainFlags, TyperGroup):
    pass


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_command = partial(app.command, cls=_Command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"permafrost {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show it and exit.", callback=_print_version)
    ] = False,
) -> None:
    """Explainability-guided filter freezing against catastrophic forgetting."""


_WIDEST = 110  # characters of a printed table: wider is harder to read
_NO_MEMORY = re.compile("can't allocate memory|out of memory")  # as PyTorch says it

# DVC tells a stage its name, so that dvc.yaml builds no shell command from parameters.
Seed = Annotated[
    str, typer.Option(envvar="DVC_STAGE", help="Which of the seeds, or a stage's name: rank@0.")
]


def _seed(name: str) -> int:
    """Return the seed of a stage such as ``rank@0``, or of an option's ``0``."""
    try:
        return int(name.rpartition("@")[2])
    except ValueError:
        raise InputError(f"--seed: {name!r} is no whole number; allowed: one of seeds") from None


_SEED_STAGES = {
    "split": "Divide the data set's classes among tasks.",
    "train_first": "Train the network on the first task.",
    "saliency": "Map what the network looks at, per class.",
    "visualize": "Picture what each filter looks for.",
    "rank": "Order the filters by how well the two agree.",
    "freeze": "Choose the filters that stay frozen.",
    "consolidate": "Make what the other methods need from the first task.",
    "train_second": "Learn the further tasks.",
}
_STAGES = {
    "evaluate": "Measure what is kept and what is learned.",
    "stability": "Measure how far the rankings can be trusted.",
    "tune": "Choose each method's hyperparameters on validation images.",
    "sweep": "Train every run of the comparison.",
    "report": "Make the tables and plots.",
    "page": "Make the page that shows it all.",
}


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what is no fault of the program into one line and an exit code."""
    try:
        yield
    except InputError as error:
        typer.echo(f"permafrost: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"permafrost: {where}{error.strerror or error}", err=True)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        where = "the GPU" if "CUDA" in str(error) else "this machine"
        lower = "lower train.batch_size, model.width or sweep.workers"
        typer.echo(f"permafrost: {where} has too little free memory for that; {lower}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("permafrost: stopped; what is done so far is kept", err=True)
        raise typer.Exit(130) from None


def _can_ask() -> bool:
    return sys.stdin.isatty()


@contextmanager
def _stage_module(stage: str) -> Iterator[ModuleType]:
    """Import a stage, which a signal or the death of its DVC stops where its loops ask for it."""
    from permafrost.processes import stop_on_signals, stop_with_parent

    with _clear_errors():
        stop_on_signals()
        if "DVC_STAGE" in os.environ:
            stop_with_parent(PARENT)
            _tell_place(os.environ["DVC_STAGE"])
        with uncollected(for_good=True):
            module = import_module(f"permafrost.stages.{stage}")
        stop_if_requested()
        yield module
        stop_if_requested()  # or DVC would begin the next stage


def _tell_place(stage: str) -> None:
    from permafrost.schedule import place

    if where := place(stage):
        typer.echo(where)


def _seed_stage(name: str) -> Callable[..., None]:
    def command(seed: Seed) -> None:
        with _stage_module(name) as module:
            module.run(_seed(seed))

    return command


def _stage(name: str) -> Callable[..., None]:
    def command() -> None:
        with _stage_module(name) as module:
            module.run()

    return command


for _name, _help in _SEED_STAGES.items():
    _command(_name, help=_help, rich_help_panel="Stages")(_seed_stage(_name))
for _name, _help in _STAGES.items():
    _command(_name, help=_help, rich_help_panel="Stages")(_stage(_name))


@_command()
def profile(
    name: Annotated[str | None, typer.Argument(help="Which one; none lists them.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what you have edited.")] = False,
) -> None:
    """Write params.yaml from a ready profile."""
    from permafrost.profiles import is_edited, list_profiles, write_profile

    with _clear_errors():
        if name is None:
            typer.echo(list_profiles())
            return
        if not force and _can_ask() and is_edited():
            typer.confirm("params.yaml has been edited. Overwrite it?", abort=True)
            force = True
        typer.echo(write_profile(name, overwrite=force))


@_command()
def tables() -> None:
    """Print the tables of the last run."""
    from rich.console import Console
    from rich.markdown import Markdown

    from permafrost.stages.shared import TABLES

    with _clear_errors():
        width = shutil.get_terminal_size((_WIDEST, 1)).columns
        console = Console(width=min(width, _WIDEST))
        console.print(Markdown(TABLES.read_text(encoding="utf-8")))


@_command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new one, or one without such files.")],
) -> None:
    """Write the files of a new project into a folder."""
    from permafrost.init import write_project

    with _clear_errors():
        typer.echo(write_project(folder))


@_command()
def check() -> None:
    """Validate params.yaml and the data set before anything is trained."""
    with _clear_errors():
        require_workflow("dvc")
        from permafrost.check import check_all

        typer.echo(check_all())


@_command()
def plan() -> None:
    """Tell how many trainings, minutes and megabytes the whole run will take on this machine."""
    with _clear_errors():
        from permafrost.check import plan_all

        typer.echo(plan_all())


@_command()
def doctor(
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend or delete what is damaged.")
    ] = False,
    notes: Annotated[bool, typer.Option("--notes", help="Look at DVC's notes only.")] = False,
) -> None:
    """Print what could make another machine's results differ, and find what is damaged."""
    with _clear_errors():
        require_workflow("dvc")
        from permafrost.dvc_notes import check_notes
        from permafrost.paths import project_root

        check_notes(project_root(), repair=repair)
        if notes:
            return
        from permafrost.doctor import check_files, describe_machine
        from permafrost.interrupted import check_git

        typer.echo(describe_machine())
        typer.echo(check_files(repair=repair))
        check_git(project_root(), repair=repair)


@_command()
def track(
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Make the runs of where it was moved from its own."),
    ] = False,
) -> None:
    """Bring MLflow up to date: one finished run for each training and variant."""
    with _clear_errors():
        require_workflow("mlflow")
        from permafrost.maintenance import track_all

        typer.echo(track_all(take_over=take_over))


@_command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete stored trainings that no result names, here or in a commit, branch or experiment."""
    with _clear_errors():
        require_workflow("dvc")
        from permafrost.maintenance import delete_runs, describe_runs, unused_runs

        unused = unused_runs()
        for line in describe_runs(unused):
            typer.echo(line)
        question = f"Delete these {len(unused)} trainings, which no result names?"
        if unused and not yes and not typer.confirm(question):
            raise typer.Exit(1)
        typer.echo(delete_runs(unused))


@_command()
def ui(
    port: Annotated[
        int, typer.Option(help="Of the server, on this machine only.", min=1, max=65535)
    ] = 5000,
) -> None:
    """Open MLflow's pages on this project's runs."""
    with _clear_errors():
        require_workflow("mlflow")
        from permafrost.maintenance import serve_ui, track_all

        typer.echo(track_all())
        sys.exit(serve_ui(port))
