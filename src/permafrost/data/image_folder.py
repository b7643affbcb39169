"""Image folders: a class a folder."""

import os
import unicodedata
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from permafrost.data.datasets import dataset
from permafrost.data.images import (
    ImageDataset,
    ImageSize,
    LabeledImages,
    can_be_shown,
    require_memory,
    sides,
)
from permafrost.errors import InputError, one_line
from permafrost.stopping import stop_if_requested

# A closed list: some of Pillow's other readers start programs (EPS runs Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
# What systems leave in folders, beside names with a dot; in lower case.
_JUNK = {
    "thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "icon\r",
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "system volume information",
}
_LARGE = 10_000_000  # pixels of an image of which one at a time is decoded, for its memory
_one_large_image = Lock()
_LEAST_PEAK = 1 << 14  # 16-bit images that stay below it keep at most 64 of 256 levels
_GREY_STEP = {"L;2": 85, "L;4": 17}  # from one level to the next, once they are 0..255


def image_files(root: Path) -> Iterator[tuple[list[str], Path]]:
    """Yield the images in their order, with the names of their parts and classes.

    Those of the files do not count.
    """
    for part, classes in list_images(root).items():
        for name, paths in classes.items():
            for path in paths:
                yield [part, name], path


@dataset("image_folder", needs_root=True, files=image_files)
def image_folder(root: Path, image_size: ImageSize) -> ImageDataset:
    """Read images at ``root/train/CLASS/*`` and, if there is a test part, ``root/test/CLASS/*``.

    Classes and files come in the order of their names; those starting with a dot and what systems
    leave in folders (``Thumbs.db``, ``desktop.ini``, ``__MACOSX`` …) are left out. Names of classes
    that differ in their case are different classes; control characters in them, and two that are
    one name to Unicode, are refused. Links lead within `root`. JPEG, PNG, BMP, GIF, PPM, TIFF and
    WebP are read (the first frame), turned as their EXIF says, and converted to RGB: transparency
    on black, 16-bit grey from 0..65535, of 16-bit colours the upper eight bits. Images whose 16
    bits hold smaller values (12-bit data, say) are refused: no format says so, and hardly a grey
    level would be left. An image is scaled until it covers `image_size` (antialiased bilinear), and
    what sticks out is cropped at both ends.
    """
    parts = list_images(root)
    peaks: dict[Path, int] = {}
    dataset = ImageDataset(
        tuple(parts["train"]),
        _read_images(parts["train"], image_size, peaks),
        _read_images(parts["test"], image_size, peaks) if "test" in parts else None,
    )
    check_depth(peaks)
    return dataset


def list_images(root: Path) -> dict[str, dict[str, list[Path]]]:
    """List the files of an image folder, in the order in which they are read.

    Returns
    -------
    dict
        ``train`` and, if there is one, ``test``: each class's files.

    Raises
    ------
    InputError
        If the folder is laid out otherwise.
    """
    root = Path(os.path.realpath(root))
    if not (root / "train").is_dir():
        raise InputError(
            f"split.root: {str(root)!r} has no folder train; "
            "wanted: train/CLASS/* and, if there are test images, test/CLASS/*"
        )
    parts = {"train": _list_classes(root / "train", root)}
    if os.path.lexists(root / "test"):
        parts["test"] = _list_classes(root / "test", root)
    _check_names([name for classes in parts.values() for name in classes])
    if "test" in parts:
        _check_same_classes(parts["train"], parts["test"], root)
    return parts


def _list_classes(part: Path, root: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder in `part`, both in the order of their names."""
    _refuse_bad_link(part, root)
    classes = {
        entry.name: _list_files(entry, root) for entry in _entries(part, root) if entry.is_dir()
    }
    if not classes:
        raise InputError(
            f"split.root: {str(part)!r} has no class folders; wanted: a folder a class"
        )
    return classes


def _list_files(folder: Path, root: Path) -> list[Path]:
    files = _entries(folder, root)
    if not files:
        raise InputError(f"split.root: class folder {str(folder)!r} has no images; wanted: some")
    for path in files:
        if not path.is_file():
            raise InputError(
                f"split.root: {str(path)!r} is no regular file; a class folder holds images only"
            )
    return files


def _entries(folder: Path, root: Path) -> list[Path]:
    try:
        entries = [entry for entry in folder.iterdir() if not _is_junk(entry.name)]
    except OSError as error:
        raise InputError(
            f"split.root: {str(folder)!r} is no readable folder ({one_line(error)})"
        ) from error
    for entry in entries:
        _refuse_bad_link(entry, root)
    return sorted(entries, key=lambda entry: entry.name)


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _refuse_bad_link(path: Path, root: Path) -> None:
    if not path.is_symlink():
        return
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise InputError(
            f"split.root: {str(path)!r} is a link to outside of {str(root)!r}; "
            "allowed: links within the folder"
        )
    if not path.exists():
        raise InputError(f"split.root: {str(path)!r} is a link to nothing; wanted: what it names")


def _check_names(names: list[str]) -> None:
    """Refuse names that pictures, tables and terminals cannot show, or not tell apart."""
    seen: dict[str, str] = {}
    for name in names:
        if not can_be_shown(name):
            raise InputError(
                f"split.root: class folder {name!r} has control characters or bytes that are no "
                "UTF-8 in its name; rename it"
            )
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            raise InputError(
                f"split.root: class folders {twin!a} and {name!a} have the same name in "
                "two Unicode forms; rename one"
            )


def _check_same_classes(
    train: dict[str, list[Path]], test: dict[str, list[Path]], root: Path
) -> None:
    for name in sorted(train.keys() ^ test.keys()):
        here, there = ("train", "test") if name in train else ("test", "train")
        raise InputError(
            f"split.root: class {name!r} is in {str(root / here)!r} but not in {there}; "
            "wanted: the same classes in both"
        )


def _read_images(
    classes: dict[str, list[Path]], size: ImageSize, peaks: dict[Path, int]
) -> LabeledImages:
    """Read the images, and note in `peaks` the largest sample of those that have 16 bits."""
    files = [path for paths in classes.values() for path in paths]
    counts = torch.tensor([len(paths) for paths in classes.values()])
    require_memory(len(files), size)
    images = np.empty((len(files), 3, *sides(size)), np.uint8)
    # Pillow only warns of a bomb up to twice its limit.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        read = pool.map(partial(read_image, size=sides(size)), files)
        for row, path, (image, peak) in zip(images, files, read, strict=True):
            row[:] = image
            if peak is not None:
                peaks[path] = peak
    return LabeledImages(
        torch.from_numpy(images), torch.arange(len(classes)).repeat_interleave(counts)
    )


def check_depth(peaks: dict[Path, int]) -> None:
    """Refuse 16-bit images none of which uses the range, as 12-bit data in 16-bit files does."""
    if not peaks:
        return
    path = max(peaks, key=lambda path: peaks[path])
    bits = peaks[path].bit_length()
    if 0 < peaks[path] < _LEAST_PEAK:  # where all are black nothing is lost
        raise InputError(
            f"split.root: the 16-bit images hold {bits}-bit data, nearly black among 65536 levels "
            f"(the brightest is {str(path)!r}); multiply the values of all by {1 << (16 - bits)}, "
            "or scale them to 8 bits"
        )


def read_image(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, int | None]:
    """Read an image as uint8 of shape (3, *size), and its largest sample if it has 16 bits."""
    stop_if_requested()
    height, width = size
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            # A large JPEG is decoded at a fraction of its size that is still at least twice ours.
            image.draft(None, (2 * width, 2 * height))
            with _one_large_image if image.width * image.height > _LARGE else nullcontext():
                return prepare_picture(image, size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"split.root: {str(path)!r} has too many pixels; allowed: {Image.MAX_IMAGE_PIXELS}"
        ) from error
    except Exception as error:  # a broken file makes Pillow's readers raise almost anything
        raise InputError(
            f"split.root: {str(path)!r} is no image that can be read ({one_line(error)}); "
            f"allowed: whole files in {', '.join(IMAGE_FORMATS)}"
        ) from error


def prepare_picture(image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, int | None]:
    """Scale a picture until it covers a size, and crop what sticks out; as :func:`image_folder`.

    Parameters
    ----------
    image : Image
        Of Pillow; turned as its EXIF says.
    size : (int, int)
        Height and width, in pixels.

    Returns
    -------
    prepared : array of uint8, shape (3, height, width)
        In RGB.
    peak : int or None
        The largest sample of its colours if it has 16 bits.

    Raises
    ------
    ValueError
        If its pixels have an unknown range.
    """
    height, width = size
    rgb, peak = _to_rgb(image)
    # Crops in the resampling itself: no huge strip is made of a long, thin image.
    cropped = ImageOps.fit(rgb, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(cropped).transpose(2, 0, 1), peak


def _to_rgb(image: Image.Image) -> tuple[Image.Image, int | None]:
    """Return an image upright in RGB, and the largest sample of its colours if it has 16 bits."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    stored, wide = _stored_samples(image)  # known only before the pixels are read
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        return _grey_to_rgb(image, stored, wide)
    upright = ImageOps.exif_transpose(image)
    peak = _peak_of_colours(image, upright) if wide else None
    if upright.has_transparency_data:
        _scale_transparent_level(upright, stored, wide)
        black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(black, upright.convert("RGBA"))
    return upright.convert("RGB"), peak


def _peak_of_colours(image: Image.Image, upright: Image.Image) -> int:
    """Return the largest sample of 16-bit colours, as far as Pillow's eight bits tell."""
    brightest = int(np.asarray(upright)[..., :3].max())
    if image.format == "PPM":  # rounded
        return max(0, 257 * brightest - 129)
    return 256 * brightest + 255  # cut off


def _stored_samples(image: Image.Image) -> tuple[str, bool]:
    """Return Pillow's name of the samples in the file (``L;2``), and if they may be 0..65535.

    An image that was made in memory, or is read already, does not know.
    """
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    arguments = tiles[0].args if tiles else ""
    if not isinstance(arguments, tuple):
        arguments = (arguments,)
    stored = str(arguments[0]) if arguments else ""
    declared = image.format == "PPM" and arguments[-1] == 65535
    return stored, declared or (";16" in stored and image.format in ("PNG", "TIFF", "PPM"))


def _scale_transparent_level(image: Image.Image, stored: str, wide: bool) -> None:
    """Bring a PNG's transparent grey level, which is in the file's units, to those of Pillow."""
    level = image.info.get("transparency")
    if wide and level is not None:
        raise ValueError("a transparent colour of 16 bits; save the image with 8, or with alpha")
    if stored in _GREY_STEP and isinstance(level, int):
        image.info["transparency"] = level * _GREY_STEP[stored]


def _grey_to_rgb(image: Image.Image, stored: str, wide: bool) -> tuple[Image.Image, int | None]:
    """Return grey of 12 or 16 bits, with black where it is transparent."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if tags and (image.mode == "I" or tags.get(SAMPLEFORMAT, (1,))[0] != 1):
        raise ValueError("signed or 32-bit integer pixels, whose range is unknown")
    top = 4095 if stored == "I;12" else 65535
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    transparent = values == image.info.get("transparency", -1)
    peak = int(values.max()) if wide else None
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
        values = top - values
    grey = ((values * 255 + top // 2) // top).astype(np.uint8)
    grey[transparent] = 0
    return Image.fromarray(grey).convert("RGB"), peak
