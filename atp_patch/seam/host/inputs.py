"""Reading the arguments of a forward pass: whether it has images, and what its prompt holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from atp_patch.contract import GridQuery, VisualGrid
from atp_patch.contract.errors import InputError, UnsupportedModelError
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.outside import IGNORED_LABEL, Outside
from atp_patch.seam.host.packing import sequences_given
from atp_patch.seam.host.prompt import Prompt
from atp_patch.seam.host.session import Session, sizes_given

IMAGE_KEYS = (
    "pixel_values",
    "pixel_values_images",
    "pixel_values_videos",
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
        images = any(_present(given.get(key)) for key in IMAGE_KEYS)
        prefill = self.inputs_embeds is not None and self.inputs_embeds.shape[1] > 1
        self.has_images = images or prefill or self.visual_mask is not None
        return self

    def sizes(self, batch: int) -> Any:
        """The (frames, height, width) that were given for the images of each sample, or None."""
        given = self.visual_grids
        if not given or self.prompt_length is None or batch % len(given):
            return given
        repeats = batch // len(given)  # beams and returned sequences
        return [sample for sample in given for _ in range(repeats)]

    def ids(self, batch: int, length: int) -> Tensor | None:
        """(batch, length) ids of this pass, or of the prompt whose embeddings it is given.

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
        """What this pass or its prompt was told of the pictures' sizes, and how many rows share one
        sample's pictures.
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


def read_prompt(call: Call, token_ids: tuple[int, ...], embeds: Tensor, past: int) -> Prompt:
    """The prompt of a forward pass on the CPU.

    Args:
        call: the arguments of the pass.
        token_ids: the ids of placeholders of images and videos.
        embeds: (B, L, D), what the decoder gets.
        past: how many tokens of earlier turns the cache holds.

    Raises:
        InputError: where only embeddings were given and nothing says which of them are visual.
    """
    batch, length = embeds.shape[:2]
    ids, finite = call.ids(batch, length), _finite(embeds)
    if ids is None:
        finite = finite.cpu()
    else:  # one copy from the device brings both
        ids, known = torch.stack([ids, finite.to(ids)]).cpu()
        finite = known.bool()
    if call.visual_mask is not None:
        visual = call.visual_mask.cpu().bool()[:, -length:]
        if call.prompt_length is not None:  # what stands behind the prompt is text
            visual = pad(visual, (0, length - visual.shape[1]))
        if call.prompt_length is not None and batch % visual.shape[0] == 0:
            # Beams and returned sequences share their prompt.
            visual = visual.repeat_interleave(batch // visual.shape[0], 0)
        if visual.shape != (batch, length):
            raise InputError(
                f"visual_mask has shape {tuple(call.visual_mask.shape)}; it must be (batch, "
                f"sequence) = ({batch}, {length})."
            )
    elif ids is not None:
        visual = torch.isin(ids, torch.tensor(token_ids))
    else:
        visual = _placeholders_among(call, token_ids)
    attended = torch.ones(batch, length, dtype=torch.bool)
    if isinstance(call.attention_mask, Tensor) and call.attention_mask.ndim == 2:
        attended = call.attention_mask[:, -length:].cpu().bool()
    elif call.padding is not None and not past and call.padding.shape[1] == length:
        repeats = batch // len(call.padding)  # beams and returned sequences
        attended = call.padding.cpu().bool().repeat_interleave(repeats, 0)
    scored = torch.ones_like(attended)
    if call.prompt_length is not None:
        scored &= torch.arange(length) + past < call.prompt_length
        visual = visual & scored  # a generated id of a placeholder is no image
    if call.labels is not None:
        supervised = call.labels.cpu() != IGNORED_LABEL
        scored &= _before_answers(supervised, visual, attended)
    return Prompt(visual & attended, attended, ids, scored, finite, visual & ~attended)


def _finite(embeds: Tensor) -> Tensor:
    """(B, L) bool: the embeddings (B, L, D) that hold neither NaN nor infinity.

    A sum over the channels is NaN or infinite then, and needs no table of the embeddings' size.
    """
    wide = torch.promote_types(embeds.dtype, torch.float32)
    return embeds.detach().sum(-1, dtype=wide).isfinite()


def _before_answers(supervised: Tensor, visual: Tensor, attended: Tensor) -> Tensor:
    """(B, L) bool: the tokens that a prompt at inference would hold, which ends before the answer.

    The answer is the first one behind the last image; later text has read it already. Where all
    text behind the images is supervised, labels do not tell an answer from its question, and all
    tokens count.
    """
    place = torch.arange(visual.shape[1])
    behind = place > torch.where(visual, place, -1).amax(1, keepdim=True)
    before = (supervised & behind).cumsum(1) == 0
    asked = (before & behind & attended).any(1, keepdim=True)
    return before | ~asked


def grid_query(
    parts: Parts, call: Call, prompt: Prompt, kwargs: dict[str, Any], newline: str | None
) -> GridQuery:
    """What a family may look at, on the CPU, from what the decoder is about to get.

    Args:
        parts: the model's modules.
        call: the arguments of the pass.
        prompt: its tokens.
        kwargs: the decoder's arguments, with ``inputs_embeds`` (B, L, D).
        newline: the name of the base model's parameter that ends rows of features, or None.
    """
    embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
    given, repeats = call.given_sizes(len(embeds))
    newlines = None
    if newline is not None:
        value = getattr(parts.base, newline).detach().to(embeds)
        # Autocast may have rounded the newlines among the embeddings to half precision.
        newlines = ((embeds - value).abs() <= value.abs() / 128).all(-1).cpu() & prompt.visual
    return GridQuery(
        config=parts.model.config,
        spans=prompt.spans(),
        position_ids=None if positions is None else positions.cpu(),
        ids=prompt.ids,
        newlines=newlines,
        visual=prompt.visual,
        sizes=call.sizes(len(embeds)),
        grid_thw={name: grids for name, grids in given.items() if name.endswith("_grid_thw")},
        repeats=repeats,
        sizes_given={
            name: sizes for name, sizes in given.items() if not name.endswith("_grid_thw")
        },
    )


def find_grids(
    find: Callable[[GridQuery], Sequence[Sequence[VisualGrid]]], query: GridQuery, prompt: Prompt
) -> Sequence[Sequence[VisualGrid]]:
    """The grids that a family finds.

    Raises:
        InputError: where it finds none because the attention mask hides a part of an image.
    """
    try:
        return find(query)
    except (InputError, UnsupportedModelError) as error:
        cut = prompt.cut()
        if cut is None:
            raise
        sample, position = cut
        raise InputError(
            f"attention_mask hides a part of an image (of sample {sample}, beside position "
            f"{position}), so its visual tokens form no grid; let the mask hide all tokens of an "
            "image or none."
        ) from error


def _placeholders_among(call: Call, token_ids: tuple[int, ...]) -> Tensor:
    """(B, L) bool: the embeddings that equal those of placeholders, as the host finds them too."""
    embeds, embedding = call.inputs_embeds, call.embedding
    assert embeds is not None
    assert embedding is not None
    ids = torch.tensor(token_ids, dtype=torch.long, device=embeds.device)
    visual = (embeds[:, :, None] == embedding(ids)).all(-1).any(-1).cpu()
    if not bool(visual.any()):
        raise InputError(
            "nothing says which of these inputs_embeds are visual: no input_ids of the same length "
            "came beside them, and none of them is the embedding of a placeholder. Pass "
            "visual_mask=, a bool tensor (batch, sequence), True at visual tokens (all False for "
            "text alone)."
        )
    return visual
