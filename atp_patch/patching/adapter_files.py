"""Where the files of an adapter lie: in a folder, or in a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import hf_hub_download

from atp_patch.contract.arguments import shown
from atp_patch.contract.errors import WeightsError, first_line

CONFIG_FILE = "atp_config.json"
WEIGHTS_FILE = "atp_model.safetensors"
CARD_FILE = "README.md"
_MOST_CONFIG_BYTES = 2**20
# What the Hub's client raises: errors of its HTTP library, of files and sockets, and of uploads.
HUB_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    EntryNotFoundError,
    HFValidationError,
    RuntimeError,
)


def is_folder(source: str | Path) -> bool:
    """Whether a folder of this name exists; False for names that are not valid paths."""
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):
        return False


def fetched(source: str | Path, name: str) -> Path:
    """Return the path of an adapter's file, from a folder if there is one, else from the Hub."""
    if is_folder(source):
        folder, file = Path(source), Path(source, name)
        if file.is_file():
            return file
        raise WeightsError(f"{folder} has no {name}; give a folder that save_pretrained wrote.")
    try:
        return Path(hf_hub_download(str(source), name))
    except HUB_ERRORS as error:
        raise WeightsError(
            f"{shown(str(source))} is neither a folder nor an adapter on the Hub that can be "
            f"reached ({type(error).__name__}); check the name, or give a folder that "
            "save_pretrained wrote."
        ) from error


def read_text(file: Path, where: str) -> str:
    """Read the text of a configuration file, which error messages call ``where``.

    Raises:
        WeightsError: if the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        if file.stat().st_size > _MOST_CONFIG_BYTES:
            raise WeightsError(f"{where} is too large for a configuration.")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{where} is no text in UTF-8 ({error}).") from error
    except OSError as error:
        raise WeightsError(f"{where} cannot be read ({first_line(error)}).") from error
