"""Folders of images: their layout, every format's pixels, and what is refused."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

import permafrost
from permafrost.data import load_dataset
from permafrost.data.image_folder import IMAGE_FORMATS
from permafrost.errors import InputError
from small_data import fails, put


@pytest.fixture
def folder(tmp_path) -> Path:
    """Make a tree of two classes, with a test part, whose parent is outside."""
    for part, count in (("train", 3), ("test", 1)):
        for name, colour in (("cat", (200, 100, 0)), ("Dog", (0, 50, 100))):
            for number in range(count):
                put(tmp_path / f"in/{part}/{name}/{number}.png", Image.new("RGB", (8, 8), colour))
    return tmp_path / "in"


def only(folder: Path, path: Path) -> torch.Tensor:
    """Load the tree and return the image at `path`, one of the class cat."""
    files = sorted((folder / "train/cat").iterdir())
    train = load_dataset("image_folder", folder, 8).train
    return train.images[train.labels == 1][files.index(path)]


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(256, size=shape).astype(np.uint8)


def test_image_folder(folder):
    (folder / "train/.hidden").mkdir()
    (folder / "train/cat/.DS_Store").write_bytes(b"no image")
    (folder / "train/README").write_text("beside the classes")
    data = load_dataset("image_folder", folder, 8)
    assert data.class_names == ("Dog", "cat")
    assert data.test is not None
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 1]
    assert data.train.images.shape == (6, 3, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.train.images[0, :, 0, 0].tolist() == [0, 50, 100]
    assert data.test.images[1, :, 7, 7].tolist() == [200, 100, 0]


def test_image_folder_without_test(folder):
    (folder / "test").rename(folder / "other")
    assert load_dataset("image_folder", folder, 8).test is None


def test_files_come_in_the_order_of_their_names(folder):
    for number in (30, 4, 10):
        put(folder / f"train/cat/x{number:02d}.png", Image.new("L", (8, 8), number))
    images = load_dataset("image_folder", folder, 8).train.images
    assert images[-3:, 0, 0, 0].tolist() == [4, 10, 30]


def test_rgb_png_is_exact(folder):
    pixels = noise(8, 8, 3)
    path = put(folder / "train/cat/a.png", Image.fromarray(pixels))
    assert torch.equal(only(folder, path), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "ppm", "tif", "webp"])
def test_other_formats(folder, suffix):
    path = put(folder / f"train/cat/a.{suffix}", Image.new("RGB", (8, 8), (255, 0, 0)))
    expected = torch.tensor([255, 0, 0])[:, None, None]
    assert (only(folder, path).int() - expected).abs().max() <= 2


def test_grey(folder):
    pixels = noise(8, 8)
    path = put(folder / "train/cat/a.png", Image.fromarray(pixels))
    assert torch.equal(only(folder, path), torch.from_numpy(pixels).expand(3, 8, 8))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled(folder, suffix):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = put(folder / f"train/cat/a.{suffix}", Image.fromarray(values))
    expected = torch.from_numpy(np.round(values / 257).astype(np.uint8))
    assert torch.equal(only(folder, path), expected.expand(3, 8, 8))


def test_big_endian_sixteen_bit_grey(folder):
    values = np.full((8, 8), 0x80FF, ">u2")
    path = folder / "train/cat/a.pgm"
    path.write_bytes(b"P5 8 8 65535\n" + values.tobytes())
    assert only(folder, path).unique().tolist() == [round(0x80FF / 257)]


@pytest.mark.parametrize("kind", ["float", "negative"])
def test_pixels_of_unknown_range(folder, kind):
    dtype = np.float32 if kind == "float" else np.int32
    path = put(folder / "train/cat/a.tif", Image.fromarray(np.full((8, 8), -1, dtype)))
    fails("image_folder", folder, "split.root", str(path), size=8)


def test_cmyk(folder):
    path = put(folder / "train/cat/a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    expected = torch.tensor([255, 0, 0])[:, None, None]
    assert (only(folder, path).int() - expected).abs().max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_black(folder, mode):
    image = Image.new("RGBA", (8, 8), (200, 200, 200, 51)).convert(mode)
    path = put(folder / "train/cat/a.png", image)
    assert only(folder, path).unique().tolist() == [40]


def test_transparent_palette_colour_is_black(folder):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 250, 250, 250])
    image.putpixel((0, 0), 1)
    path = put(folder / "train/cat/a.png", image, transparency=1)
    pixels = only(folder, path)
    assert pixels[:, 0, 0].tolist() == [0, 0, 0]
    assert pixels[:, 1, 1].tolist() == [10, 20, 30]


def png(depth: int, colour: int, row: bytes, rows: int = 8, transparent: bytes = b"") -> bytes:
    """Write a PNG byte by byte: Pillow writes neither 16-bit colours nor every transparency."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", 8, rows, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head)]
    if transparent:
        parts.append(chunk(b"tRNS", transparent))
    parts += [chunk(b"IDAT", zlib.compress((b"\0" + row) * rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Each with one transparent level at the left; what is beside it keeps its own.
TRANSPARENT_GREY = {
    "1 bit": (png(1, 0, b"\x0f", transparent=struct.pack(">H", 0)), 255),
    "2 bits": (png(2, 0, b"\xff\xaa", transparent=struct.pack(">H", 3)), 170),
    "4 bits": (png(4, 0, b"\xff\xff\x88\x88", transparent=struct.pack(">H", 15)), 136),
    "8 bits": (png(8, 0, b"\xc8" * 4 + b"\x64" * 4, transparent=struct.pack(">H", 200)), 100),
    "16 bits": (
        png(16, 0, b"\xc8\x01" * 4 + b"\xc8\x02" * 4, transparent=struct.pack(">H", 0xC801)),
        199,
    ),
}


@pytest.mark.parametrize("depth", TRANSPARENT_GREY)
def test_transparent_grey_is_black(folder, depth):
    content, beside = TRANSPARENT_GREY[depth]
    path = folder / "train/cat/a.png"
    path.write_bytes(content)
    pixels = only(folder, path)
    assert pixels[:, :, :4].unique().tolist() == [0]
    assert pixels[:, :, 4:].unique().tolist() == [beside]


def test_transparent_colour_of_sixteen_bits_is_refused(folder):
    path = folder / "train/cat/a.png"
    path.write_bytes(png(16, 2, b"\xc8\x01" * 24, transparent=b"\xc8\x01" * 3))
    fails("image_folder", folder, "split.root", str(path), "transparent colour", size=8)


def tiff(values: np.ndarray, *, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """Write a little-endian grey TIFF of 8 x 8 pixels byte by byte."""
    data = values.tobytes()
    entries = [
        (256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
        (278, 8), (279, len(data)), (339, sample_format),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    directory = struct.pack("<H", len(entries)) + table + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def test_white_is_zero(folder):
    path = folder / "train/cat/a.tif"
    path.write_bytes(tiff(np.full((8, 8), 65535 - 40 * 257, "<u2"), bits=16, photometric=0))
    assert only(folder, path).unique().tolist() == [40]


def test_twelve_bits_that_the_file_declares(folder):
    path = folder / "train/cat/a.tif"
    path.write_bytes(tiff(np.frombuffer(b"\xff\xf0\x00" * 32, np.uint8), bits=12))
    assert only(folder, path)[0, 0].tolist() == [255, 0] * 4


@pytest.mark.parametrize("bits", [16, 32])
def test_signed_grey_is_refused(folder, bits):
    path = folder / "train/cat/a.tif"
    values = np.full((8, 8), 20000, f"<i{bits // 8}")
    path.write_bytes(tiff(values, bits=bits, sample_format=2))
    fails("image_folder", folder, "split.root", str(path), "range is unknown", size=8)


def test_unsigned_grey_of_32_bits_is_refused(folder):
    path = folder / "train/cat/a.tif"
    path.write_bytes(tiff(np.full((8, 8), 20000, "<u4"), bits=32))
    fails("image_folder", folder, "split.root", str(path), "range is unknown", size=8)


SIXTEEN_BITS = {
    "grey PNG": ("png", lambda value: png(16, 0, struct.pack(">8H", *[value] * 8))),
    "colour PNG": ("png", lambda value: png(16, 2, struct.pack(">24H", *[value] * 24))),
    "grey PNG with alpha": ("png", lambda value: png(16, 4, struct.pack(">HH", value, 65535) * 8)),
    "colour PNG with alpha": (
        "png",
        lambda value: png(16, 6, struct.pack(">4H", value, value, value, 65535) * 8),
    ),
    "grey TIFF": ("tif", lambda value: tiff(np.full((8, 8), value, "<u2"), bits=16)),
    "grey PGM": ("pgm", lambda value: b"P5 8 8 65535\n" + struct.pack(">H", value) * 64),
    "colour PPM": ("ppm", lambda value: b"P6 8 8 65535\n" + struct.pack(">H", value) * 192),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
@pytest.mark.parametrize(("value", "factor"), [(4095, 16), (1023, 64), (16383, 4)])
def test_twelve_bit_data_in_sixteen_bits_is_refused(folder, kind, value, factor):
    suffix, make = SIXTEEN_BITS[kind]
    path = folder / f"train/cat/a.{suffix}"
    path.write_bytes(make(value))
    fails("image_folder", folder, "split.root", str(path), f"of all by {factor},", size=8)


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_dark_image_among_bright_ones_is_none_of_fewer_bits(folder, kind, part):
    suffix, make = SIXTEEN_BITS[kind]
    path = folder / f"train/cat/a.{suffix}"
    path.write_bytes(make(4112))
    (folder / f"{part}/Dog/b.{suffix}").write_bytes(make(65535))
    assert only(folder, path).unique().tolist() == [16]


def test_black_grey_of_sixteen_bits(folder):
    path = put(folder / "train/cat/a.png", Image.fromarray(np.zeros((8, 8), np.uint16)))
    assert only(folder, path).unique().tolist() == [0]


def test_a_pgm_says_its_own_largest_value(folder):
    path = folder / "train/cat/a.pgm"
    for value, expected in ((4095, 255), (257, 16)):
        path.write_bytes(b"P5 8 8 4095\n" + struct.pack(">H", value) * 64)
        assert only(folder, path).unique().tolist() == [expected]


def test_exif_orientation(folder):
    pixels = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    path = put(folder / "train/cat/a.png", Image.fromarray(pixels), exif=exif)
    turned = torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1)
    assert torch.equal(only(folder, path), turned)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (4, 4)])
def test_resize_and_centre_crop(folder, shape):
    height, width = shape
    gradient = np.add.outer(np.arange(height) * 3, np.arange(width) * 3).astype(np.uint8)
    path = put(folder / "train/cat/a.png", Image.fromarray(gradient).convert("RGB"))
    square = TF.center_crop(Image.fromarray(gradient).convert("RGB"), [min(shape)] * 2)
    expected = TF.pil_to_tensor(TF.resize(square, [8, 8]))
    difference = (only(folder, path).int() - expected.int()).abs()
    assert difference[:, 1:-1, 1:-1].max() == 0
    assert difference.max() <= 2  # at the edge, pixels beyond the crop may count


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_file_that_is_no_image(folder, content):
    path = folder / "train/cat/a.png"
    path.write_bytes(content)
    fails("image_folder", folder, "split.root", str(path), "PNG", size=8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp", "ppm"])
def test_truncated_image(folder, suffix):
    path = put(folder / f"test/cat/a.{suffix}", Image.fromarray(noise(40, 40, 3)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fails("image_folder", folder, "split.root", str(path), size=8)


@pytest.mark.parametrize("limit", [30, 60])  # Pillow refuses above twice its limit, else warns
def test_decompression_bomb(folder, monkeypatch, limit):
    for path in folder.rglob("*.png"):
        put(path, Image.new("RGB", (2, 2)))
    path = put(folder / "train/cat/a.png", Image.new("L", (8, 8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    fails("image_folder", folder, "split.root", str(path), "too many pixels", str(limit), size=8)


def test_file_name_with_a_line_break(folder):
    (folder / "train/cat/a\nb.png").write_bytes(b"no image")
    fails("image_folder", folder, "split.root", r"a\nb.png", size=8)


def test_missing_root(tmp_path):
    fails("image_folder", tmp_path / "none", "split.root", "none", "train/CLASS/*")


def test_missing_train_says_what_layout_is_wanted(folder):
    fails("image_folder", folder / "train", "split.root", "train/CLASS/*", "test/CLASS/*")


@pytest.mark.parametrize("part", ["train", "test"])
def test_part_without_classes(folder, part):
    (folder / part).rename(folder / "other")
    put(folder / part / "a.png")
    fails("image_folder", folder, "split.root", str(folder / part), "class")


def test_test_that_is_a_file(folder):
    (folder / "test").rename(folder / "other")
    (folder / "test").touch()
    fails("image_folder", folder, "split.root", str(folder / "test"))


@pytest.mark.parametrize("part", ["train", "test"])
def test_empty_class(folder, part):
    (folder / part / "empty").mkdir()
    (folder / part / "empty/.keep").touch()
    fails("image_folder", folder, "split.root", str(folder / part / "empty"))


@pytest.mark.parametrize(("part", "other"), [("train", "test"), ("test", "train")])
def test_class_in_one_part_only(folder, part, other):
    put(folder / part / "bird/a.png")
    fails("image_folder", folder, "split.root", "'bird'", str(folder / part), f"not in {other}")


def test_folder_in_a_class(folder):
    put(folder / "train/cat/more/a.png")
    fails("image_folder", folder, "split.root", str(folder / "train/cat/more"))


def test_links_within_the_folder_are_followed(folder):
    (folder / "train/cat/z.png").symlink_to("../Dog/0.png")
    (folder / "test").rename(folder / "held-out")
    (folder / "test").symlink_to("held-out")
    (folder.parent / "link").symlink_to(folder)
    data = load_dataset("image_folder", folder.parent / "link", 8)
    assert data.train.images[-1, :, 0, 0].tolist() == [0, 50, 100]
    assert data.test is not None


@pytest.mark.parametrize("link", ["train/cat/z.png", "train/bird", "test"])
def test_links_out_of_the_folder_are_refused(folder, link):
    (folder / "test").rename(folder.parent / "test")
    outside = put(folder.parent / "outside/a.png")
    target = {"z.png": outside, "bird": outside.parent, "test": folder.parent / "test"}
    path = folder / link
    path.symlink_to(target[path.name])
    fails("image_folder", folder, "split.root", str(path), "link to outside")


@pytest.mark.parametrize("target", ["nowhere.png", "z.png"])
def test_broken_links(folder, target):
    path = folder / "train/cat/z.png"
    path.symlink_to(target)
    fails("image_folder", folder, "split.root", str(path))


def test_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "train/cat/pipe.png")
    fails("image_folder", folder, "split.root", "pipe.png", "regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(folder):
    (folder / "train/cat").chmod(0)
    fails("image_folder", folder, "split.root", str(folder / "train/cat"), "readable")
    (folder / "train/cat").chmod(0o700)


def test_closed_list_of_formats_holds_no_reader_that_starts_programs():
    assert "EPS" not in IMAGE_FORMATS


def test_rectangles_cover_and_crop(tmp_path):
    for part in ("train/a", "train/b", "test/a", "test/b"):
        image = Image.new("RGB", (16, 8), (10, 20, 30))
        image.paste((200, 0, 0), (0, 0, 4, 8))  # the left quarter, which a square would lose
        put(tmp_path / part / "0.png", image)
    rectangle = load_dataset("image_folder", tmp_path, (8, 16)).train.images
    assert rectangle.shape == (2, 3, 8, 16)
    assert rectangle[0, 0, 0].tolist() == [200] * 4 + [10] * 12
    square = load_dataset("image_folder", tmp_path, (8, 8)).train.images
    assert square.shape == (2, 3, 8, 8)
    assert square[0, 0, 0].tolist() == [10] * 8
    tall = load_dataset("image_folder", tmp_path, (16, 8)).train.images
    assert tall.shape == (2, 3, 16, 8)


def test_a_picture_of_ones_own_is_read_as_a_folders(tmp_path):
    draw = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(draw).save(path)
    plain = permafrost.load_image(path, (20, 30))
    torch.testing.assert_close(plain, torch.from_numpy(draw).permute(2, 0, 1) / 255)
    scaled = permafrost.load_image(str(path), 8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    assert scaled.shape == (3, 8, 8)
    mean = torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    torch.testing.assert_close(scaled * 0.2 + mean, permafrost.load_image(path, 8))
    path.write_bytes(b"no image")
    with pytest.raises(InputError) as refused:
        permafrost.load_image(path, 8)
    assert str(refused.value).startswith(repr(str(path)))
