"""Where the files of an adapter lie: in a folder, or in a repository on the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils.tqdm import tqdm

from atp_patch.contract.arguments import as_kind, shown
from atp_patch.contract.errors import ConfigError, HubError, WeightsError, first_line
from atp_patch.patching.hub_errors import HUB_ERRORS, explained

CONFIG_FILE = "atp_config.json"
WEIGHTS_FILE = "atp_model.safetensors"
CARD_FILE = "README.md"
_MOST_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class AdapterSource:
    """A folder, or a repository on the Hub, with the arguments of ``from_pretrained``.

    Attributes:
        place: the folder, or the name of the repository.
        revision: a branch, a tag or a commit of the repository; None: its default branch.
        token: the token to read with; True: the stored one; None: the stored one if there is one.
        subfolder: the folder of the files inside the repository or folder.
        cache_dir: the folder where downloads are kept; None: the Hub client's own.
        local_files_only: whether only what was downloaded before may be used.

    Raises:
        ConfigError: if an argument is of another kind, or the subfolder leads outside.
    """

    place: str
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    subfolder: str = ""
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        as_kind("revision", self.revision, "str | None")
        as_kind("subfolder", self.subfolder, "str")
        as_kind("local_files_only", self.local_files_only, "bool")
        if not isinstance(self.token, (str, bool, type(None))):
            raise ConfigError("token: give a word, True or False.")
        inside = PurePosixPath(self.subfolder)
        if inside.is_absolute() or ".." in inside.parts:
            raise ConfigError(f"subfolder={shown(self.subfolder)} leads out of the repository.")
        if self.revision is not None and self.is_local:
            raise ConfigError(
                f"{self.place} is a folder here, which has no revision {shown(self.revision)}; "
                "leave revision= out."
            )

    @classmethod
    def of(cls, weights: Any, name: str = "weights", **arguments: Any) -> AdapterSource:
        """Make a source from the arguments of a function.

        Args:
            weights: a folder or the name of a repository.
            name: what the function calls that argument.
            arguments: the other attributes by name.
        """
        if not isinstance(weights, (str, Path)):
            raise ConfigError(
                f"{name}={shown(weights)}: give a folder or the name of a Hub repository."
            )
        return cls(str(weights), **arguments)

    def __str__(self) -> str:
        """Return the source as error messages call it."""
        place = f"{self.place}/{self.subfolder}" if self.subfolder else self.place
        return place if self.revision is None else f"{place}@{self.revision}"

    @property
    def is_local(self) -> bool:
        """Whether the place is a folder here."""
        return is_folder(self.place)

    @cached_property
    def folder(self) -> Path:
        """The folder of the adapter's files. From the Hub they are fetched, of one commit, and
        nothing else is: no other file of a repository is read.

        Raises:
            HubError: if the Hub refuses them or cannot be reached.
            WeightsError: if the name can be neither a folder's nor a repository's, or if there is
                no adapter.
        """
        return self.with_files(CONFIG_FILE, WEIGHTS_FILE)

    def with_files(self, *patterns: str) -> Path:
        """Return the folder with the files that match patterns; errors as for :attr:`folder`."""
        if self.is_local:
            folder = Path(self.place, self.subfolder)
        else:
            folder = Path(self._downloaded(patterns), self.subfolder)
        if not (folder / CONFIG_FILE).is_file():
            mend = "give a folder that save_pretrained wrote"
            if not self.is_local:
                mend = "give a repository that push_to_hub or `atp-patch push` wrote"
            raise WeightsError(
                f"{self} is no adapter: it has no {CONFIG_FILE}; {mend}, and subfolder= if the "
                "adapter lies deeper."
            )
        return folder

    def file(self, name: str) -> Path:
        """Return the path of one of the adapter's files.

        Raises:
            WeightsError: if it is missing; otherwise as for :attr:`folder`.
        """
        file = self.folder / name
        if not file.is_file():
            raise WeightsError(f"{self} has no {name}; save or push the adapter anew.")
        return file

    def pinned(self, commit: str) -> AdapterSource:
        """Return the same source at one commit."""
        return replace(self, revision=commit)

    def _downloaded(self, patterns: tuple[str, ...]) -> str:
        """Return the folder of the repository's files in the cache."""
        inside = PurePosixPath(self.subfolder)
        try:
            return snapshot_download(
                self.place,
                revision=self.revision,
                cache_dir=self.cache_dir,
                token=self.token,
                local_files_only=self.local_files_only,
                allow_patterns=[str(inside / pattern) for pattern in patterns],
                library_name="atp_patch",
                tqdm_class=_Bar,
            )
        except HFValidationError as error:
            raise WeightsError(
                f"{shown(self.place)} is neither a folder nor the name of a repository on the Hub; "
                "check it, or give a folder that save_pretrained wrote."
            ) from error
        except HUB_ERRORS as error:
            raise HubError(explained(error, self.place, self.revision)) from error


class _Bar(tqdm):
    """The Hub client's progress bar, where stderr is a terminal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["disable"] = kwargs.get("disable") or None
        super().__init__(*args, **kwargs)


def is_folder(source: str | Path) -> bool:
    """Return whether a folder of this name exists; False for names that are not valid paths."""
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):
        return False


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
