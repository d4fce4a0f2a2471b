"""The arguments of one forward pass through the model, as far as pruning reads them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.seam.host.outside import IGNORED_LABEL, Outside
from atp_patch.seam.host.packing import sequences_given
from atp_patch.seam.host.session import Session, sizes_given

IMAGE_KEYS = (
    "pixel_values",
    "pixel_values_images",
    "pixel_values_videos",
    "image_pixel_values",
    "image_patches",  # Fuyu, in early versions of transformers
    "mm_encoder_outputs",
)


@dataclass
class Call:
    """The arguments of one forward pass that matter to pruning.

    Attributes:
        labels: (B, L) int64, a copy of the labels that the call was given, or None.
        visual_mask: (B, L) bool, True at visual tokens, where the caller gave it, or None.
        prompt_length: how many tokens the prompt of ``generate`` has, or None outside of it.
        input_ids: (B, L) int64, or None where embeddings were given.
        inputs_embeds: (B, L, D) embeddings that were given in place of ids, or None.
        attention_mask: the attention mask as it was given, or None.
        embedding: the module that embeds ids.
        has_images: True where the pass may hold images.
        has_pictures: True where the pass was given pictures themselves, for the tower to read.
        padding: (B, L), the attention mask of the prompt that ``generate`` was given, or None. Its
            passes may get another mask.
        num_items: how many supervised tokens the trainer divides the loss by, or None.
        session: the call of ``generate`` that this pass belongs to, or None.
        picture_sizes: the arguments that say how large the pictures are, where this pass itself
            was given them.
        sequences: the arguments of this pass that tell where sequences begin in a row, if any.
        through: the finished pass through the decoder, where it left some places without an output.
        alone: True where the model without its head was called, and not the top.
        entered: True where the model without its head has begun.
        visual_grids: for each sample the (frames, height, width) of its images, or None.
    """

    labels: Tensor | None
    visual_mask: Tensor | None
    prompt_length: int | None
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Any = None
    embedding: nn.Module | None = None
    has_images: bool = False
    has_pictures: bool = False
    padding: Tensor | None = None
    num_items: Any = None
    through: Any = None
    alone: bool = False
    entered: bool = False
    visual_grids: Any = None
    session: Session | None = None
    picture_sizes: dict[str, Tensor] = field(default_factory=dict)
    sequences: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_outermost(
        cls,
        outside: Outside,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        session: Session | None,
        *,
        alone: bool = False,
    ) -> Call:
        """Read the arguments of the outermost module.

        ``visual_mask`` and ``visual_grids`` are taken out of its keywords. ``labels`` are replaced
        by a copy, from which the targets of pruned places are dropped once the choice is made.
        """
        visual_mask, grids = kwargs.pop("visual_mask", None), kwargs.pop("visual_grids", None)
        labels = kwargs.get("labels")
        if labels is not None:
            labels = kwargs["labels"] = labels.clone()
        length = padding = None
        if session is not None:
            length, padding = session.prompt_length, session.attention_mask
            grids = session.visual_grids if grids is None else grids
            visual_mask = session.visual_mask if visual_mask is None else visual_mask
        elif visual_mask is None:
            visual_mask = outside.visual("forward", args, kwargs)
        items = kwargs.get("num_items_in_batch")
        return cls(
            labels,
            visual_mask,
            length,
            num_items=items,
            visual_grids=grids,
            padding=padding,
            session=session,
            alone=alone,
        )

    def with_base(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Read the arguments of the model without its head too."""
        given, self.entered = kwargs, True
        if args:
            names = list(inspect.signature(type(base).forward).parameters)[1:]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.input_ids, self.inputs_embeds = given.get("input_ids"), given.get("inputs_embeds")
        self.attention_mask = given.get("attention_mask")
        self.picture_sizes, self.sequences = sizes_given(given), sequences_given(given)
        self.embedding = base.get_input_embeddings()
        self.has_pictures = any(_present(given.get(key)) for key in IMAGE_KEYS)
        prefill = self.inputs_embeds is not None and self.inputs_embeds.shape[1] > 1
        self.has_images = self.has_pictures or prefill or self.visual_mask is not None
        return self

    def sizes(self, batch: int) -> Any:
        """Return the (frames, height, width) that were given for the images of each sample, or
        None.
        """
        given = self.visual_grids
        if not given or self.prompt_length is None or batch % len(given):
            return given
        repeats = batch // len(given)  # beams and returned sequences
        return [sample for sample in given for _ in range(repeats)]

    def ids(self, batch: int, length: int) -> Tensor | None:
        """Return (batch, length) ids of this pass, or of the prompt whose embeddings it is given.

        A ``visual_mask`` says more about embeddings than ids beside them do.
        """
        prompt = None if self.session is None else self.session.ids
        if self.input_ids is not None or prompt is None or self.visual_mask is not None:
            return self.input_ids
        samples, known = prompt.shape
        if known != length or batch % samples:
            return None
        return prompt.repeat_interleave(batch // samples, 0)  # beams and returned sequences

    def given_sizes(self, batch: int) -> tuple[dict[str, Tensor], int]:
        """Return what this pass or its prompt was given of the pictures' sizes, and how many rows
        share one sample's pictures.
        """
        session = self.session
        if self.picture_sizes or session is None or not session.samples:
            return self.picture_sizes, 1
        return session.picture_sizes, batch // session.samples

    @property
    def mask_is_plain(self) -> bool:
        """Whether a wide mask that the host builds says no more than causality and padding.

        Where no mask is given, the host builds a wide one only for another reason, such as packed
        sequences.
        """
        return isinstance(self.attention_mask, Tensor) and self.attention_mask.ndim == 2

    def behind_decoder(self, decoder_pass: Any, lost: Tensor) -> None:
        """Note the pass that is through the decoder, and supervise no place without an output.

        Args:
            decoder_pass: the finished pass, which may add to the loss.
            lost: (B, L) bool, the places without an output: pruned ones, and padding where it was
                dropped with them.
        """
        self.through = decoder_pass
        if self.labels is not None:
            lost = lost.to(self.labels.device)
            self.labels[:, 1:].masked_fill_(lost[:, :-1], IGNORED_LABEL)

    def add_losses(self, output: Any, losses: dict[str, tuple[float, Tensor]]) -> Any:
        """Add weighted losses to the host's loss (``output.loss``, or the first of a tuple).

        Where gradients are accumulated, the host divides by the supervised tokens of several
        batches. What is added is then weighed by this batch's share of these tokens.
        """
        assert self.labels is not None
        if not losses:
            return None
        if hasattr(output, "log_probs"):
            raise UnsupportedModelError(
                "this trainer makes its own loss from log_probs, without the thresholds' terms; "
                "let its compute_loss be transformers.Trainer.compute_loss."
            )
        extra = torch.stack([weight * loss for weight, loss in losses.values()]).sum()
        if self.num_items is not None:
            share = (self.labels[:, 1:] != IGNORED_LABEL).sum() / self.num_items
            extra = extra * share.to(extra)
        if isinstance(output, tuple):
            return (output[0] + extra.to(output[0]), *output[1:])
        output.loss = output.loss + extra.to(output.loss)
        return output


def refuse_replica(module: nn.Module) -> None:
    """Raise in a copy by ``nn.DataParallel``, since the seam watches the original's layers."""
    if getattr(module, "_is_replica", False):
        raise UnsupportedModelError(
            "nn.DataParallel would prune nothing; start one process for each GPU (torchrun), or "
            "show the program a single GPU."
        )


def _present(value: Any) -> bool:
    return value is not None and (not isinstance(value, dict) or any(value.values()))
