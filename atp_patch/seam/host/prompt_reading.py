"""Reading the prompt of a forward pass: which tokens it has, and where its grids lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from atp_patch.contract import GridQuery, VisualGrid
from atp_patch.contract.errors import InputError, UnsupportedModelError
from atp_patch.seam.host.call import Call
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.outside import IGNORED_LABEL
from atp_patch.seam.host.prompt import Prompt


def read_prompt(call: Call, token_ids: tuple[int, ...], embeds: Tensor, past: int) -> Prompt:
    """Read the prompt of a forward pass, on the CPU.

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
    """Return (B, L) bool: the embeddings (B, L, D) that hold neither NaN nor infinity.

    A sum over the channels is NaN or infinite then, and needs no table of the embeddings' size.
    float16 alone could overflow in the sum. A CPU takes thirty times as long to sum bfloat16 in
    another dtype.
    """
    dtype = torch.float32 if embeds.dtype == torch.float16 else None
    return embeds.detach().sum(-1, dtype=dtype).isfinite()


def _before_answers(supervised: Tensor, visual: Tensor, attended: Tensor) -> Tensor:
    """Return (B, L) bool: the tokens that a prompt at inference would hold, which ends before the
    answer.

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
    """Collect what a family may look at, on the CPU, from what the decoder is about to get.

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
    """Return the grids that a family finds.

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
    """Return (B, L) bool: the embeddings that equal those of placeholders, as the host finds them
    too.
    """
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
