"""Images that are compressed before any question to a few keys and values, which can be saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from atp_patch.contract.errors import ConfigError, InputError, WeightsError
from atp_patch.patching.api import require_patch
from atp_patch.patching.evaluating import evaluating
from atp_patch.patching.patch import Patch
from atp_patch.patching.voco import VoCoPart
from atp_patch.seam import CACHE_ARGUMENT, CachedPrompt, for_model, read_ahead

VERSION = 1
TABLES = ("positions", "valid", "attention_mask", "following")


@dataclass(frozen=True)
class VisualCache:
    """What a model with VoCo tokens keeps of a prompt's images, and of the text among them.

    Attributes:
        held: the keys and values, with their positions.
        attention_mask: (B, L) int64, the prompt's attention mask, which is 0 at padding.
        following: (r, B) int64 position ids of the token that follows.
        model: the :func:`fingerprint` of the model that made it; no other model can use it.
    """

    held: CachedPrompt
    attention_mask: Tensor
    following: Tensor
    model: str

    @property
    def batch(self) -> int:
        """The number of prompts that were compressed together."""
        return int(self.attention_mask.shape[0])

    @property
    def tokens(self) -> tuple[int, ...]:
        """The number of tokens that each prompt keeps: its text, and its images' VoCo tokens."""
        return tuple(self.held.valid.sum(1).tolist())

    @property
    def nbytes(self) -> int:
        """The size of the keys and values in bytes."""
        return sum(t.nbytes for t in (*self.held.keys, *self.held.values))

    def inputs(
        self, model: nn.Module, question: Mapping[str, Tensor] | Tensor, beams: int = 1
    ) -> dict[str, Any]:
        """Make arguments of ``model(...)`` or ``model.generate(...)`` for the text that follows.

        ``generate`` returns the question and the answer, without what was compressed.

        Args:
            model: the patched model that made the cache.
            question: ids (B, T), or a tokenizer's ``input_ids`` and ``attention_mask``, padded on
                the left and without special tokens in front. There may be any number of questions
                about one compressed prompt.
            beams: sequences that ``generate`` makes of each question: its ``num_beams``, or its
                ``num_return_sequences`` where it samples.

        Raises:
            WeightsError: where another model made the cache.
            InputError: where the numbers of prompts and questions do not go together.
        """
        _check_model(model, self.model, "this cache")
        given = {"input_ids": question} if isinstance(question, Tensor) else dict(question)
        ids = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(ids))
        if ids.shape[0] % self.batch or (self.batch > 1 and ids.shape[0] != self.batch):
            raise InputError(
                f"{ids.shape[0]} questions about {self.batch} compressed prompts; give one "
                "question each, or compress one prompt."
            )
        repeats = ids.shape[0] // self.batch
        count = (mask.long().cumsum(-1) - 1).clamp(min=0)
        start = self.following.to(ids.device).repeat_interleave(repeats, dim=1)
        earlier = self.attention_mask.to(mask).repeat_interleave(repeats, dim=0)
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([earlier, mask], dim=1),
            "position_ids": for_model(start[..., None] + count),
            CACHE_ARGUMENT: self.held.cache(repeats * beams),
        }

    def save(self, file: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {
            "positions": self.held.positions,
            "valid": self.held.valid,
            "attention_mask": self.attention_mask,
            "following": self.following,
        }
        for name in ("keys", "values"):
            for number, tensor in enumerate(getattr(self.held, name)):
                tensors[f"{name}.{number}"] = tensor
        about = {"version": VERSION, "length": self.held.length, "model": self.model}
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            file,
            metadata={"format": "pt", "atp_patch": json.dumps(about)},
        )

    @classmethod
    def load(cls, file: str | Path, model: nn.Module) -> VisualCache:
        """Read a file back for the patched model that made it, onto its device.

        Raises:
            WeightsError: where the file is missing, broken, or was made with another model.
        """
        path = Path(file)
        if not path.is_file():
            raise WeightsError(f"there is no file {path}; give one that VisualCache.save wrote.")
        device = str(_with_voco(model)[1].embedding.device)
        try:
            with safe_open(path, framework="pt", device=device) as opened:
                about = json.loads((opened.metadata() or {}).get("atp_patch", "null"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{path} is not a safetensors file ({error}).") from error
        if not isinstance(about, dict) or about.get("version") != VERSION:
            raise WeightsError(f"{path} holds no compressed images of version {VERSION}.")
        _check_model(model, about["model"], str(path))
        layers = (len(tensors) - len(TABLES)) // 2
        try:
            keys, values = (
                tuple(tensors[f"{name}.{number}"] for number in range(layers))
                for name in ("keys", "values")
            )
            positions, valid, attention_mask, following = (tensors[name] for name in TABLES)
        except KeyError as error:
            raise WeightsError(f"{path} has no tensor {error}; compress anew.") from error
        held = CachedPrompt(keys, values, positions, valid, about["length"])
        return cls(held, attention_mask, following, about["model"])


def compress(
    model: nn.Module, image_inputs: Mapping[str, Any], after: VisualCache | None = None
) -> VisualCache:
    """Read a prompt with images once, and keep its text and VoCo tokens without its visual tokens.

    Args:
        model: patched with ``method="voco"``.
        image_inputs: what its processor makes of the prompt up to the question (as of
            "USER: <image>"), padded on the left in a batch.
        after: the cache of an earlier segment that this one continues, such as a part of a video
            or another image. This segment's VoCo tokens see those of the earlier one.

    Raises:
        ConfigError: where the model is patched with another method.
        InputError: where there is no image, or not as many prompts as in ``after``.
        WeightsError: where another model made ``after``.
    """
    patch, _ = _with_voco(model)
    if not patch.seam.thread.enabled:
        raise ConfigError("nothing is compressed within atp_patch.disabled(model); leave it first.")
    inputs = dict(image_inputs)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not any(bool((ids == token_id).any()) for token_id in patch.visual_token_ids):
        raise InputError("the prompt to compress holds no image; pass the processor's inputs.")
    cache = start = None
    if after is not None:
        _check_model(model, after.model, "the earlier segment")
        if after.batch != ids.shape[0]:
            raise InputError(
                f"{ids.shape[0]} prompts cannot continue {after.batch} compressed ones."
            )
        mask = torch.cat([after.attention_mask.to(mask), mask], dim=1)
        cache, start = after.held.cache(), after.following
    # A model in training may use gradient checkpointing, which keeps no cache.
    with evaluating(model), torch.no_grad():
        inputs["attention_mask"] = mask
        made, following = read_ahead(patch.parts.base, inputs, cache, start)
    return VisualCache(CachedPrompt.of(made), mask, following, fingerprint(model))


def fingerprint(model: nn.Module) -> str:
    """Return a hash of what a cache depends on: the adapter, and a sample of each parameter of the
    vision tower, the projector and the decoder.
    """
    patch, voco = _with_voco(model)
    made = hashlib.sha256(json.dumps(asdict(patch.config), sort_keys=True).encode())
    samples = [voco.embedding.detach().flatten()]
    for name, parameter in _parameters(patch.parts.base):
        made.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        samples.append(parameter.detach().flatten()[:: max(parameter.numel() // 16, 1)].clone())
    for sample in samples:
        made.update(sample.float().cpu().numpy().tobytes())
    return made.hexdigest()


def _parameters(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return all parameters by all of their names, because offloading forgets which parameters are
    tied. Parameters that accelerate has offloaded are fetched, one module at a time.
    """
    if not any(parameter.is_meta for parameter in base.parameters()):
        yield from base.named_parameters(remove_duplicate=False)
        return
    from accelerate.utils import align_module_device

    for prefix, module in base.named_modules(remove_duplicate=False):
        with align_module_device(module):
            yield from module.named_parameters(prefix, recurse=False, remove_duplicate=False)


def _check_model(model: nn.Module, made_with: str, what: str) -> None:
    if fingerprint(model) != made_with:
        raise WeightsError(
            f"{what} was made with another model, other weights or another adapter than this "
            "model's; compress the images anew with this one."
        )


def _with_voco(model: nn.Module) -> tuple[Patch, VoCoPart]:
    """Return the patch on a model, and its part about VoCo tokens."""
    patch = require_patch(model)
    if patch.voco is None:
        raise ConfigError(
            f"this model is patched with {patch.config.name}, which does not compress; "
            'patch_model(model, method="voco", weights=...) does.'
        )
    return patch, patch.voco
