"""What the library can do with torchvision's families of networks, each against an oracle.

A cell of the table is ``right``, ``refused`` or what went wrong. Each oracle is a plain PyTorch
program that shares no code with the package: it reads which norm follows which convolution from
torch.fx's graph, where the package follows the data.
"""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import permafrost
from permafrost.explain import completeness_error, fullgrad, visualize_filters
from permafrost.freezing import frozen_filters
from permafrost.ranking import filter_responses

TABLE = Path(__file__).parents[1] / "docs" / "networks.md"

# A small member of each family, and the smallest side of 32, 64, 96, 128, 224 and 299 pixels on
# which it can be trained.
SIDES = {
    "vgg11_bn": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "densenet121": 32,
    "googlenet": 32,
    "inception_v3": 299,
    "squeezenet1_1": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "efficientnet_b0": 32,
    "convnext_tiny": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
}
EVERYDAY = ("resnet18", "googlenet", "mobilenet_v2")
CLASSES = 2
EXACT = 1e-9  # relative, in float64

RIGHT, REFUSED = "right", "refused"


class Wrong(Exception):
    """The package's answer is not the oracle's."""


def network(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network of random weights in which no bias, norm or scale is trivial."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)(num_classes=CLASSES, **options)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0  # the statistics of these images alone
        model(torch.randn(4, 3, SIDES[name], SIDES[name]))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn(norm.num_features)
            norm.running_var *= torch.empty(norm.num_features).uniform_(0.5, 2)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("layer_scale"):  # of ConvNeXt: 1e-6 leaves nothing of blocks
                parameter.uniform_(0.3, 0.7)
            elif parameter_name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
        if name == "squeezenet1_1":
            model.classifier[1].bias += 1  # its logits are behind a ReLU
    return model.to(dtype).eval()


def images(name: str, count: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the same random images every time."""
    side = SIDES[name]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


def norms_by_graph(model: nn.Module) -> dict[str, str]:
    """Return the BatchNorm of each convolution that has one, as torch.fx's graph has them.

    Auxiliary heads, which do not run in eval mode, are only in the graph of training.
    """
    modules = dict(model.named_modules())
    norms = {}
    for node in torch.fx.symbolic_trace(model).graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            behind = [user.target for user in node.users if user.op == "call_module"]
            behind = [target for target in behind if isinstance(modules[target], _BatchNorm)]
            norms[node.target] = behind[0] if behind else ""
    return norms


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value that is expected."""
    if found.shape != expected.shape:
        raise Wrong(f"shape {tuple(found.shape)}")
    scale = expected.abs().max().item()
    assert scale > 0, "an oracle that is 0 holds nothing"
    return (found - expected).abs().max().item() / scale


def compare(found: Tensor, expected: Tensor, bound: float = EXACT) -> None:
    """Hold an answer against the oracle's."""
    off = difference(found, expected)
    if not off <= bound:
        raise Wrong(f"off by {off:.0e}")


# FullGrad


def completeness(name: str) -> None:
    """The terms add up to the logit; where they do not, a warning says so, and by how much.

    The oracle scales all biases of each layer by a number of its own, 1: the logit's derivative by
    that number is the layer's term.
    """
    model, x = network(name), images(name)
    labels = torch.tensor([0, 1, 1])
    found = completeness_error(model, x, labels)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fullgrad(model, x, labels)
    expected = _completeness_by_scales(model, x, labels)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-10):
        raise Wrong(f"wrong error, {found.max():.0e} for {expected.max():.0e}")
    worst = expected.max().item()
    if worst > EXACT:
        raise Wrong(f"{worst:.0e} missing" + ("" if told else ", untold"))
    if told:
        raise Wrong("a needless warning")


def _completeness_by_scales(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    scales: list[Tensor] = []

    def scaled(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        # One number an image, so that one backward pass serves the batch.
        scale = output.new_ones(len(output), requires_grad=True)
        scales.append(scale)
        zero = torch.zeros_like(inputs[0])
        bias = layer.forward(zero).detach() if isinstance(layer, nn.Linear | _BatchNorm) else None
        if bias is None:
            bias = torch.zeros_like(output) + layer.bias.detach().view(-1, 1, 1)
        return output + (scale - 1).view(-1, *[1] * (output.ndim - 1)) * bias

    x = x.clone().requires_grad_()
    handles = [
        layer.register_forward_hook(scaled)
        for layer in model.modules()
        if isinstance(layer, _BatchNorm)
        or (isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None)
    ]
    try:
        logits = model(x.clone())[range(len(x)), labels]
    finally:
        for handle in handles:
            handle.remove()
    input_gradient, *terms = torch.autograd.grad(logits.sum(), [x, *scales])
    sums = torch.stack([(input_gradient * x).sum((1, 2, 3)).detach(), *terms])
    return (logits.detach() - sums.sum(0)).abs() / sums.abs().sum(0)


# Pictures


def pictures(name: str) -> None:
    """Filters of the first and the deepest convolution, against a plain loop."""
    model, start = network(name), images(name, 1)[0]
    layers = list(norms_by_graph(model))
    for layer in (layers[0], layers[-1]):
        found = visualize_filters(model, layer, [0, 1], start=start, steps=3)
        compare(found, _pictures_by_loop(model, layer, [0, 1], start))


def _pictures_by_loop(
    model: nn.Module, layer: str, filters: list[int], start: Tensor, steps: int = 3
) -> Tensor:
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()  # what follows may change its input in place

    hook = model.get_submodule(layer).register_forward_hook(keep)
    image = start.repeat(len(filters), 1, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.1, weight_decay=1e-6)
    for _ in range(steps):
        outputs.clear()
        model(image.clone())
        objective = sum(outputs[0][n, f].mean() for n, f in enumerate(filters))
        (image.grad,) = torch.autograd.grad(-objective, image)
        optimizer.step()
    hook.remove()
    return image.detach()


# Responses


def responses(name: str) -> None:
    """Activation, Taylor and Fisher of every layer that answers, by their equations."""
    model, x, labels = network(name), images(name), torch.tensor([0, 1, 1])
    criteria = ["activation", "taylor", "fisher"]
    found = filter_responses(model, [(x, labels)], CLASSES, criteria)
    expected = _responses_by_equations(model, x, labels)
    _compare_scores(found, expected)


def _compare_scores(
    found: dict[str, dict[str, Tensor]],
    expected: dict[str, dict[str, Tensor]],
    bound: float = EXACT,
) -> None:
    for criterion, layers in expected.items():
        if missing := layers.keys() - found[criterion].keys():
            raise Wrong(f"{len(missing)} layers left out")
        for layer, values in layers.items():
            compare(found[criterion][layer], values, bound)


def _responses_by_equations(
    model: nn.Module, x: Tensor, labels: Tensor
) -> dict[str, dict[str, Tensor]]:
    maps: dict[str, Tensor] = {}

    def keep(layer: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            maps[layer] = output
            return output.clone()  # what follows may change its input in place

        return hook

    handles = [
        model.get_submodule(norm or conv).register_forward_hook(keep(conv))
        for conv, norm in norms_by_graph(model).items()
    ]
    loss = F.cross_entropy(model(x.clone()), labels, reduction="sum")
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, list(maps.values()))
    scores: dict[str, dict[str, Tensor]] = {"activation": {}, "taylor": {}, "fisher": {}}
    for (layer, a), g in zip(maps.items(), gradients, strict=True):
        effect = (a * g).detach()
        scores["activation"][layer] = _class_means(a.detach().abs().mean((2, 3)), labels)
        scores["taylor"][layer] = _class_means(effect.mean((2, 3)).abs(), labels)
        scores["fisher"][layer] = _class_means(effect.sum((2, 3)).square() / 2, labels)
    return scores


def _class_means(values: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([values[labels == label].mean(0) for label in range(CLASSES)], 1)


# LRP


def relevance(name: str) -> None:
    """Relevance of every filter, by the rule's equation on folded weights.

    Relevance is value times gradient in a network of the same values in which each convolution is
    z+ * (y / z+), the fraction held fixed: its gradient is that of the rule alpha=1, beta=0.
    Activations are x * (y / x), which passes relevance on unchanged.
    """
    model, x, labels = network(name), images(name), torch.tensor([0, 1, 1])
    found = filter_responses(model, [(x, labels)], CLASSES, ["relevance"])
    expected = {"relevance": _relevance_by_rule(model, x, labels)}
    _compare_scores(found, expected, bound=1e-5)  # captum's epsilon of 1e-9 divides small numbers


def _relevance_by_rule(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    positive: dict[str, Tensor] = {}
    maps: dict[str, Tensor] = {}

    def multiply(conv: str, norm: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
            weight = layer.weight
            if norm:
                behind = model.get_submodule(norm)
                factor = behind.weight / torch.sqrt(behind.running_var + behind.eps)
                weight = weight * factor.view(-1, 1, 1, 1)
            # Both factors positive, or both negative.
            positive[conv] = sum(
                layer._conv_forward((sign * inputs[0]).relu(), (sign * weight).relu(), None)
                for sign in (1, -1)
            )

        return hook

    def replace(conv: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            z = positive.pop(conv)
            share = torch.where(z > 0, output / z.where(z > 0, 1), 0).detach()
            maps[conv] = z * share + (output - z * share).detach()
            return maps[conv].clone()

        return hook

    def pass_on(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return inputs[0] * (output / inputs[0]).nan_to_num().detach()

    handles = []
    for module in model.modules():
        if isinstance(module, nn.ReLU6 | nn.SiLU | nn.Hardswish | nn.GELU):
            module.inplace = False  # what a hook on it is given is its input
            handles.append(module.register_forward_hook(pass_on))
    for conv, norm in norms_by_graph(model).items():
        handles.append(model.get_submodule(conv).register_forward_hook(multiply(conv, norm)))
        handles.append(model.get_submodule(norm or conv).register_forward_hook(replace(conv)))
    logits = model(x.clone())[range(len(x)), labels]
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logits.sum(), list(maps.values()))
    values = [(y.detach() * g).sum((2, 3)) for y, g in zip(maps.values(), gradients, strict=True)]
    return {n: _class_means(v, labels) for n, v in zip(maps, values, strict=True)}


# Freezing


def freezing(name: str) -> None:
    """Every other filter of every convolution, through momentum and weight decay."""
    model = network(name, torch.float32)
    x = images(name, 2, torch.float32)
    norms = norms_by_graph(model.train())  # auxiliary heads are trained too
    masks = {conv: torch.arange(model.get_submodule(conv).out_channels) % 2 == 0 for conv in norms}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with frozen_filters(model, masks):
        _train(model, x)
        saved = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            inside = model.eval()(x)
    after = model.state_dict()
    for conv, mask in masks.items():
        owned = [f"{conv}.weight", f"{conv}.bias"]
        kinds = ("weight", "bias", "running_mean", "running_var")
        owned += [f"{norms[conv]}.{kind}" for kind in kinds if norms[conv]]
        for key in filter(before.__contains__, owned):
            moved = (before[key] != after[key]).view(len(mask), -1).any(1)
            if moved[mask].any():
                raise Wrong(f"{key} moved")
            if moved[~mask].double().mean() < 0.9:  # a step may be too small to show
                raise Wrong(f"{key} stayed")
    with torch.no_grad():
        assert torch.isfinite(inside).all()
        if not torch.equal(inside, model.eval()(x)):
            raise Wrong("other answers inside")
    if saved.keys() != before.keys() or after.keys() != before.keys():
        raise Wrong("other names inside")
    if any(not torch.equal(saved[key], after[key]) for key in after):
        raise Wrong("other weights inside")


def _train(model: nn.Module, x: Tensor) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(x)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs  # with auxiliary heads
        labels = torch.tensor([0, 1])
        sum(F.cross_entropy(output, labels) for output in outputs).backward()
        optimizer.step()


COLUMNS: dict[str, Callable[[str], None]] = {
    "completeness": completeness,
    "pictures": pictures,
    "responses": responses,
    "LRP": relevance,
    "freezing": freezing,
}


def measure(name: str) -> dict[str, str]:
    """Return a family's row of the table."""
    return {column: cell(check, name) for column, check in COLUMNS.items()}


def cell(check: Callable[[str], None], name: str) -> str:
    """Return what a check finds."""
    try:
        check(name)
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        by = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        told = isinstance(error, ValueError | TypeError) and "\n" not in str(error)
        own = by.is_relative_to(Path(permafrost.__file__).parent)
        return REFUSED if told and own else f"fails: {type(error).__name__}"
    return RIGHT


def is_worse(found: str, before: str) -> bool:
    """Tell whether a cell is worse than it was: all but right and a smaller error."""
    if found in (before, RIGHT):
        return False
    try:
        return float(found.split()[0]) > float(before.split()[0])
    except ValueError:
        return True


# The table

_START = "| network |"


def read_table() -> dict[str, dict[str, str]]:
    """Return the committed rows by network."""
    lines = TABLE.read_text().partition(_START)[2].splitlines()[2:]
    rows = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]
    return {name: dict(zip(COLUMNS, cells, strict=True)) for name, _side, *cells in rows}


def write_table(rows: dict[str, dict[str, str]]) -> None:
    """Write rows in the order of ``SIDES``, below the text that is there."""
    lines = [["network", "image", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    for name in filter(rows.get, SIDES):
        lines.append([name, str(SIDES[name]), *rows[name].values()])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    TABLE.write_text(TABLE.read_text().partition(_START)[0] + table)
