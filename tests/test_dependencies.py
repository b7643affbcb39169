"""What dvc.yaml says that a stage depends on, beside what its code can reach."""

import ast
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

from permafrost.explain import SALIENCY_METHODS
from permafrost.ranking import CRITERIA
from permafrost.source import PACKAGE_SOURCES, reached
from permafrost.strategies import STRATEGIES
from project import REPOSITORY, STAGES

SOURCE = REPOSITORY / "src"

# Formats, storage, logging and the schema of parameters: what they pass on is a dependency itself.
# A change of theirs that matters is told by a new name of an output, not by running all anew.
PASSED_ON = {
    "__init__.py",
    "artifacts.py",
    "devices.py",
    "errors.py",
    "first_weights.py",
    "imports.py",
    "jobs.py",
    "machine.py",
    "names.py",
    "params.py",
    "paths.py",
    "processes.py",
    "registry.py",
    "runs/key.py",
    "runs/results.py",
    "runs/store.py",
    "runs/stored.py",
    "shown.py",
    "source.py",
    "stopping.py",
    "tensors.py",
    "tracking",
    "variants.py",
}
# What they need to find their files and to run runs in processes; these follow the calls only.
_PLUMBING = {f"permafrost.stages.{name}" for name in ("shared", "workspace", "run_pool")}


@cache
def _file(module: str) -> Path:
    path = SOURCE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _definitions(module: str) -> tuple[dict[str, list[ast.AST]], dict[str, tuple[str, str]]]:
    """Return a module's own names, each with the code that makes it, and those it imports."""
    own: dict[str, list[ast.AST]] = {}
    tree = ast.parse(_file(module).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.setdefault(node.name, []).append(node)
        elif not isinstance(node, ast.ImportFrom | ast.Import):
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    own.setdefault(name.id, []).append(node)
    imported = {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("permafrost")
        for alias in node.names
    }
    return own, imported


def _short(module: str) -> str:
    return str(_file(module).relative_to(SOURCE / "permafrost"))


def reached_files(stage: str) -> set[str]:
    """Return the files that a stage's ``run`` can reach by names, relative to the package."""
    start = f"permafrost.stages.{stage}"
    # A workspace's methods count where a stage, or what trains its runs, calls them.
    sources = [_file(start), _file("permafrost.stages.run_pool")]
    called = {
        node.attr
        for path in sources
        if path == sources[0] or "run_pool" in sources[0].read_text()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(start, "run")]
    while waiting:
        module, name = waiting.pop()
        short = _short(module)
        if (module, name) in seen or {short, short.split("/")[0]} & PASSED_ON:
            continue
        seen.add((module, name))
        own, imported = _definitions(module)
        if name not in own:
            if name in imported:  # passed on by a package
                waiting.append(imported[name])
            elif (_file(f"{module}.{name}")).exists():
                found.add(_short(f"{module}.{name}"))
            continue
        if module not in _PLUMBING:
            found.add(short)
        for node in own[name]:
            if isinstance(node, ast.ClassDef) and module in _PLUMBING:
                nodes = [part for part in node.body if getattr(part, "name", None) in called]
            else:
                nodes = [node]
            for part in nodes:
                names = {part.id for part in ast.walk(part) if isinstance(part, ast.Name)}
                waiting += [(module, used) for used in names if used in own]
                waiting += [imported[used] for used in names if used in imported]
    return found


# Reached through the table of strategies, of which consolidate reads a property; a type alone.
UNUSED = {"consolidate": {"evaluation"}, "report": {"models"}}


def test_stages_watch_the_code_that_they_reach() -> None:
    """DVC reruns a stage if code changes that it can reach; a training, if any of it does."""
    stages = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    assert set(stages) == set(STAGES)
    for name, stage in stages.items():
        watched = {dep.removeprefix("src/permafrost/") for dep in stage["deps"]}
        covered = watched | UNUSED.get(name, set())
        missed = [
            file
            for file in sorted(reached_files(name))
            if not any(file == part or file.startswith(f"{part}/") for part in covered)
        ]
        assert not missed, name
        if name in ("train_second", "tune", "sweep"):
            assert {"seeding.py", "experiment.py"} <= watched
            assert all(file.split("/")[0] in watched for file in _of_every_run())
            assert "custom" in watched


def _of_every_run() -> set[str]:
    """Return the files that some run can reach: what its key is made of."""
    kinds = (STRATEGIES, CRITERIA, SALIENCY_METHODS)
    homes = [kind.home(name) for kind in kinds for name in kind]
    roots = ["permafrost.runs.further_tasks", "permafrost.strategies.ranked", *homes]
    files = {_short(module.rstrip(".")) for module in reached(roots, PACKAGE_SOURCES)}
    return {file for file in files if file not in PASSED_ON}
