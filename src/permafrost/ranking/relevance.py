"""Layer-wise relevance propagation: how much of a logit runs through each filter.

What autograd hands down here is c = R / a, relevance per activation. Under the ε-rule, with ε at
0, every operation that is linear or positively homogeneous (ReLU, pooling, sums, concatenation)
hands down c as it does a gradient. So only what follows a rule of its own is replaced.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from permafrost.explain._checks import check_logits
from permafrost.explain._scopes import explaining
from permafrost.freezing import plain_copy
from permafrost.models.units import is_norm
from permafrost.ranking.class_scores import class_means
from permafrost.ranking.criteria import network_criterion
from permafrost.ranking.features import feature_layers

# In float64, rounding stays far below this share of what is conserved.
_TOLERANCE = 1e-9
# A unit counts as driven by its bias alone where its inputs give less than this share of what
# they give the layer's most driven unit: some algorithms round a 0.
_DRIVEN = 1e-12

_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
# What else may have a bias, and the dimension of its channels.
_BIASED = {
    F.linear: -1,
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 1,
    torch.conv_transpose3d: 1,
}
# Functions of single numbers, 0 at 0.
_ACTIVATIONS = {
    F.celu,
    F.elu,
    F.gelu,
    F.hardswish,
    F.hardtanh,
    F.mish,
    F.relu6,
    F.selu,
    F.silu,
    torch.tanh,
}


@network_criterion
def relevance(
    model: nn.Module, images_by_batches: Iterable[tuple[Tensor, Tensor]], classes: int
) -> dict[str, Tensor]:
    """Average each filter's relevance for the true labels' logits over the images of every class.

    After Ede et al. (2022), who freeze the filters most relevant for a task, found by layer-wise
    relevance propagation (:class:`FilterRelevance`); here all images given are the reference
    samples, each class has a score of its own, and how many filters freeze is left to the caller.

    Parameters
    ----------
    model, images_by_batches, classes
        As for :func:`permafrost.ranking.filter_responses`.

    Returns
    -------
    scores : dict[str, Tensor (F, C)]
        By layer, of any sign.

    References
    ----------
    Ede, Baghdadlian, Weber, Nguyen, Zanca, Samek & Lapuschkin, "Explain to not forget: defending
    against catastrophic forgetting with XAI", CD-MAKE 2022.
    """
    return class_means(FilterRelevance(model), images_by_batches, classes)


@network_criterion
def relevance_normalized(
    model: nn.Module, images_by_batches: Iterable[tuple[Tensor, Tensor]], classes: int
) -> dict[str, Tensor]:
    """Average each filter's share of its layer's relevance over the images of every class.

    As :func:`relevance`, but each image's relevances are divided by the sum of their magnitudes in
    the layer, as Relevance-based Neural Freezing does: an image of which the network is sure counts
    no more than others, and layers can be compared.

    Parameters
    ----------
    model, images_by_batches, classes
        As for :func:`permafrost.ranking.filter_responses`.

    Returns
    -------
    scores : dict[str, Tensor (F, C)]
        By layer, -1..1.

    References
    ----------
    As of :func:`relevance`.
    """
    measure = FilterRelevance(model)

    def shares(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = measure(images, labels)
        sums = {layer: values.abs().sum(1, keepdim=True) for layer, values in found.items()}
        return {
            layer: values / torch.where(sums[layer] > 0, sums[layer], 1)
            for layer, values in found.items()
        }

    return class_means(shares, images_by_batches, classes)


class FilterRelevance:
    """Relevance of every filter for a logit, by layer-wise relevance propagation.

    Relevance starts as the logit and is handed down layer by layer (Bach et al. 2015).
    Convolutions share it out by the rule α=1, β=0 without biases, as in the composite that
    Kohlbrenner et al. (2020) recommend: in proportion to what raises the output, which is a
    positive weight at an input of 0 or more and a negative weight at an input below 0. A
    BatchNorm directly behind a convolution is folded into it. All that is linear or positively
    homogeneous, as a module or written into ``forward`` (linear layers, pooling, ReLU, means,
    sums, concatenations, other BatchNorms), shares it out by the ε-rule at ε = 0. That rule alone
    would make relevance in a ReLU network gradient times activation (Ancona et al. 2018), which
    ``taylor`` measures already. Activations of single numbers that are 0 at 0 (ReLU, ReLU6, SiLU,
    Hardswish, GELU, ELU, tanh) pass relevance on unchanged, so the filter's output is meant before
    and behind its activation alike.

    The filters of a layer through which all of a sequential network runs sum to the logit less
    the bias of the linear layer that gave it; on the way down linear layers, BatchNorms that are
    not folded, and filters that are active by their bias alone lose the shares of their biases.
    What arrives at the images and these shares must sum to the logits, or the network is refused.

    Parameters
    ----------
    model : nn.Module
        Network of images (N, 3, H, W) to logits (N, C) in which each convolution runs once. It is
        copied, to compute in float64.

    References
    ----------
    Bach, Binder, Montavon, Klauschen, Müller & Samek, "On pixel-wise explanations for non-linear
    classifier decisions by layer-wise relevance propagation", PLoS ONE 10(7), 2015.
    Kohlbrenner, Bauer, Nakajima, Binder, Samek & Lapuschkin, "Towards best practice in explaining
    neural network decisions with LRP", IJCNN 2020.
    Ancona, Ceolini, Öztireli & Gross, "Towards better understanding of gradient-based attribution
    methods for deep neural networks", ICLR 2018.
    """

    def __init__(self, model: nn.Module) -> None:
        # In single precision, a denominator that should be 0 may be a rounding error beyond it.
        self.network = plain_copy(model).eval().double().requires_grad_(False)
        self._layers: dict[str, str] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sum the relevance for the labels' logits over each filter's positions.

        Parameters
        ----------
        images : Tensor (N, 3, H, W)
            Normalised, on the model's device.
        labels : Tensor (N,)
            int64: the logit to explain for each image.

        Returns
        -------
        relevance : dict[str, Tensor (N, F)]
            float64, by convolution in order of execution, without those that do not run in eval
            mode; negative where a filter speaks against the label, or where the logit itself is
            negative.

        Raises
        ------
        ValueError
            If a convolution runs twice, the model does not return logits, or relevance is not
            conserved: the network multiplies activations (gates, attention), divides by them
            (LayerNorm, GroupNorm, softmax), adds constants of its own, or has an activation that
            is not known here.
        """
        found: dict[str, Tensor] = {}

        def watch(name: str, output: Tensor) -> None:
            feature_map = output.detach().clone()  # an in-place ReLU may follow
            found[name] = feature_map.new_zeros(feature_map.shape[:2])

            def note(per_activation: Tensor) -> None:
                found[name] = (feature_map * per_activation).sum((2, 3))

            if output.requires_grad:
                output.register_hook(note)

        with explaining(self.network), ExitStack() as stack:
            inputs = images.detach().double().requires_grad_()
            self._layers = self._layers or feature_layers(self.network, inputs.detach()[:1])
            rules = _Rules()
            for norm in filter(is_norm, self.network.modules()):
                stack.enter_context(norm.register_forward_hook(rules.normalise))
            for name, layer in self._layers.items():
                module = self.network.get_submodule(layer)
                hook = module.register_forward_hook(lambda _m, _i, o, n=name: watch(n, o))
                stack.enter_context(hook)
            with rules:
                output = self.network(inputs.clone())
            logits = check_logits(output, labels, "labels").gather(1, labels[:, None])
            (arriving,) = torch.autograd.grad(logits.sum(), inputs)
        _check_conserved(logits.detach(), [_tally(inputs.detach() * arriving), *rules.lost])
        return found


@dataclass
class _Convolution:
    """What a convolution computes: `run(inputs, weight)`, and the version of its output."""

    inputs: Tensor
    weight: Tensor
    run: Callable[[Tensor, Tensor], Tensor]
    version: int = 0


class _Rules(TorchFunctionMode):
    """Within the block, operations that have a rule of their own hand down relevance by it.

    Functions are met here, and so are modules, which call them; norms only as modules, by a hook.

    Attributes
    ----------
    lost : list of Tensor (2,)
        After the backward pass: tallies of all that biases have kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, under its rule if it has one."""
        named = dict(kwargs or {})
        if func in _ACTIVATIONS:
            return _activate(func, *args, **named)
        output = func(*args, **named)
        if func in _CONVOLUTIONS | _BIASED.keys():
            given = dict(zip(("input", "weight", "bias"), args, strict=False))
            given |= {name: named.pop(name) for name in ("input", "weight", "bias") & named.keys()}
            if func in _CONVOLUTIONS:
                run = lambda x, weight: func(x, weight, None, *args[3:], **named)  # noqa: E731
                return self.convolve(_Convolution(given["input"], given["weight"], run), output)
            if given.get("bias") is not None:
                self.keep(output, given["bias"], _BIASED[func])
        return output

    def convolve(self, convolution: _Convolution, output: Tensor) -> Tensor:
        """Hand down the relevance of a convolution's output, or of that of a norm behind it."""
        result: Tensor = _Alpha1Beta0.apply(  # type: ignore[no-untyped-call]
            convolution.inputs, output.detach(), convolution, self.lost
        )
        convolution.version = result._version
        result.convolution = convolution  # type: ignore[attr-defined]
        return result

    def normalise(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Fold a norm into the convolution whose output it takes, or note what its bias keeps."""
        mean, variance, gamma, beta = _statistics(norm)
        before = getattr(inputs[0], "convolution", None)
        if before is not None and before.version == inputs[0]._version:
            # The size of γ cancels out of what the inputs' shares are.
            signs = gamma.sign().view(-1, *[1] * (before.weight.ndim - 1))
            folded = _Convolution(before.inputs, before.weight * signs, before.run)
            return self.convolve(folded, output)
        self.keep(output, beta - mean * gamma / variance.sqrt(), channels=1)
        return output

    def keep(self, output: Tensor, bias: Tensor, channels: int) -> None:
        """Note what a bias, one number a channel, keeps of the relevance of this output."""
        shape = [1] * output.ndim
        shape[channels] = -1
        share = bias.detach().view(shape)
        if output.requires_grad:
            output.register_hook(lambda c: self.lost.append(_tally(share * c)))


class _Alpha1Beta0(torch.autograd.Function):
    """Rule α=1, β=0 without biases: only what raises an output takes part of its relevance."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, output: Tensor, convolution: _Convolution, lost: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(inputs, output)
        ctx.convolution, ctx.lost = convolution, lost
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        inputs, output = ctx.saved_tensors
        relevance = output * gradients[0]
        weight, run = ctx.convolution.weight.detach(), ctx.convolution.run
        with torch.enable_grad():
            x = inputs.detach().requires_grad_()
            negative = x < 0
            if negative.any():
                raised = run(x.where(~negative, 0), weight.clamp(min=0))
                raised = raised + run(x.where(negative, 0), weight.clamp(max=0))
            else:
                raised = run(x, weight.clamp(min=0))
        driven = raised > _DRIVEN * raised.detach().max()
        ctx.lost.append(_tally(relevance.where(~driven, 0)))
        shares = (relevance / raised.detach()).where(driven, 0)
        return torch.autograd.grad(raised, x, shares)[0], None, None, None


def _activate(func: Callable[..., Tensor], x: Tensor, *args: Any, **named: Any) -> Tensor:
    """Apply a function of single numbers that hands down relevance as it is."""
    inplace = named.pop("inplace", False)
    with torch.no_grad():
        ratio = (func(x, *args, **named) / x).where(x != 0, 0)
    return x.mul_(ratio) if inplace else x * ratio


def _statistics(norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a norm's mean, variance with ε, γ and β."""
    gamma = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    return norm.running_mean, norm.running_var + norm.eps, gamma, beta


def _tally(shares: Tensor) -> Tensor:
    """Return the sum of shares of relevance, and of their sizes."""
    return torch.stack([shares.sum(), shares.abs().sum()])


def _check_conserved(logits: Tensor, tallies: list[Tensor]) -> None:
    """Refuse relevance that does not sum to the logits."""
    total, size = torch.stack([tally.to(logits.device) for tally in tallies]).sum(0)
    gap, scale = (total - logits.sum()).abs(), size + logits.abs().sum()
    if not gap <= _TOLERANCE * scale:
        raise ValueError(
            f"'relevance' cannot explain this network: {gap / scale:.1%} of it is not conserved, "
            "as where activations are multiplied (gates, attention) or divided (LayerNorm, "
            "GroupNorm, softmax), or constants added: choose another criterion, such as 'taylor'"
        )
