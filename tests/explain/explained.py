"""Small networks to be explained, and their gradients image by image."""

import torch
from torch import Tensor, nn

CLASSES = 5
DECOMPOSED = ("fullgrad", "smooth_fullgrad")


def vary_batch_norm(model: nn.Module) -> nn.Module:
    """Give BatchNorms statistics and parameters far from their initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


def small_vgg(inplace: bool = True) -> nn.Sequential:
    """The project's order of layers: the last convolution is followed by BatchNorm and ReLU."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 6), (6, 8), (8, 8)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        norm = nn.BatchNorm2d(outputs)
        layers += [convolution, norm, nn.ReLU(inplace=inplace), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    return vary_batch_norm(nn.Sequential(*layers, *head)).double()


class SharedReLU(nn.Module):
    """One ReLU for every layer of a residual block, as torchvision's ResNet has it."""

    def __init__(self, inplace: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=inplace), nn.Linear(4, CLASSES)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        around = self.relu(self.first(images))
        return self.head(self.relu(self.second(around) + around).mean((2, 3)))


def some_images(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 20, 24, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


def gradients(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Gradients of the targets' logits by the images, one image at a time."""
    found = []
    for image, target in zip(images, targets, strict=True):
        x = image[None].clone().requires_grad_()
        model.eval()(x.clone())[0, target].backward()
        found.append(x.grad[0])
    model.zero_grad()
    return torch.stack(found)


def mixed(model: nn.Module) -> nn.Module:
    """Make a model's training flags, requires_grad and gradients a mixture."""
    for index, module in enumerate(model.train()):
        module.training = index % 3 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad = index % 2 == 0
        parameter.grad = torch.full_like(parameter, index) if index % 4 == 0 else None
    return model


def snapshot(model: nn.Module) -> dict:
    """Return all that explaining a model leaves as it was."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": [module.training for module in model.modules()],
        "inplace": [getattr(module, "inplace", None) for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "attributes": [dict.fromkeys(vars(module), 0) for module in model.modules()],
        "hooks": [
            sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks"))
            for module in model.modules()
        ],
        "tensor_hooks": [len(p._backward_hooks or ()) for p in model.parameters()],
    }
