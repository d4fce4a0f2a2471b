"""Pictures of every kind are read as a person sees them; what is right is worked out by numpy."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from atp_patch.contract.errors import InputError
from atp_patch.tools.pictures import read_image
from atp_patch.training.records import LlavaFile
from tests.training.conftest import record

Array = NDArray[Any]
RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)  # black to white
ORIENTATION = 0x0112
# EXIF orientation -> what puts the stored picture upright
UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def read(path: Path) -> Array:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey(values: Array) -> Array:
    """(height, width, 3) of shades 0 to 255."""
    return np.repeat(np.rint(values)[..., None].astype(int), 3, axis=-1)


def colours(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def png_16(path: Path, samples: Array, transparent: int | None = None) -> None:
    """A greyscale PNG of 16 bits, byte by byte, as its specification says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
        + key
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(
    path: Path,
    samples: Array,
    *,
    bits: int,
    kind: int,
    order: str = "<",
    photometric: int = 1,
    orientation: int = 1,
    packed: bytes | None = None,
) -> None:
    """A greyscale TIFF in one strip; ``kind``: 1 unsigned, 2 signed, 3 floating point."""
    height, width = samples.shape
    data = packed or samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    entries += [(273, 8), (274, orientation), (277, 1), (278, height), (279, len(data))]
    entries += [(339, kind)]
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    table = struct.pack(order + "H", len(entries))
    table += b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes(head + data + table + struct.pack(order + "I", 0))


def test_16_bit_png(tmp_path: Path) -> None:
    samples = np.rint(RAMP * 65535).astype(np.uint16)
    png_16(tmp_path / "a.png", samples)
    assert np.array_equal(read(tmp_path / "a.png"), grey(samples / 257))
    Image.fromarray(samples).save(tmp_path / "b.png")
    assert np.array_equal(read(tmp_path / "b.png"), grey(samples / 257))
    dark = (samples // 16).astype(np.uint16)  # a picture in which nothing is bright stays dark
    png_16(tmp_path / "dark.png", dark)
    assert np.array_equal(read(tmp_path / "dark.png"), grey(dark / 257))


def test_a_transparent_shade_of_a_16_bit_png_is_white(tmp_path: Path) -> None:
    samples = np.array([[0, 1000, 65535], [1000, 20000, 1001]], dtype=np.uint16)
    png_16(tmp_path / "a.png", samples, transparent=1000)
    expected = np.where(samples == 1000, 255, np.rint(samples / 257))
    assert np.array_equal(read(tmp_path / "a.png"), grey(expected))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("dtype", "kind", "white"),
    [
        (np.uint16, 1, 65535),
        (np.int16, 2, 32767),
        (np.int32, 2, 255),
        (np.int32, 2, 65535),
        (np.int32, 2, 2**31 - 1),
        (np.float32, 3, 1),
    ],
)
def test_deep_tiff(dtype: Any, kind: int, white: int, order: str, tmp_path: Path) -> None:
    samples = (RAMP * white).astype(dtype)
    tiff(tmp_path / "a.tif", samples, bits=samples.itemsize * 8, kind=kind, order=order)
    expected = grey(samples.astype(np.float64) * 255 / white)
    assert np.array_equal(read(tmp_path / "a.tif"), expected)


def test_12_bit_tiff(tmp_path: Path) -> None:
    samples = np.rint(RAMP * 4095).astype(np.uint16)
    pairs = samples.reshape(-1, 2)  # two samples are three bytes, the high bits first
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1
    )
    tiff(tmp_path / "a.tif", samples, bits=12, kind=1, packed=packed.astype(np.uint8).tobytes())
    assert np.array_equal(read(tmp_path / "a.tif"), grey(samples * (255 / 4095)))


def test_unsigned_32_bit_tiff(tmp_path: Path) -> None:
    samples = (RAMP * (2**32 - 1)).astype(np.uint32)
    tiff(tmp_path / "a.tif", samples, bits=32, kind=1)
    assert np.array_equal(read(tmp_path / "a.tif"), grey(samples * (255 / (2**32 - 1))))


@pytest.mark.parametrize(("dtype", "kind", "white"), [(np.uint16, 1, 65535), (np.float32, 3, 1)])
def test_tiff_in_which_zero_is_white(dtype: Any, kind: int, white: int, tmp_path: Path) -> None:
    samples = (RAMP * white).astype(dtype)
    tiff(tmp_path / "a.tif", samples, bits=samples.itemsize * 8, kind=kind, photometric=0)
    expected = 255 - grey(samples.astype(np.float64) * 255 / white)
    assert np.array_equal(read(tmp_path / "a.tif"), expected)


def test_floating_point_of_whole_numbers_is_8_bit(tmp_path: Path) -> None:
    samples = np.rint(RAMP * 255).astype(np.float32)
    Image.fromarray(samples).save(tmp_path / "a.tif")
    assert np.array_equal(read(tmp_path / "a.tif"), grey(samples))


@pytest.mark.parametrize("white", [65535, 1023])
def test_deep_pgm(white: int, tmp_path: Path) -> None:
    samples = np.rint(RAMP * white).astype(">u2")
    head = f"P5 {samples.shape[1]} {samples.shape[0]} {white}\n".encode()
    (tmp_path / "a.pgm").write_bytes(head + samples.tobytes())
    assert np.abs(read(tmp_path / "a.pgm") - grey(samples * (255.0 / white))).max() <= 1


@pytest.mark.parametrize(
    ("samples", "kind", "part"),
    [
        (np.float32([[0, np.nan]]), 3, "NaN or infinity"),
        (np.float32([[0, np.inf]]), 3, "NaN or infinity"),
        (np.float32([[0, 7.5]]), 3, "which is white"),
        (np.float32([[-0.5, 1]]), 3, "negative"),
        (np.int32([[-70000, 90000]]), 2, "negative"),
        (np.int32([[0, 70000]]), 2, "one even shade"),
        (np.float32([[0, 1e-4]]), 3, "one even shade"),
    ],
)
def test_samples_that_do_not_say_what_is_white(
    samples: Array, kind: int, part: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    tiff(path, samples, bits=32, kind=kind)
    with pytest.raises(InputError, match=part) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "give finite" in str(caught.value) or "scale" in str(caught.value)


@pytest.mark.parametrize("shade", [0.0, 0.25, 1.0])
def test_an_even_picture_is_one_shade(shade: float, tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", np.full((3, 4), shade, np.float32), bits=32, kind=3)
    assert np.array_equal(read(tmp_path / "a.tif"), grey(np.full((3, 4), 255 * shade)))


def over_white(rgb: Array, alpha: Array) -> Array:
    """Colours laid over white by the formula."""
    share = alpha[..., None] / 255.0
    return rgb * share + 255 * (1 - share)


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    rgb = colours()
    alpha = np.random.default_rng(1).integers(0, 256, (48, 64), dtype=np.uint8)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([rgb[..., 0], alpha]), "LA").save(tmp_path / "la.png")
    found = read(tmp_path / "rgba.png")
    assert np.abs(found - over_white(rgb, alpha)).max() <= 1
    found = read(tmp_path / "la.png")
    assert np.abs(found - over_white(grey(rgb[..., 0]), alpha)).max() <= 1
    opaque = np.full_like(alpha, 255)
    Image.fromarray(np.dstack([rgb, opaque])).save(tmp_path / "opaque.png")
    assert np.array_equal(read(tmp_path / "opaque.png"), rgb)


@pytest.mark.parametrize("transparency", [None, 2, bytes([255, 128, 0, 255])])
def test_palette(transparency: int | bytes | None, tmp_path: Path) -> None:
    table = np.array([[255, 0, 0], [0, 0, 200], [10, 250, 30], [0, 0, 0]], dtype=np.uint8)
    numbers = np.random.default_rng(0).integers(0, 4, (48, 64), dtype=np.uint8)
    image = Image.fromarray(numbers, "P")
    image.putpalette(table.tobytes())
    more = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **more)
    alphas = np.full(4, 255)
    if isinstance(transparency, int):
        alphas[transparency] = 0
    elif transparency is not None:
        alphas = np.array(list(transparency))
    expected = over_white(table[numbers], alphas[numbers])
    assert np.abs(read(tmp_path / "a.png") - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour(mode: str, tmp_path: Path) -> None:
    samples = colours()[..., 0] if mode == "L" else colours()
    key = samples[5, 7].tolist()
    Image.fromarray(samples).save(
        tmp_path / "a.png", transparency=key if mode == "L" else tuple(key)
    )
    rgb = grey(samples) if mode == "L" else samples.astype(int)
    rgb = np.where((rgb == rgb[5, 7]).all(-1, keepdims=True), 255, rgb)
    assert np.array_equal(read(tmp_path / "a.png"), rgb)


def test_black_and_white(tmp_path: Path) -> None:
    bits = RAMP > 0.3
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), grey(bits * 255))


def test_cmyk(tmp_path: Path) -> None:
    inks = np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    share = 1 - inks.astype(np.float64) / 255
    expected = 255 * share[..., :3] * share[..., 3:]
    assert np.abs(read(tmp_path / "a.tif") - expected).max() <= 1
    even = np.full((48, 64, 4), (0, 255, 255, 0), dtype=np.uint8)  # no cyan and no black: red
    Image.fromarray(even, "CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(read(tmp_path / "a.jpg") - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_an_animation_gives_its_first_frame(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((200, 30, 30), (0, 0, 255))]
    more: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **more)
    found = read(tmp_path / name)
    assert found.shape == (10, 20, 3)
    assert np.abs(found - [200, 30, 30]).max() <= 1


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    stored = colours()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), UPRIGHT[orientation](stored))
    tiff(tmp_path / "b.tif", stored[..., 0], bits=8, kind=1, orientation=orientation)
    assert np.array_equal(read(tmp_path / "b.tif"), grey(UPRIGHT[orientation](stored[..., 0])))
    deep = np.rint(RAMP * 65535).astype(np.uint16)
    tiff(tmp_path / "a.tif", deep, bits=16, kind=1, orientation=orientation)
    assert np.array_equal(read(tmp_path / "a.tif"), grey(UPRIGHT[orientation](deep) / 257))


def test_training_reads_the_same(tmp_path: Path) -> None:
    samples = np.rint(RAMP * 65535).astype(np.uint16)
    png_16(tmp_path / "deep.png", samples)
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([record(image="deep.png")]), encoding="utf-8")
    found = LlavaFile(file, tmp_path, max_image_pixels=50_000)[0].images[0]
    assert np.array_equal(np.asarray(found), grey(samples / 257))
