"""Pictures that visitors of the page upload, within limits of size."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from atp_patch.contract.errors import InputError
from atp_patch.tools.pictures import read_image

MAX_MB = 10
MAX_PIXELS = 16_000_000


def read_upload(path: str | Path) -> Image.Image:
    """Read an uploaded file as 8-bit RGB.

    Raises:
        InputError: if it is no picture, broken, above `MAX_MB` or above `MAX_PIXELS`. The message
            names the file without the folder in which the server keeps it.
    """
    file = Path(path)
    size_mb = file.stat().st_size / 1e6
    if size_mb > MAX_MB:
        raise InputError(
            f"{file.name} has {size_mb:.1f} MB, more than the {MAX_MB} MB that this page takes; "
            "scale the picture down."
        )
    try:
        return read_image(file, MAX_PIXELS)
    except InputError as error:
        raise InputError(str(error).replace(str(file), file.name)) from error
