"""Names of things: what the package offers of one kind, and what users name of their own.

A file in the folder of its kind defines a thing and registers it by a decorator; nothing else has
to name it. A user's own thing is ``module:Name``: in a file of the project's ``custom`` folder, or
in an installed distribution.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from permafrost.errors import InputError
from permafrost.source import code_digest, read_sources

CUSTOM = Path("custom")

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """The things of one kind that the package offers, by name; users' own are looked up too.

    Parameters
    ----------
    kind : str
        What a thing is called in messages.
    package : str
        The package that defines them; its modules are imported at the first look.
    is_one : callable
        Whether an object is such a thing.
    remedy : str
        How a user's own becomes one.
    """

    def __init__(self, kind: str, package: str, is_one: Callable[[Any], bool], remedy: str) -> None:
        self.kind = kind
        self.package = package
        self.is_one = is_one
        self.remedy = remedy
        self._things: dict[str, T] = {}
        self._is_whole = False

    def add(self, name: str, thing: T) -> None:
        """Register a thing of the package; a user's own is found by its place alone."""
        if str(getattr(thing, "__module__", "")).startswith("permafrost."):
            self._things[name] = thing

    def __getitem__(self, name: str) -> T:
        self._import_all()
        if name not in self._things and ":" in name:
            return self._own(name)
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        self._import_all()
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        self._import_all()
        return iter(self._things)

    def __len__(self) -> int:
        self._import_all()
        return len(self._things)

    def find(self, name: str) -> T:
        """Return the thing of a name.

        Parameters
        ----------
        name : str
            A registered one, or ``module:Name``.

        Raises
        ------
        InputError
            If there is none; says which there are, or why the user's own cannot be used.
        """
        if name in self or ":" in name:
            return self[name]
        known = ", ".join(self)
        raise InputError(f"{self.kind} '{name}' is unknown: use one of {known}, or module:Name")

    def home(self, name: str) -> str:
        """Return the module that a thing is defined in."""
        return str(getattr(self.find(name), "__module__", ""))

    def _import_all(self) -> None:
        if self._is_whole:
            return
        self._is_whole = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)

    def _own(self, name: str) -> T:
        module_name, _, attribute = name.partition(":")
        module = own_module(module_name, f"{self.kind} '{name}'")
        thing = getattr(module, attribute, None)
        if thing is None:
            raise InputError(f"{self.kind} '{name}': {module_name} has no '{attribute}'")
        if not self.is_one(thing):
            raise InputError(f"{self.kind} '{name}': is none; {self.remedy}")
        found: T = thing
        return found


_snapshots: dict[str, str] = {}


def own_module(name: str, wanted: str) -> ModuleType:
    """Import a user's module.

    Parameters
    ----------
    name : str
        ``custom.…``, or a module of an installed distribution.
    wanted : str
        What for, in messages.

    Raises
    ------
    InputError
        If it is neither, or cannot be imported.
    """
    top = name.partition(".")[0]
    if top == CUSTOM.name and name in sys.modules:
        return sys.modules[name]  # an edit made since then is for the next process
    if top == CUSTOM.name:
        _snapshots.setdefault(top, code_digest(CUSTOM))
    elif distribution(top) is None and not _is_missing(top):
        raise InputError(
            f"{wanted}: module '{name}' is neither in {CUSTOM}/ nor installed: move it to "
            f"{CUSTOM}/ and name it {CUSTOM}.{name}, or install its distribution"
        )
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        # A user's module may fail in any way while it is imported; each is an unusable input.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{wanted}: module '{name}' cannot be imported ({reason})") from error
    if top == CUSTOM.name and code_digest(CUSTOM) != _snapshots[top]:
        raise InputError(f"{wanted}: {CUSTOM} was changed while it was imported")
    return module


def find_custom(root: Path) -> None:
    """Let a user's own things be imported from a project's folder."""
    if str(root) not in sys.path:
        sys.path.append(str(root))


def custom_sources() -> dict[str, str]:
    """Read the files of the project's ``custom`` folder, as :func:`read_sources` does."""
    return read_sources(CUSTOM, CUSTOM.name)


def distribution(package: str) -> str | None:
    """Return name and version of the installed distribution that a top-level package is from.

    None for one that was not installed, and for one that is edited in place.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        return None
    place = Path(next(iter(spec.submodule_search_locations or [str(spec.origin)])))
    installed = {Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")}
    if not installed & {*place.resolve().parents}:
        return None
    names = importlib.metadata.packages_distributions().get(package, [])
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names)))


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None
