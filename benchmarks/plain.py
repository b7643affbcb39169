"""The plain code that each job is measured against: what one writes without this library.

Float32, eager, in PyTorch's default memory format; one image, filter or pair at a time where that
is how it is commonly written. Each gives the numbers that the library gives, up to rounding
(`tests/test_benchmarks.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr
from torch import Tensor, nn


def training_step(
    model: nn.Module, frozen: dict[str, Tensor], lr: float = 1e-3, momentum: float = 0.9
) -> Callable[[Tensor, Tensor], float]:
    """Return a step of SGD in which all gradients are computed and then masked.

    Parameters
    ----------
    model
        The classifier.
    frozen
        By the convolutions' names, True for each frozen filter (F,).
    lr, momentum
        Of SGD.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    layers = dict(model.named_modules())

    def step(images: Tensor, labels: Tensor) -> float:
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        for name, mask in frozen.items():
            layers[name].weight.grad[mask] = 0
            layers[name].bias.grad[mask] = 0
        optimizer.step()
        return loss.item()

    return step


def fisher_diagonal(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return what one image (3, H, W) gives of the Fisher information's diagonal, by parameter.

    A backward pass for each class: the squared gradient of its logarithmic probability, times it.
    """
    log_probabilities = model(image[None]).log_softmax(1)[0]
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for value in log_probabilities:
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            sums[name] += value.detach().exp() * gradient.square()
    return sums


def fullgrad(model: nn.Module, image: Tensor, target: int) -> Tensor:
    """Return the FullGrad map (H, W) of one image (3, H, W), as the authors' repository does.

    A backward pass that fills all weight gradients, and every channel of every layer interpolated
    to the image's size before they are summed.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []

    def keep(layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output.retain_grad()
        outputs.append((layer, output))
        return output.clone()  # what follows may work in place

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, kinds)]
    model.eval()
    model.zero_grad()
    x = image[None].clone().requires_grad_()
    model(x)[0, target].backward()
    for handle in handles:
        handle.remove()
    size = image.shape[1:]
    total = _rescale(x.grad * x.detach()).sum((0, 1))
    for layer, output in outputs:
        bias = layer.bias.detach()
        if isinstance(layer, nn.BatchNorm2d):
            bias = (
                bias
                - layer.weight.detach()
                * layer.running_mean
                / (layer.running_var + layer.eps).sqrt()
            )
        term = _rescale(output.grad * bias[:, None, None])
        upsampled = F.interpolate(term, size, mode="bilinear", align_corners=True)
        total = total + upsampled.sum((0, 1))
    return total


def _rescale(values: Tensor) -> Tensor:
    values = values.abs()
    shifted = values - values.min()
    return shifted / (shifted.max() + 1e-6)


class _Reached(Exception):
    pass


def visualize_filter(
    model: nn.Module, layer: nn.Conv2d, index: int, start: Tensor, steps: int
) -> Tensor:
    """Return the image (3, H, W) that one filter answers to most, filling all weight gradients."""
    reached: list[Tensor] = []

    def stop(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
        reached.append(output)
        raise _Reached

    handle = layer.register_forward_hook(stop)
    model.eval()
    image = start[None].clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.1, weight_decay=1e-6)
    for _ in range(steps):
        optimizer.zero_grad()
        reached.clear()
        with suppress(_Reached):
            model(image)
        loss = -reached[0][0, index].mean()
        loss.backward()
        optimizer.step()
    handle.remove()
    return image.detach()[0]


def pair_metrics() -> dict[str, Callable[[Tensor, Tensor], float]]:
    """Return the map metrics of one filter's and one class's map, by torchmetrics and SciPy."""
    from torchmetrics import functional as TM
    from torchmetrics.functional.image import structural_similarity_index_measure

    def unit(values: Tensor) -> Tensor:
        return (values - values.min()) / (values.max() - values.min())

    def share(values: Tensor) -> np.ndarray:
        scaled = unit(values).flatten().numpy()
        return scaled / scaled.sum()

    return {
        "mse": lambda f, c: float(TM.mean_squared_error(unit(f), unit(c))),
        "pearson": lambda f, c: float(TM.pearson_corrcoef(unit(f).flatten(), unit(c).flatten())),
        "cosine": lambda f, c: float(
            TM.cosine_similarity(unit(f).view(1, -1), unit(c).view(1, -1), reduction="mean")
        ),
        "spearman": lambda f, c: float(spearmanr(f.flatten().numpy(), c.flatten().numpy())[0]),
        "ssim": lambda f, c: float(
            structural_similarity_index_measure(
                unit(f)[None, None], unit(c)[None, None], sigma=1.5, data_range=1.0
            )
        ),
        "sim": lambda f, c: float(np.minimum(share(f), share(c)).sum()),
        "js": lambda f, c: float(jensenshannon(share(f), share(c)) ** 2),
    }


def data_loader(
    images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return torchvision's CIFAR-10 of images (N, 3, 32, 32), uint8, behind a DataLoader."""
    from torchvision import transforms
    from torchvision.datasets import CIFAR10

    class InMemory(CIFAR10):
        def __init__(self) -> None:
            self.data = images.permute(0, 2, 3, 1).numpy()
            self.targets = labels.tolist()
            self.target_transform = None
            self.transform = transforms.Compose(
                [
                    transforms.RandomCrop(32, 4),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(mean, std),
                ]
            )

    loader = torch.utils.data.DataLoader(InMemory(), 64, shuffle=True, num_workers=workers)
    return iter(loader)
