"""VoCo tokens in a forward pass: they stand behind each image, and replace it in the cache.

The tokens are inserted before the decoder and taken out behind it, so that the tokenizer, the
embeddings, the labels and the lengths that the host knows stay as they are. For the host a VoCo
token stands in the place of one of the last visual tokens of its segment. It has that token's
position ids, column of the padding mask, logical position in the cache, and place in the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from atp_patch.contract import Layout, Span, VisualGrid
from atp_patch.contract.errors import CacheError, InputError, UnsupportedModelError
from atp_patch.maths import (
    VoCoSequence,
    gather_heads,
    gather_tokens,
    insert_voco_tokens,
    output_columns,
    pack,
    voco_visible,
)
from atp_patch.seam.door.entry import PromptPolicy, filled_window
from atp_patch.seam.door.features import check_features
from atp_patch.seam.host.cache import (
    adopt,
    cache_in,
    capacity,
    check_cache,
    pruned_layer,
    stored_positions,
)
from atp_patch.seam.host.call import Call
from atp_patch.seam.host.checkpointing import check_generation
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.packing import refuse_packed
from atp_patch.seam.host.prompt_reading import find_grids, grid_query, read_prompt


class VoCoPolicy(Protocol):
    """What the rest of the package says about VoCo tokens.

    Attributes:
        num_tokens: how many VoCo tokens each segment has.
        segment_frames: how many frames of a video make one segment; None for all of them.
    """

    num_tokens: int
    segment_frames: int | None

    @property
    def embedding(self) -> Tensor:
        """(num_tokens, D), the learned embeddings of the VoCo tokens."""

    def finished(self, voco_pass: VoCoPass) -> None:
        """Take note of a forward pass with images that has gone through the decoder."""


@dataclass(frozen=True)
class Past:
    """What the cache holds of earlier turns, which is the same in every layer.

    Attributes:
        length: the logical length.
        positions: (B, P) int64 logical positions of the keys.
        valid: (B, P) bool, or None where every key is a token.
    """

    length: int
    positions: Tensor
    valid: Tensor | None


@dataclass
class VoCoPass:
    """One forward pass with images through a model with VoCo tokens.

    Attributes:
        policy: what the rest of the package says about VoCo tokens; it is told what the pass did.
        layout: where the given visual tokens lie.
        segments: for each sample the (first, one behind the last) position of each segment.
        sequence: the sequence that the decoder runs on.
        attended: (B, n) bool, False at padding.
        position_ids: (..., B, n) int64 position ids of the sequence.
        past: what the cache held before this pass, or None.
        bytes_per_element: the bytes of one number in the hidden states, and so in the cache.
    """

    policy: VoCoPolicy
    layout: Layout
    segments: list[list[tuple[int, int]]]
    sequence: VoCoSequence
    attended: Tensor
    position_ids: Tensor
    past: Past | None
    bytes_per_element: int

    @property
    def kept(self) -> Tensor:
        """(B, n) bool: the columns that stay in the cache, which hold text and VoCo tokens."""
        return self.attended & ~self.sequence.visual

    def before_layer(
        self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Allow the layer to add to a cache of earlier turns; its arguments stay as they are."""
        earlier = pruned_layer(cache_in(kwargs), layer)
        if earlier is not None:
            earlier.announce_update()
        return args

    def finish(self, output: Any, kwargs: dict[str, Any], num_layers: int) -> Any:
        """Drop visual tokens from the cache, and give the output the public length."""
        cache = cache_in(kwargs)
        if cache is None:  # the decoder may have made one
            rest = output[1:] if isinstance(output, tuple) else [cache_in(output)]
            cache = next((part for part in rest if isinstance(part, Cache)), None)
        if cache is not None:
            self.evict(cache)
        self.policy.finished(self)
        return self.restore(output)

    def without_output(self) -> Tensor | None:
        """Return None, since every place has an output."""
        return None

    def losses(self, output: Any) -> dict[str, tuple[float, Tensor]]:
        """Return no losses, since VoCo tokens learn from the host's own loss."""
        return {}

    def evict(self, cache: Cache) -> None:
        """Drop the keys and values of visual tokens, and of padding, from every layer."""
        index, valid = pack(self.kept)
        positions = self.sequence.place.gather(1, index)
        past, covered = self.past, self.layout.length
        # A padding slot repeats the sample's first key, whose finite numbers nothing reads.
        index = torch.where(valid, index, index[:, :1])
        every = bool(valid.all())
        if past is not None:
            covered += past.length
            positions = torch.cat([past.positions, positions + past.length], dim=1)
            earlier = past.valid
            if earlier is None:
                earlier = torch.ones_like(past.positions, dtype=torch.bool)
            every = every and past.valid is None
            valid = torch.cat([earlier, valid], dim=1)
        for number in range(len(cache.layers)):
            if not cache.layers[number].is_initialized:  # gradient checkpointing fills none
                continue
            layer = adopt(cache, number)
            old = layer.keys.shape[2] - self.sequence.place.shape[1]
            there = index.to(layer.keys.device)
            layer.keys, layer.values = (
                torch.cat([x[:, :, :old], gather_heads(x[:, :, old:], there)], dim=2)
                for x in (layer.keys, layer.values)
            )
            device = layer.keys.device
            layer.hold(positions.to(device), None if every else valid.to(device), covered)

    def restore(self, output: Any) -> Any:
        """Return the decoder's output in the public length."""
        public = output_columns(self.sequence, self.layout.length)

        def rows(states: Tensor) -> Tensor:
            return gather_tokens(states, public.to(states.device))

        def both(weights: Tensor) -> Tensor:
            by_query = rows(weights.transpose(1, 2))
            new = self.sequence.place.shape[1]
            old, new_keys = by_query[..., :-new], by_query[..., -new:]
            by_key = rows(new_keys.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return torch.cat([old, by_key], dim=-1).transpose(1, 2)

        if isinstance(output, tuple):
            return (rows(output[0]), *output[1:])
        output.last_hidden_state = rows(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(rows(states) for states in output.hidden_states)
        if output.attentions is not None:
            output.attentions = tuple(both(weights) for weights in output.attentions)
        return output


def voco_pass_of(
    parts: Parts,
    prompts: PromptPolicy,
    policy: VoCoPolicy,
    call: Call,
    kwargs: dict[str, Any],
) -> tuple[VoCoPass, dict[str, Any]] | None:
    """Return the state of a pass with images and the arguments of the decoder, or None without
    images.

    Args:
        parts: the model's modules.
        prompts: what the rest of the package says about prompts.
        policy: what the rest of the package says about VoCo tokens.
        call: the arguments of the pass.
        kwargs: what the host gives the decoder.

    Raises:
        InputError: where an image has fewer visual tokens than there are VoCo tokens, or no 2D
            attention mask came.
        CacheError: where the cache cannot hold a compressed prompt.
        UnsupportedModelError: for an attention implementation that takes no mask of this kind.
    """
    embeds, cache = kwargs.get("inputs_embeds"), cache_in(kwargs)
    if embeds is None:
        return None
    length = embeds.shape[1]
    past_length = 0 if cache is None else int(cache.get_seq_length())
    prompt = read_prompt(call, prompts.visual_token_ids, embeds, past_length)
    if not bool(prompt.visual.any()):
        return None
    check_features(embeds, prompt)
    query = grid_query(parts, call, prompt, kwargs, prompts.newline)
    refuse_packed(call.sequences, query.position_ids, prompt.attended)
    grids = find_grids(prompts.grids, query, prompt)
    layout = Layout.from_grids(grids, length, embeds.device)
    segments = [
        _segments(spans, grids, policy.segment_frames)
        for spans, grids in zip(query.spans, layout.grids, strict=True)
    ]
    _check(parts, call, segments, policy.num_tokens)
    if call.session is not None:
        check_generation(parts.layers[0], cache)
    sequence = insert_voco_tokens(segments, length, policy.num_tokens).to(embeds.device)
    past = _past(parts, cache, past_length, sequence)
    attended = gather_tokens(prompt.attended.to(embeds.device), sequence.place) & sequence.valid
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = past_length + torch.arange(length, device=embeds.device)[None]
    place = sequence.place.expand(*position_ids.shape[:-2], -1, -1)
    position_ids = position_ids.expand(*place.shape[:-1], -1).gather(-1, place)
    voco = sequence.voco[..., None]
    learned = policy.embedding.to(embeds)[sequence.voco.clamp(min=0)]
    visible = voco_visible(sequence, attended)
    if past is not None:
        visible = torch.cat([_past_visible(past, call, visible), visible], dim=2)
    mask = visible[:, None]
    if parts.config._attn_implementation == "eager":
        hidden = torch.finfo(embeds.dtype).min
        mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, hidden)
    made = VoCoPass(
        policy, layout, segments, sequence, attended, position_ids, past, embeds.element_size()
    )
    return made, {
        **kwargs,
        "inputs_embeds": torch.where(voco >= 0, learned, gather_tokens(embeds, sequence.place)),
        "position_ids": position_ids,
        "attention_mask": mask,
    }


def _segments(
    spans: Sequence[Span], grids: Sequence[VisualGrid], frames: int | None
) -> list[tuple[int, int]]:
    """Return each run of placeholders as one segment, or a video's run in parts of ``frames``
    frames.
    """
    found = []
    for span in spans:
        cuts = [span.start]
        for grid in grids:
            if frames is not None and span.start <= grid.start < span.stop:
                ends = grid.coordinates()[0].view(grid.frames, -1)[:, -1] + 1
                cuts += ends[frames - 1 : -1 : frames].tolist()
        found += list(pairwise([*cuts, span.stop]))
    return found


def _check(
    parts: Parts, call: Call, segments: list[list[tuple[int, int]]], num_tokens: int
) -> None:
    implementation = parts.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} takes no mask that hides an image from "
            "the text; call model.set_attn_implementation('sdpa') (or 'eager')."
        )
    if call.attention_mask is not None and getattr(call.attention_mask, "ndim", 0) != 2:
        raise InputError("give a 2D attention_mask (batch, sequence), as the processor makes it.")
    shortest = min(stop - start for sample in segments for start, stop in sample)
    if shortest < num_tokens:
        raise InputError(
            f"a segment of {shortest} visual tokens cannot be compressed into {num_tokens}; give a "
            "larger image, more segment_frames, or patch with fewer num_tokens."
        )


def _past(
    parts: Parts, cache: Cache | None, past_length: int, sequence: VoCoSequence
) -> Past | None:
    """Return what the cache holds of earlier turns, or None where it is empty.

    Raises:
        CacheError: where the cache cannot hold a compressed prompt.
    """
    batch, n = sequence.place.shape
    narrowest = filled_window(parts, past_length + n)
    if narrowest is not None:
        raise CacheError(
            f"{past_length + n} tokens do not fit the sliding window of {narrowest}: text could "
            "not see the VoCo tokens. Give shorter prompts."
        )
    if cache is None:
        return None
    check_cache(cache, 0)
    if any(capacity(cache, layer) is not None for layer in range(len(cache.layers))):
        raise CacheError("visual keys cannot be evicted from a StaticCache; use a DynamicCache.")
    if not past_length:
        return None
    widths = {layer.keys.shape[2] for layer in cache.layers}
    stored = stored_positions(cache, 0, batch)
    if len(widths) != 1 or stored is None:
        raise CacheError(
            "the cache was pruned by another method, layer by layer; begin with an empty one."
        )
    return Past(past_length, *stored)


def _past_visible(past: Past, call: Call, visible: Tensor) -> Tensor:
    """Return (B, n, P) bool: the cached keys that are visible, which are the same for every
    query.
    """
    seen = torch.ones_like(past.positions, dtype=torch.bool) if past.valid is None else past.valid
    if call.attention_mask is not None:
        columns = call.attention_mask.to(past.positions.device).bool()
        seen = seen & columns.gather(1, past.positions)
    return seen.to(visible.device)[:, None].expand(-1, visible.shape[1], -1)
