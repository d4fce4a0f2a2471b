"""The parts of a patch that only VoCo tokens need."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atp_patch.contract.errors import ConfigError, UnsupportedModelError
from atp_patch.families import FAMILIES, Family
from atp_patch.methods import VoCo
from atp_patch.patching.config import PruningConfig
from atp_patch.patching.trace import LayerTrace, PruningTrace
from atp_patch.seam import Parts, VoCoPass, decoder_shape

SAMPLED_ROWS = 4096


@dataclass(frozen=True, repr=False)
class VoCoTrace(PruningTrace):
    """One forward pass with images through a model with VoCo tokens.

    ``tokens_per_layer``, ``average_tokens`` and ``kv_bytes`` count only the VoCo tokens, which are
    all that text can see of an image. ``flops`` are those of this pass, which still reads all
    visual tokens; later questions on the same cache cost only their own text.

    Attributes:
        decoder_tokens: for each sample, the number of tokens that the decoder ran on, with VoCo
            tokens and without padding.
    """

    decoder_tokens: tuple[int, ...] = ()

    @property
    def slots(self) -> tuple[int, ...]:
        """The former name of :attr:`decoder_tokens`."""
        warnings.warn(
            "VoCoTrace.slots is called decoder_tokens now.", DeprecationWarning, stacklevel=2
        )
        return self.decoder_tokens

    @property
    def flops(self) -> float:
        """Exact FLOPs of the decoder's prefill for this batch; padding is not counted."""
        return sum(self._flops([tokens] * self.shape.num_layers) for tokens in self.decoder_tokens)


class Host(Protocol):
    """What :class:`VoCoPart` needs of the patch that it belongs to.

    Attributes:
        parts: the modules of the model.
        learned_module: the module that holds the VoCo tokens' embeddings.
        thread: what is stored for the running thread; the trace is stored there.
    """

    parts: Parts
    learned_module: nn.Module | None
    thread: Any

    def check_module_trains(self) -> None:
        """Raise ConfigError if PEFT would train only a copy of the learned module."""

    def restore_ignored(self) -> None:
        """Let checkpoints hold the learned module from now on."""


class VoCoPart:
    """What the seam needs to know about VoCo tokens.

    Attributes:
        num_tokens: number of VoCo tokens of each segment.
        segment_frames: number of frames of a video in a segment; None means all of them.
    """

    def __init__(self, method: VoCo, patch: Host) -> None:
        self.num_tokens, self.segment_frames = method.num_tokens, method.segment_frames
        self._patch = patch

    @property
    def embedding(self) -> Tensor:
        """(V, D): the input embeddings of the VoCo tokens."""
        self._patch.check_module_trains()
        learned_module: Any = self._patch.learned_module
        if learned_module.embedding.is_meta:
            raise ConfigError(
                "the VoCo tokens were offloaded with the model; offload it first, then patch it."
            )
        embedding: Tensor = learned_module.embedding
        return embedding

    def finished(self, voco_pass: VoCoPass) -> None:
        """Store the trace of a forward pass with images."""
        parts = self._patch.parts
        if parts.top.training:
            # From now on a checkpoint must hold the VoCo tokens so that training can be resumed.
            self._patch.restore_ignored()
        layout, sequence = voco_pass.layout, voco_pass.sequence
        length = tuple(voco_pass.attended.sum(1).tolist())
        voco = (sequence.voco >= 0).sum(1).tolist()
        visual = (voco_pass.attended & sequence.visual).sum(1).tolist()
        self._patch.thread.trace = VoCoTrace(
            layers={
                0: LayerTrace(
                    layout=layout,
                    kept_counts=tuple(len(s) * self.num_tokens for s in voco_pass.segments),
                    decision=None,
                    token=layout.position,
                    token_valid=layout.valid,
                    alive=(sequence.place, voco_pass.kept),
                    attended=None,
                )
            },
            layout=layout,
            shape=decoder_shape(parts.config),
            text_tokens=tuple(n - v - w for n, v, w in zip(length, visual, voco, strict=True)),
            bytes_per_element=voco_pass.bytes_per_element,
            decoder_tokens=length,
        )


def voco_module(method: VoCo, parts: Parts, tensors: dict[str, Tensor]) -> nn.Module:
    """Make the module of VoCo tokens, from an adapter or drawn like the model's embeddings."""
    module: Any = method.build(int(parts.config.hidden_size))
    weight = parts.decoder.get_input_embeddings().weight
    if tensors:
        module.load_state_dict(tensors)
    elif not weight.is_meta:
        rows = weight.detach()[:SAMPLED_ROWS].float()
        mean, spread = rows.mean(0), rows.std(0)
        with torch.no_grad():
            drawn = torch.randn(module.embedding.shape)
            module.embedding.copy_(mean.cpu() + drawn * spread.cpu())
    return module if weight.is_meta else module.to(weight.device)


def check_family(family: Family, config: Any) -> None:
    """Raise UnsupportedModelError if VoCo tokens cannot be put behind this model's images."""
    why = None
    if family.outer is not None:
        why = "it is fed by code of another package"
    elif not family.token_ids:
        why = "only its caller knows which tokens are visual"
    elif not family.causal:
        why = "its images or prefixes attend both ways"
    elif family.keeps_state:
        why = "the state of some layers tells later tokens of an image, whatever they attend to"
    elif family.late_layers(config):
        why = "it adds visual features inside its decoder"
    elif family.told_kinds:
        why = "its decoder is told more of each token of the prompt than its embedding"
    if why is not None:
        able = ", ".join(f.name for f in FAMILIES if f.takes_voco)
        raise UnsupportedModelError(
            f"VoCo tokens cannot be put into this {config.model_type} model: {why}. Families that "
            f"take them: {able}. Any method that prunes inside the decoder works here."
        )


def check_alone(config: PruningConfig) -> None:
    """Raise ConfigError if a budget or another option was given, which VoCo tokens do not have."""
    left_out: dict[str, Any] = {
        "keep": None,
        "target_tokens": None,
        "target_share": None,
        "min_tokens": 1,
        "min_tokens_per_image": 0,
        "rope_2d": False,
        "prune_marks": False,
    }
    wrong = [name for name, value in left_out.items() if getattr(config, name) != value]
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)} cannot be given to voco: num_tokens= says how many tokens "
            "stand for an image."
        )
