"""Pictures of every kind that Pillow opens, read as 8-bit RGB the way a person sees them.

``Image.convert("RGB")`` alone would clip deep greyscale to 0-255, so that 16-bit pictures came out
white and floating-point ones black, and would show what is hidden beneath transparent pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from atp_patch.contract.errors import InputError
from atp_patch.tools.loading import first_line

_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # modes with one channel of over 8 bits
_WITH_ALPHA = ("P", "PA", "LA", "RGBA", "RGBa")
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # values of the TIFF tags for photometry and sample format
_HALF_STEP = 0.5 / 255  # of the 8-bit result, where white is 1


def read_image(path: Path, max_image_pixels: int | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB, in the orientation that its EXIF data asks for.

    Transparent pixels are laid over white, an animation gives its first frame, and deep greyscale
    is scaled so that its white is 255. White is the largest value of the file's integers (65535 for
    16 bits). The formats with 32-bit integers do not say what white is, so it is the largest value
    of 8, 16, 31 or 32 bits, whichever is the least that holds every sample. White is 1 in floating
    point, or 255 where every sample is a whole number. Colour profiles are not applied.

    Args:
        max_image_pixels: the most pixels that a picture may have, where there is a limit.

    Raises:
        InputError: where the file is missing, a folder, no picture, broken or too large, or where
            its samples do not say which of them is white.
    """
    # Pillow is given the open file, because by its name it would map an uncompressed picture into
    # memory, and some versions then confuse the stored with the upright width and height.
    with _explained(str(path)):
        stream = path.open("rb")
    with stream:
        return read_stream(stream, str(path), max_image_pixels)


def read_stream(
    stream: IO[bytes],
    name: str,
    max_image_pixels: int | None = None,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Read a picture from an open file, as :func:`read_image` does.

    Args:
        stream: the file, which can be searched.
        name: what errors call it.
        max_image_pixels: the most pixels that a picture may have, where there is a limit.
        formats: Pillow's names of the formats that may be read; all of them by default.

    Raises:
        InputError: as :func:`read_image`.
    """
    with _explained(name), Image.open(stream, formats=formats) as file:
        width, height = file.size
        if max_image_pixels is not None and width * height > max_image_pixels:
            raise InputError(
                f"{name} is too large: {width} x {height} pixels, more than max_image_pixels="
                f"{max_image_pixels}; scale it down."
            )
        upright = ImageOps.exif_transpose(file)
        if file.mode not in _DEEP:
            return _opaque(upright).convert("RGB")
    return Image.fromarray(_as_8_bit(name, file, upright)).convert("RGB")


def _opaque(image: Image.Image) -> Image.Image:
    """Return the picture laid over white, if any of it can be transparent."""
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _as_8_bit(name: str, file: Image.Image, upright: Image.Image) -> NDArray[np.uint8]:
    """Return the deep greyscale picture, scaled to 0-255, (height, width).

    Args:
        name: what errors call the file.
        file: the opened file, whose tags say what its samples mean.
        upright: its picture, in the right orientation.
    """
    tags: Any = getattr(file, "tag_v2", {})
    samples = np.asarray(upright)
    if file.mode == "I" and file.format == "TIFF" and _tag(tags, SAMPLEFORMAT) == _UNSIGNED:
        samples = samples.view(np.uint32)  # Pillow reads them into signed integers
    if not np.isfinite(samples).all():
        raise InputError(f"{name} holds NaN or infinity; give finite values from 0 (black) up.")
    low, high = float(samples.min()), float(samples.max())
    white = _white(name, file, tags, samples, high)
    if low < (-_HALF_STEP if file.mode == "F" else 0):
        raise InputError(
            f"{name} holds values from {low:g} to {high:g}, and nothing says how dark a negative "
            "one is; scale them to 0 (black) to 255 (white) and save them with 8 bits."
        )
    shades = np.rint(samples * (255.0 / white)).clip(0, 255)
    if file.mode in ("I", "F") and low < high and shades.min() == shades.max():
        raise InputError(
            f"{name} would be one even shade: its values run from {low:g} to {high:g}, where white "
            f"is {white:g}; scale them to 0 (black) to 255 (white) and save them with 8 bits."
        )
    if tags and tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        shades = 255 - shades
    if "transparency" in file.info:  # the value of transparent samples, in PNG
        shades[samples == file.info["transparency"]] = 255
    return shades.astype(np.uint8)


def _white(name: str, file: Image.Image, tags: Any, samples: NDArray[Any], high: float) -> float:
    """Return the sample value that is white, by the rules of :func:`read_image`."""
    if file.mode == "F":
        if high <= 1 + _HALF_STEP:
            return 1.0
        if high <= 255 and bool((samples == np.rint(samples)).all()):
            return 255.0
        raise InputError(
            f"{name} holds floating-point values up to {high:g}, and nothing says which is white; "
            "scale them to 0 (black) to 1 (white)."
        )
    bits, signed = 16, False
    if file.format == "TIFF":
        bits, signed = _tag(tags, BITSPERSAMPLE), _tag(tags, SAMPLEFORMAT) != _UNSIGNED
    if file.mode != "I" or file.format in ("PNG", "PPM") or bits < 32:
        return float(2 ** (bits - signed) - 1)
    return float(next(2**wide - 1 for wide in (8, 16, 31, 32) if high < 2**wide))


def _tag(tags: Any, name: int) -> int:
    """Return the first value of a TIFF tag; 1 is TIFF's own default of the tags asked for here."""
    value = tags.get(name, 1)
    return int(value[0] if isinstance(value, tuple) else value)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no image {name}; check the path.") from error
    except IsADirectoryError as error:
        raise InputError(f"{name} is a folder; give the path of an image file.") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is not an image that Pillow can read; give a PNG or a JPEG file."
        ) from error
    except Exception as error:  # Pillow's readers raise every kind of error for broken files
        raise InputError(
            f"{name} cannot be read ({first_line(error)}); give an image file that is whole."
        ) from error
