"""Bad and odd images: read as what they are, or refused by name."""

import os
import pickle
import struct
import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from hostile_data import COLOUR, broken, encoded, load, plain, refused, small_project
from limits import check_with_little_memory


def png(
    width: int, height: int, depth: int, kind: int, raw: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """Return a PNG of any depth and colour type; each of its rows holds the same bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    rows = zlib.compress((b"\0" + raw) * (height if raw else 1))
    body = b"".join(chunk(*item) for item in (*chunks, (b"IDAT", rows), (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def frames(kind: str, **options: Any) -> bytes:
    others = [plain(colour=(0, 0, 255)), plain(colour=(0, 255, 0))]
    return encoded(plain(), kind, save_all=True, append_images=others, **options)


def with_exif(content: bytes) -> bytes:
    return encoded(plain(), "JPEG", quality=95, exif=b"Exif\0\0" + content)


def orientation(value: bytes, kind: int = 3) -> bytes:
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x112, kind, 1, value) + bytes(4)


GREY = (128, 128, 128)
WIDE = (2, 2, 2, 2)
PALETTE = plain().convert("P", palette=Image.Palette.ADAPTIVE)
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("comment", "x" * 100_000)

# The content of a file, and the colour that its image becomes.
ODD_IMAGES: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "PNG": (encoded(plain(), "PNG"), COLOUR),
    "JPEG": (encoded(plain(), "JPEG", quality=95), COLOUR),
    "progressive JPEG": (encoded(plain(), "JPEG", quality=95, progressive=True), COLOUR),
    "JPEG with garbage behind it": (encoded(plain(), "JPEG", quality=95) + b"x" * 99, COLOUR),
    "grey JPEG": (encoded(plain("L", 128), "JPEG"), GREY),
    "CMYK JPEG": (encoded(plain("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "CMYK TIFF": (encoded(plain("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "LAB TIFF": (encoded(plain("LAB", (255, 128, 128)), "TIFF"), (255, 255, 255)),
    "1-bit PNG": (encoded(plain("1", 1), "PNG"), (255, 255, 255)),
    "1-bit BMP": (encoded(plain("1", 1), "BMP"), (255, 255, 255)),
    "2-bit grey PNG": (png(8, 8, 2, 0, b"\xaa\xaa"), (170, 170, 170)),
    "4-bit grey PNG": (png(8, 8, 4, 0, b"\x88" * 4), (136, 136, 136)),
    "grey PNG": (encoded(plain("L", 128), "PNG"), GREY),
    "16-bit grey PNG": (png(8, 8, 16, 0, b"\x80\x80" * 8), GREY),
    "16-bit RGB PNG": (png(8, 8, 16, 2, b"\xc8\xc8\x64\x64\x30\x30" * 8), COLOUR),
    "16-bit RGBA PNG": (png(8, 8, 16, 6, (b"\xc8\xc8\x64\x64\x30\x30" + b"\xff\xff") * 8), COLOUR),
    "16-bit grey PNG with alpha": (png(8, 8, 16, 4, b"\x80\x80\xff\xff" * 8), GREY),
    "16-bit grey TIFF": (encoded(Image.fromarray(np.full((8, 8), 0x8080, "u2")), "TIFF"), GREY),
    "16-bit grey PPM": (b"P5 8 8 65535\n" + b"\x80\x80" * 64, GREY),
    "PPM in letters": (b"P3 1 1 255\n200 100 48\n", COLOUR),
    "PPM with a comment": (b"P6 # hello\n1 1 255\n" + bytes(COLOUR), COLOUR),
    "palette PNG": (encoded(PALETTE, "PNG"), COLOUR),
    "palette PNG with a transparent colour": (
        encoded(PALETTE, "PNG", transparency=PALETTE.getpixel((0, 0))),
        (0, 0, 0),
    ),
    "RGB PNG with a transparent colour": (encoded(plain(), "PNG", transparency=COLOUR), (0, 0, 0)),
    "grey PNG with a transparent colour": (encoded(plain("L", 7), "PNG", transparency=7), (0,) * 3),
    "grey PNG with alpha": (encoded(plain("LA", (255, 128)), "PNG"), GREY),
    "RGBA PNG": (encoded(plain("RGBA", (*COLOUR, 255)), "PNG"), COLOUR),
    "wholly transparent PNG": (encoded(plain("RGBA", (*COLOUR, 0)), "PNG"), (0, 0, 0)),
    "transparent WebP": (encoded(plain("RGBA", (*COLOUR, 0)), "WEBP", lossless=True), (0, 0, 0)),
    "animated GIF": (frames("GIF"), COLOUR),
    "animated WebP": (frames("WEBP", lossless=True), COLOUR),
    "animated PNG": (frames("PNG"), COLOUR),
    "TIFF of several pages": (frames("TIFF"), COLOUR),
    "GIF of 500 frames": (
        encoded(plain(), "GIF", save_all=True, append_images=[plain(), plain("L", 9)] * 250),
        COLOUR,
    ),
    "1 x 1": (encoded(plain(size=(1, 1)), "PNG"), COLOUR),
    "1 x 10000": (encoded(plain(size=(1, 10_000)), "PNG"), COLOUR),
    "10000 x 1": (encoded(plain(size=(10_000, 1)), "PNG"), COLOUR),
    "EXIF of nothing": (with_exif(b""), COLOUR),
    "EXIF of garbage": (with_exif(b"garbage" * 9), COLOUR),
    "EXIF cut short": (with_exif(b"II*\0\x08\0\0\0\xff\xff\x12"), COLOUR),
    "EXIF that leads nowhere": (with_exif(b"II*\0\xff\xff\xff\x7f"), COLOUR),
    "EXIF that leads to itself": (with_exif(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"), COLOUR),
    "EXIF with an unknown orientation": (with_exif(orientation(b"\x63\0\0\0")), COLOUR),
    "EXIF with an orientation in letters": (with_exif(orientation(b"up\0\0", kind=2)), COLOUR),
    "EXIF with a good orientation": (with_exif(orientation(b"\x06\0\0\0")), COLOUR),
    "PNG with a broken colour profile": (encoded(plain(), "PNG", icc_profile=b"x" * 50), COLOUR),
    "PNG with a long comment": (encoded(plain(), "PNG", pnginfo=TEXT), COLOUR),
    "PNG with an unknown chunk": (
        png(8, 8, 8, 2, bytes(COLOUR) * 8, (b"evIl", b"x" * 99)),
        COLOUR,
    ),
}

# The name of a file: all are read by their content.
ODD_NAMES = [
    "a.jpg",
    "a",
    "A.PNG.exe",
    "a\nb.png",
    "a\r\x1b[31m\x07.png",
    "a'b\"c`d.png",
    "$(rm -rf ~).png",
    "<script>alert(1)</script>.png".replace("/", "\u2215"),
    "-rf.png",
    "--help",
    "a..b.png",
    "a b\t.png",
    "a%s{0}%n.png",
    "x" * 251 + ".png",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "\u202egnp.png",
    "قطة.png",
    "😀.png",
    os.fsdecode(b"\xff\xfe.png"),
]


def test_odd_images(tally, make):
    with tally("odd images") as fault:
        for name, (content, colour) in ODD_IMAGES.items():
            with fault.trial(name):
                root = make()
                (root / "train/cat/a").write_bytes(content)
                became = load(root).train.images[3].int()
                expected = torch.tensor(colour)[:, None, None]
                assert (became - expected).abs().max() <= 4, became[:, 4, 4].tolist()


def test_odd_file_names(tally, make):
    with tally("odd names of files") as fault:
        for name in ODD_NAMES:
            with fault.trial(ascii(name)):
                root = make()
                path = root / "train/cat" / name
                path.write_bytes(encoded(plain(), "PNG"))
                images = load(root).train.images
                assert (images[:4, :, 0, 0] == torch.tensor(COLOUR)).all(1).sum() == 1
                path.write_bytes(b"no image")
                refused("image_folder", root, "train/cat", "no image that can be read")


def claims(width: int, height: int) -> dict[str, bytes]:
    """Return headers, of formats without the pixels, that claim a size."""
    short = struct.pack("<HH", min(width, 65535), min(height, 65535))
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (279, 9))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return {
        "PNG": png(width, height, 8, 2, b""),
        "GIF": b"GIF89a" + short + b"\x80\0\0" + bytes(6) + b",\0\0\0\0" + short + b"\0\x02\0;",
        "BMP": b"BM"
        + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, width, height, 1, 24, *WIDE, 0, 0),
        "TIFF": b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4),
        "PPM": b"P6 %d %d 255\n" % (width, height),
    }


NOISE = Image.fromarray(np.random.RandomState(0).randint(256, size=(64, 64, 3)).astype(np.uint8))
NOISY = {kind: encoded(NOISE, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}

BAD_IMAGES: dict[str, bytes] = {
    "no bytes": b"",
    "one byte": b"\x89",
    "zeros": bytes(5000),
    "text": b"no image\n",
    "a web page": b"<!doctype html><title>404</title>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch ran) system\n",
    "PDF": b"%PDF-1.7\n",
    "an archive": b"PK\x03\x04" + bytes(99),
    "a pickle": pickle.dumps(np.zeros((8, 8, 3), np.uint8)),
    "an icon": encoded(plain(size=(16, 16)), "ICO"),
    "JPEG 2000": encoded(plain(), "JPEG2000"),
    "a thumbnail of Windows": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(999),
    "floating point": encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
    "negative integers": encoded(Image.fromarray(np.full((8, 8), -1, np.int32)), "TIFF"),
    "PNG of no pixels": png(0, 0, 8, 2, b""),
    "PNG of no width": png(0, 8, 8, 2, b""),
    "PNG without pixels": png(8, 8, 8, 2, b""),
    "PNG of unknown depth": png(8, 8, 7, 2, bytes(24)),
    "PNG whose comment is a bomb": png(
        8, 8, 8, 2, bytes(24), (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
    ),
    "PNG whose pixels are garbage": broken(NOISY["PNG"], 0.5),
    "PNG whose header is garbage": broken(NOISY["PNG"], 0.001, b"\0" * 40),
    "TIFF whose header is garbage": broken(NOISY["TIFF"], 0, b"II*\0\xff\xff\xff\xff"),
    "BMP whose header is garbage": broken(NOISY["BMP"], 0, b"BM" + b"\xff" * 40),
    **{f"{kind} cut to a half": content[: len(content) // 2] for kind, content in NOISY.items()},
    **{f"{kind} cut to 20 bytes": content[:20] for kind, content in NOISY.items()},
    **{f"{kind} of 9000 x 9000 that has no pixels": c for kind, c in claims(9000, 9000).items()},
}


def test_bad_images(tally, make):
    with tally("bad images") as fault:
        for name, content in BAD_IMAGES.items():
            with fault.trial(name):
                root = make()
                (root / "test/dog/a.png").write_bytes(content)
                refused("image_folder", root, "test/dog/a.png", "no image that can be read")


def test_decompression_bombs(tally, tmp_path):
    bombs = claims(20_000, 20_000) | {
        "PNG with its pixels": png(20_000, 20_000, 1, 0, bytes(2500)),
        "long PNG": png(1, 2**31 - 1, 8, 2, b""),
        "largest PNG": png(2**31 - 1, 2**31 - 1, 8, 2, b""),
    }
    folders = []
    for name, content in bombs.items():
        folders.append(small_project(tmp_path / name))
        (folders[-1] / "data/train/cat/a.png").write_bytes(content)
    answers = check_with_little_memory(folders, megabytes=200)
    with tally("decompression bombs, 200 MB to spare") as fault:
        for name, (code, line) in zip(bombs, answers, strict=True):
            with fault.trial(name):
                assert code == 2, line
                assert line.startswith("permafrost: split.root: ")
                assert "too many pixels" in line, line
                assert line[:-1].isprintable()
