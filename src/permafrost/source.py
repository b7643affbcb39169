"""The code that runs, known by hashes: all of it, and what of it a result can have come from.

A result can have come from the modules that it starts from and from what these import, one name
after the other: `from permafrost.training import fit` leads to the file that defines ``fit``, not
to all that the package's ``__init__`` names. Things that parameters name are found by their names
(:mod:`permafrost.registry`), no import leads to them: whoever runs one starts from its module too.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
TEMPLATE = PACKAGE / "template"  # of `permafrost init`, in an installed package; no code of its own

# By the name of a module, what its file holds.
Sources = Mapping[str, str]


def code_digest(folder: Path) -> str:
    """Hash all Python files in a folder; none if it is not there."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_sources(folder: Path, name: str) -> dict[str, str]:
    """Read the modules of a package.

    Parameters
    ----------
    folder : Path
        The package's; nothing is read if it is not there.
    name : str
        The package's.

    Returns
    -------
    dict of str to str
        Their texts; a package has the name of its ``__init__``'s module with a dot behind it, so
        that one that has no such file is told from one that has.
    """
    sources = {}
    for path in _files(folder):
        parts = [name, *path.relative_to(folder).with_suffix("").parts]
        module = ".".join(parts[:-1]) + "." if parts[-1] == "__init__" else ".".join(parts)
        sources[module] = path.read_text(encoding="utf-8", errors="surrogateescape")
    return sources


def reached(roots: Iterable[str], sources: Sources) -> set[str]:
    """Return the modules that some modules reach by their imports, with themselves.

    Imports count wherever they stand, but for those under ``if TYPE_CHECKING``. What runs because a
    package on the way is imported does not.

    Parameters
    ----------
    roots : iterable of str
        Names of modules; those that the sources do not hold are left out.
    sources : mapping of str to str
        As of :func:`read_sources`.
    """
    found: set[str] = set()
    waiting = [module for root in roots for module in _whole(root, sources)]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += _imported(module, sources)
    return found


def foreign(modules: Iterable[str], sources: Sources) -> set[str]:
    """Return the top-level packages that modules import and the sources do not hold."""
    own = {module.partition(".")[0] for module in sources}
    names = {name.partition(".")[0] for module in modules for name, _ in _imports(module, sources)}
    return names - own


def reach_digest(roots: Iterable[str], sources: Sources) -> str:
    """Hash what :func:`reached` finds, without its docstrings and comments."""
    digest = hashlib.sha256()
    for module in sorted(reached(roots, sources)):
        digest.update(f"{module}\0{_bare(sources[module])}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    # An editor may leave a link to nowhere, such as .#cli.py.
    files = sorted(path for path in folder.rglob("*.py") if path.is_file())
    return [path for path in files if TEMPLATE not in path.parents]


def _whole(name: str, sources: Sources) -> list[str]:
    """Return the module of this name, as the sources name it, if they hold it."""
    return [module for module in (name, f"{name}.") if module in sources]


def _imported(module: str, sources: Sources) -> Iterator[str]:
    for name, attribute in _imports(module, sources):
        yield from _defining(name, attribute, sources, frozenset())


def _defining(
    name: str, attribute: str | None, sources: Sources, passed: frozenset[str]
) -> list[str]:
    """Return the module that defines what `from name import attribute` gives."""
    if attribute is None:
        return _whole(name, sources)
    submodule = _whole(f"{name}.{attribute}", sources)
    if submodule:
        return submodule
    package = f"{name}."
    if package not in sources or package in passed:
        return _whole(name, sources)
    for origin, wanted in _imports(package, sources, by_alias=attribute):
        return _defining(origin, wanted, sources, passed | {package})
    return [package]  # it defines the thing itself


def _imports(
    module: str, sources: Sources, by_alias: str | None = None
) -> list[tuple[str, str | None]]:
    """Return what a module imports: a module's name and, of `from` imports, what is taken of it."""
    found = []
    for name, attribute, alias in _all_imports(module, sources[module]):
        if by_alias in (None, alias):
            found.append((name, attribute))
    return found


@cache
def _all_imports(module: str, text: str) -> list[tuple[str, str | None, str]]:
    package = module.rstrip(".") if module.endswith(".") else module.rpartition(".")[0]
    found: list[tuple[str, str | None, str]] = []
    for node in _nodes(_parse(text)):
        if isinstance(node, ast.Import):
            found += [(a.name, None, a.asname or a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            name = ".".join(
                [*(above if node.level else []), *([node.module] if node.module else [])]
            )
            found += [
                (name, None if a.name == "*" else a.name, a.asname or a.name) for a in node.names
            ]
    return found


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, but not into what only type checkers read."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes(child)


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def _bare(text: str) -> str:
    """Return a module's code alone: as it is unparsed, without docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        kept = [statement for statement in body if not _is_text(statement)]
        node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


# Of what is imported, whatever becomes of the files: to be read before the rest is imported.
PACKAGE_CODE = code_digest(PACKAGE)
PACKAGE_SOURCES = read_sources(PACKAGE, PACKAGE.name)
