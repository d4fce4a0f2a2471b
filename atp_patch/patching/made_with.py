"""What an adapter was made with: which checkpoint, told by its name and a fingerprint, and which
versions of the libraries.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from torch import Tensor, nn

from atp_patch.contract.arguments import check_fields
from atp_patch.contract.errors import ConfigError, OtherBaseWarning, WeightsError
from atp_patch.patching.config import entries, parse_table
from atp_patch.version import __version__

KEY = "made_with"  # of the adapter's configuration file
_SAMPLES = 32  # how many numbers of each parameter the fingerprint reads
# What wrappers (PEFT, torch.compile, FSDP, checkpointing) put into the names of parameters.
_WRAPPED = re.compile(
    r"\b(base_layer|original_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_ADDED = re.compile(r"\b(lora_\w+|modules_to_save)\.")


@dataclass(frozen=True)
class MadeWith:
    """What an adapter was made with; None stands for what is not known.

    Attributes:
        base_model: the name of the checkpoint on the Hub, or of a built-in model.
        base_revision: the commit of the checkpoint.
        fingerprint: :func:`fingerprint` of the model's decoder.
        atp_patch, torch, transformers: versions of the libraries.
    """

    base_model: str | None = None
    base_revision: str | None = None
    fingerprint: str | None = None
    atp_patch: str | None = None
    torch: str | None = None
    transformers: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, model: Any, decoder: nn.Module) -> MadeWith:
        """Read what a model is.

        Args:
            model: the whole model, without wrappers.
            decoder: its decoder.
        """
        name, revision = checkpoint_of(model)
        return cls(
            base_model=name,
            base_revision=revision,
            fingerprint=fingerprint(model, decoder),
            atp_patch=__version__,
            torch=str(torch.__version__),
            transformers=transformers.__version__,
        )

    @classmethod
    def from_json(cls, text: str, where: str) -> MadeWith:
        """Read the table of an adapter's configuration; adapters of the first release have none.

        Raises:
            WeightsError: if the table is broken.
        """
        try:
            table = parse_table(text).get(KEY)
            return cls() if table is None else cls(**entries(KEY, table, cls))
        except ConfigError as error:
            raise WeightsError(f"{where}: {error}") from error

    def warn_of_another(self, model: Any, decoder: nn.Module, adapter: str) -> None:
        """Warn where an adapter was made for another checkpoint of the same shapes.

        Fingerprints are compared, or names where a fingerprint is not known. A model without its
        weights is compared with nothing.

        Args:
            model: the model that the adapter is loaded into, without wrappers.
            decoder: its decoder.
            adapter: the adapter's source.
        """
        if all(parameter.is_meta for parameter in decoder.parameters()):
            return
        name, revision = checkpoint_of(model)
        here = None if self.fingerprint is None else fingerprint(model, decoder)
        if here is not None:
            other = self.fingerprint != here
        else:
            known = ((self.base_model, name), (self.base_revision, revision))
            other = any(made and found and made != found for made, found in known)
        if other:
            path = getattr(model.config, "_name_or_path", None)
            this = f"{name or path or type(model).__name__}{_at(revision)}"
            warnings.warn(
                f"{adapter} was made for {self.base}, and this model is {this}, of the same shapes "
                "but with other weights: what the adapter keeps may not fit it. Load the model it "
                "was made for, or calibrate and measure it here.",
                OtherBaseWarning,
                stacklevel=4,
            )

    @property
    def base(self) -> str:
        """The checkpoint's name and commit, or that it is not known."""
        if self.base_model is None:
            return "a checkpoint whose name is not known"
        return f"{self.base_model}{_at(self.base_revision)}"


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at {revision[:12]}"


def checkpoint_of(model: Any) -> tuple[str | None, str | None]:
    """Return the name on the Hub and the commit from which transformers loaded a model.

    Returns:
        None for what is not known. The path of a folder is no name: it says nothing elsewhere.
        Newer versions of transformers forget the commit; then it is known where the Hub's cache
        holds one commit of that checkpoint alone.
    """
    config = getattr(model, "config", None)
    name, commit = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None, None
    if isinstance(commit, str):
        return name, commit
    if Path(name).exists():
        return None, None
    folder = repo_folder_name(repo_id=name, repo_type="model")
    found = [*Path(constants.HF_HUB_CACHE, folder, "snapshots").glob("*/config.json")]
    return name, found[0].parent.name if len(found) == 1 else None


@torch.no_grad()
def fingerprint(model: Any, decoder: nn.Module) -> str | None:
    """Return a hash of numbers from every parameter of a decoder.

    It stays the same under PEFT's LoRA, under wrappers, on other devices, and in float32, bfloat16
    and the dtype of the checkpoint's files. Other weights change it.

    Returns:
        16 hexadecimal digits; None where weights are quantised, offloaded, or spread over
        processes.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        return None
    samples: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        if _ADDED.search(name):
            continue
        spread = hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_numel")
        if parameter.is_meta or spread or not parameter.is_floating_point():
            return None
        flat = parameter.detach().reshape(-1)
        step = max(flat.numel() // _SAMPLES, 1)
        samples[_WRAPPED.sub("", name)] = flat[::step][:_SAMPLES].to(torch.bfloat16)
    digest = hashlib.sha256()
    for name, sample in sorted(samples.items()):
        digest.update(name.encode())
        digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
