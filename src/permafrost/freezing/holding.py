"""How layers are held: each stays the object that it is, and its class is changed for a while.

So hooks, other names of a shared layer, ``isinstance`` and an own ``forward`` go on working.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize


class Part(nn.Module):
    """A child of a held layer; what it holds is in the layer's own state dict."""

    def _save_to_state_dict(self, *args: Any) -> None:
        """Leave it to the layer."""

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Leave it to the layer; names of this part are none of the network's."""
        _, _, _, unexpected, *_ = args
        unexpected += [name for name in state if name.startswith(prefix)]


class Rows(Part):
    """A tensor of which some numbers are held.

    Attributes
    ----------
    live : nn.Parameter or None
        What an optimizer moves.
    """

    live: nn.Parameter | None

    def forward(self) -> Tensor:
        """Return the whole tensor, newly put together; gradients flow to what is live."""
        raise NotImplementedError

    def fill(self, values: Tensor) -> None:
        """Take other values, held ones too."""
        raise NotImplementedError


class Held(nn.Module):
    """What the class of a held layer inherits from first; what follows is the layer's own class.

    Held parameters are taken out. Whoever reads them gets them newly put together of their
    :class:`Rows`, which are the layer's child ``weight_rows`` for ``weight``. The layer's state
    dict has the plain names and whole tensors.
    """

    plain_class: ClassVar[type[nn.Module]]
    # The parameters that were taken out, to be put back; nothing reads them.
    _taken: nn.Module
    # The names of all own parameters in order, and of the children that holding has added.
    _names: tuple[list[str], list[str]]

    def rows(self) -> dict[str, Rows]:
        """Return the rows of each held parameter by its name."""
        return {name: getattr(self, f"{name}_rows") for name in self._taken._parameters}

    def whole(self) -> dict[str, Any]:
        """Return all own parameters in their order, the held ones put together."""
        return self._beside({name: rows() for name, rows in self.rows().items()})

    def _beside(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """Return all own parameters in their order, these in the place of the held ones."""
        names = dict.fromkeys([*self._names[0], *self._parameters])
        return {n: held[n] if n in held else self._parameters[n] for n in names}

    def _save_to_state_dict(self, *args: Any) -> None:
        own = self._parameters
        self._parameters = self.whole()
        try:
            super()._save_to_state_dict(*args)
        finally:
            self._parameters = own

    @torch.no_grad()
    def _load_from_state_dict(self, *args: Any) -> None:
        own, rows = self._parameters, self.rows()
        for name, part in rows.items():
            self._taken.get_parameter(name).copy_(part())
        self._parameters = self._beside(self._taken._parameters)
        try:
            super()._load_from_state_dict(*args)
        finally:
            loaded, self._parameters = self._parameters, own
        # With `assign` they are other objects.
        for name, value in loaded.items():
            (self._taken._parameters if name in rows else own)[name] = value
        for name, part in rows.items():
            part.fill(self._taken.get_parameter(name))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, or change the type of, what was taken out as well."""
        self._taken._apply(function)
        return super()._apply(function, recurse)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle: the class is made again of what it was made of."""
        state: Any = super().__reduce_ex__(protocol)[2]
        kind = type(self).__bases__[0]
        return _blank, (kind, self.plain_class, tuple(self._taken._parameters)), state


def _blank(*made_of: Any) -> nn.Module:
    made = _held_class(*made_of)
    blank: nn.Module = made.__new__(made)
    return blank


@functools.cache
def _held_class(kind: Any, plain: Any, names: tuple[str, ...]) -> Any:
    """Return a subclass of a layer's class and the kind; of the same arguments it is the same."""

    def part(name: str) -> property:
        return property(lambda layer: getattr(layer, f"{name}_rows")())

    # In the layer's own module, by which torch.fx knows layers from networks.
    namespace = {"plain_class": plain, "__module__": plain.__module__}
    parts = {name: part(name) for name in names}
    return type(f"Held{plain.__name__}", (kind, plain), namespace | parts)


@dataclass
class Plan:
    """How a layer is to be held.

    Attributes
    ----------
    layer : nn.Module
        Any.
    kind : type
        What it inherits from first.
    rows : dict of str to Rows
        For each parameter of the layer that is to be held, by name.
    others : dict of str to Part or None
        Children that the kind needs.
    """

    layer: nn.Module
    kind: type[Held]
    rows: dict[str, Rows]
    others: dict[str, Part | None] = field(default_factory=dict)


@contextmanager
def holding(plans: Iterable[Plan]) -> Iterator[None]:
    """Hold layers within the block."""
    with ExitStack() as stack:
        for plan in plans:
            stack.callback(release, _hold(plan))
        yield


def _hold(plan: Plan) -> Held:
    layer, names = plan.layer, list(plan.layer._parameters)
    made = _held_class(plan.kind, type(layer), tuple(plan.rows))  # type: ignore[arg-type]
    children = {f"{name}_rows": rows for name, rows in plan.rows.items()} | plan.others
    for name, child in children.items():
        layer.add_module(name, None if child is None else child.train(layer.training))
    taken = nn.Module()
    for name in plan.rows:
        taken.register_parameter(name, layer._parameters.pop(name))
    # Past `nn.Module`, which would count what was taken among the layer's parameters.
    vars(layer).update(_taken=taken, _names=(names, list(children)))
    layer.__class__ = made
    assert isinstance(layer, Held)
    return layer


@torch.no_grad()
def release(layer: Held) -> None:
    """Give a held layer its class and its parameters back, with what was learned."""
    for name, rows in layer.rows().items():
        parameter = layer._taken.get_parameter(name)
        parameter.copy_(rows())
        if rows.live is not None:
            parameter.requires_grad_(rows.live.requires_grad)
    layer._parameters = layer._beside(layer._taken._parameters)
    for name in layer._names[1]:
        del layer._modules[name]
    del vars(layer)["_taken"], vars(layer)["_names"]
    layer.__class__ = layer.plain_class  # type: ignore[assignment]


class Network:
    """The layers and parameters of a network, by all their names, and what cannot be held of it.

    Parameters
    ----------
    model : nn.Module
        Any network.

    Raises
    ------
    ValueError
        In inference mode, and of networks in TorchScript or that are not initialised.
    """

    def __init__(self, model: nn.Module) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError("nothing is trained, or held, inside torch.inference_mode; leave it")
        # By every name; a shared layer has several, the first of which is its own.
        self.layers = dict(model.named_modules(remove_duplicate=False))
        self.names = {layer: name for name, layer in model.named_modules()}
        self._holders: dict[int, list[str]] = defaultdict(list)
        for layer, name in self.names.items():
            if isinstance(layer, torch.jit.ScriptModule):
                raise ValueError("TorchScript cannot be held; pass the network it was made of")
            for part, values in layer._parameters.items():
                if values is not None:
                    full = f"{name}.{part}".lstrip(".")
                    if is_lazy(values):
                        raise ValueError(f"{full!r} is not initialised; first run the network")
                    self._holders[values.data_ptr() or id(values)].append(full)

    def check(self, layer: nn.Module, part: str) -> bool:
        """Check that a parameter is one that can be held; return whether there is one.

        Raises
        ------
        ValueError
            Otherwise; says what to do.
        """
        name = self.names[layer]
        if isinstance(layer, Held):
            raise ValueError(f"{name!r} is held already; give all masks to one block")
        if (cure := _derived(layer, part)) is not None:
            raise ValueError(
                f"the {part} of {name!r} is derived from other parameters, which would move; {cure}"
            )
        parameter = layer._parameters.get(part)
        if parameter is None:
            return False
        holders = self._holders[parameter.data_ptr() or id(parameter)]
        if len(holders) > 1:
            raise ValueError(
                f"{' and '.join(map(repr, holders))} are one parameter, of which only one name can "
                "be held; give each layer a weight of its own, or share the layer"
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"{holders[0]!r} has hooks, which would see no gradient; remove them first"
            )
        return True


def _derived(layer: nn.Module, part: str) -> str | None:
    """Return what to do about a weight or bias that is no parameter, if it is none."""
    if part in layer._parameters or part in layer._buffers or not hasattr(layer, part):
        return None
    utils = "call torch.nn.utils."
    if parametrize.is_parametrized(layer, part):
        return f"{utils}parametrize.remove_parametrizations(layer, {part!r})"
    if f"{part}_mask" in layer._buffers:
        return f"{utils}prune.remove(layer, {part!r})"
    if f"{part}_g" in layer._parameters:
        return f"{utils}remove_weight_norm(layer, {part!r})"
    if f"{part}_orig" in layer._parameters:
        return f"{utils}remove_spectral_norm(layer, {part!r})"
    return "make it a parameter"
