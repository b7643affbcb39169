"""Networks that were stored, to answer again: without a project, DVC, MLflow or ``params.yaml``."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from permafrost.data import Normalization, normalize
from permafrost.data.image_folder import prepare_picture
from permafrost.errors import InputError
from permafrost.models import TaskNetwork, build_network, measuring
from permafrost.registry import CUSTOM, find_custom
from permafrost.runs.description import Description
from permafrost.tensors import load_tensors


class Predictor(nn.Module):
    """The classifier of a stored network, in eval mode.

    :func:`load_network` makes it.

    Attributes
    ----------
    network : nn.Module
        Maps normalised images to logits.
    classes : tuple of str
        The names of what it tells apart, in the order of the logits.
    normalization : Normalization
        Of its images.
    image_size : (int, int)
        Height and width of its images, in pixels.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Iterable[str],
        normalization: Normalization,
        image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = tuple(classes)
        self.normalization = normalization
        self.image_size = image_size
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to logits (N, C)."""
        logits: Tensor = self.network(images)
        return logits

    @torch.no_grad()
    def predict(self, pictures: Image.Image | Tensor) -> str | list[str]:
        """Name the class of a picture, or of several.

        Each is scaled until it covers `image_size` and cropped, as those of an image folder are.

        Parameters
        ----------
        pictures : PIL.Image.Image or Tensor
            A picture of any size: Pillow's, or uint8 of shape (3, H, W); or several, uint8 of shape
            (N, 3, H, W).

        Returns
        -------
        str or list of str
            The class's name; of several pictures a list of N.

        Raises
        ------
        ValueError
            If a tensor has another shape or type, or a picture pixels of an unknown range.
        """
        if isinstance(pictures, Tensor):
            several = pictures if pictures.ndim == 4 else pictures[None]
            if several.ndim != 4 or several.shape[1] != 3 or several.dtype != torch.uint8:
                raise ValueError(
                    f"{pictures.dtype} of shape {tuple(pictures.shape)}; wanted: uint8 of shape "
                    "(3, H, W) or (N, 3, H, W)"
                )
            names = self._names([_as_picture(one) for one in several])
            return names if pictures.ndim == 4 else names[0]
        return self._names([pictures])[0]

    def _names(self, pictures: list[Image.Image]) -> list[str]:
        images = torch.empty(len(pictures), 3, *self.image_size, dtype=torch.uint8)
        for place, picture in zip(images, pictures, strict=True):
            prepared, _ = prepare_picture(picture, self.image_size)
            place.copy_(torch.from_numpy(prepared.copy()))
        images = images.to(next(self.parameters()).device)
        with measuring(self):
            logits = self(normalize(images, self.normalization))
        return [self.classes[index] for index in logits.argmax(1).tolist()]


def _as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())


def load_network(path: str | Path, task: int | None = None) -> Predictor:
    """Load the classifier of a stored network.

    Parameters
    ----------
    path : str or Path
        A file of ``models/train_first`` or ``models/train_second``, or one that
        :meth:`permafrost.Learned.save` wrote. A user's own network in ``custom`` is found where the
        project holds the file, or is the current folder.
    task : int, optional
        For which task to answer, from 1. Needed where several are learned, but for an expanding
        head: that tells the classes of all learned tasks apart, and needs none.

    Returns
    -------
    Predictor
        On the CPU.

    Raises
    ------
    InputError
        One line: the file is missing or damaged, does not say what its network is, needs what a
        strategy kept besides, or does not answer for the task.
    """
    path = Path(path)
    tensors, about = load_tensors(path)
    description = _described(path, about)
    index = _task_index(path, description, task)
    view = _network(path, description, tensors).view(description.head, index, description.learned)
    names = description.classes[index]
    if description.head == "expanding":
        names = list(chain(*description.classes[: description.learned]))
    height, width = description.image_size
    normalization = Normalization(tuple(description.mean), tuple(description.std))
    return Predictor(view, names, normalization, (height, width))


def _described(path: Path, about: Any) -> Description:
    try:
        description = Description(**about)
    except TypeError:
        raise InputError(
            f"{path}: does not say what its network is; an older version has written it, or it "
            "holds no network: train it again"
        ) from None
    if description.needs_memory:
        raise InputError(
            f"{path}: {description.strategy} answers with what it keeps besides the network, which "
            "is not stored; wanted: a network of another strategy"
        )
    return description


def _task_index(path: Path, description: Description, task: int | None) -> int:
    learned = description.learned
    if description.head == "expanding":
        if task is not None:
            raise InputError(
                f"task: is {task}, but the network of {path} tells the classes of all tasks apart; "
                "allowed: None"
            )
        return 0
    if task is None and learned == 1:
        return 0
    if task is None or not 1 <= task <= learned:
        raise InputError(f"task: is {task}; allowed with the network of {path}: 1..{learned}")
    return task - 1


def _network(path: Path, description: Description, tensors: dict[str, Tensor]) -> TaskNetwork:
    height, width = description.image_size
    if ":" in description.arch:
        _find_own(path)
    network = build_network(
        description.arch,
        classes=[len(names) for names in description.classes],
        seed=0,
        image_size=(height, width),
        width=description.width,
        batch_norm=description.batch_norm,
    )
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise InputError(
            f"{path}: its weights do not fit {description.arch}, which has been changed since"
        ) from None
    return network


def _find_own(path: Path) -> None:
    """Let a user's own network be imported from the projects that hold the file, or this folder."""
    for folder in (*path.resolve().parents, Path.cwd()):
        if (folder / CUSTOM).is_dir():
            find_custom(folder)
