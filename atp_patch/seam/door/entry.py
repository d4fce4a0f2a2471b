"""The decoder's door: what a forward pass with images brings, and the state it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from atp_patch.contract import GridQuery, Layout, TowerTokens, VisualGrid
from atp_patch.contract.errors import CacheError, InputError
from atp_patch.seam.decoder.host_pass import HostPass
from atp_patch.seam.decoder.prefill import Prefill
from atp_patch.seam.decoder.rope_2d import RotaryPlaces
from atp_patch.seam.door.choosing import Chooser, choose
from atp_patch.seam.door.features import check_features
from atp_patch.seam.door.tombstones import find_tombstones
from atp_patch.seam.host.cache import check_cache
from atp_patch.seam.host.inputs import Call, find_grids, grid_query, read_prompt
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.packing import refuse_packed
from atp_patch.seam.host.prompt import Prompt, TextRows
from atp_patch.seam.host.session import Session
from atp_patch.seam.learning.learning_pass import LearningPass, check_checkpointing


class Reader(Chooser, Protocol):
    """What the rest of the package says about a model's prompts."""

    layers: tuple[int, ...]
    visual_token_ids: tuple[int, ...]
    causal: bool
    newline: str | None
    explicit: bool
    learned: bool
    before: Any
    door: Any
    rope_2d: bool

    def grids(self, query: GridQuery) -> Sequence[Sequence[VisualGrid]]:
        """The grids of each sample's visual tokens."""


class TowerReader(Protocol):
    """What reads the vision tower for a method at the door."""

    def read(self, layout: Layout, videos: Sequence[Sequence[bool]]) -> Mapping[int, TowerTokens]:
        """What blocks of the tower did, in the layout's places."""


def begin(
    parts: Parts,
    pruner: Reader,
    call: Call,
    session: Session | None,
    kwargs: dict[str, Any],
    reader: TowerReader | None,
) -> Prefill | None:
    """The state of a pass with images, from what the decoder is about to get; None without any.

    Tombstones of tokens that were dropped before the decoder are taken out of ``inputs_embeds``. A
    method at the door makes its choice here, with what ``reader`` has read of the vision tower.
    """
    embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    if pruner.explicit:
        _check_explicit(call, embeds, past)
        if call.visual_mask is None:
            return None
    elif call.visual_grids is not None:
        raise InputError(
            'visual_grids belongs to family="generic"; this model\'s own family finds the grids.'
        )
    if embeds is None:  # a language model that other code feeds: ids are text
        return None
    prompt = read_prompt(call, pruner.visual_token_ids, embeds, past)
    if not bool(prompt.visual.any()):
        return None
    dropped = None if pruner.before is None else find_tombstones(embeds)
    check_features(embeds, prompt, dropped)
    query = grid_query(parts, call, prompt, kwargs, pruner.newline)
    refuse_packed(call.sequences, query.position_ids, prompt.attended)
    grids = find_grids(pruner.grids, query, prompt)
    layout = Layout.from_grids(grids, embeds.shape[1], embeds.device)
    early = pruner.before is not None or pruner.door is not None
    check_cache(cache, 0 if early else pruner.layers[0])
    if past and cache is not None:
        _check_later_turn(parts, cache, past + layout.length)
    host = HostPass(
        cache=cache,
        past=past,
        total=past + layout.length,
        implementation=parts.config._attn_implementation,
        plain_mask=pruner.causal and call.mask_is_plain,
        sliding_window=partial(sliding_window, parts.config),
    )
    # What is generated in training mode, as in reinforcement learning, is generated as ever.
    learning = pruner.learned and parts.top.training and session is None
    if learning:
        check_checkpointing(parts.layers[0])
        if past:
            raise CacheError("thresholds learn from whole prompts: give no filled cache.")
    run = (LearningPass if learning else Prefill)(
        layout,
        TextRows.of(prompt, embeds.device),
        None if bool(prompt.attended.all()) else prompt.attended.to(embeds.device),
        prompt.token_counts,
        host,
        embeds.element_size(),
        session.choices if session is not None and cache is None else None,
    )
    if pruner.rope_2d:
        run.places = RotaryPlaces(layout)
    if dropped is not None and bool(dropped.any()):
        run.entry = layout.valid & ~dropped.gather(1, layout.position)
        kwargs["inputs_embeds"] = embeds.masked_fill(dropped[..., None], 0)
    run.embeds = kwargs["inputs_embeds"]
    for name in call.sequences:  # They count tokens that may go.
        kwargs.pop(name, None)
    if pruner.door is not None:
        choose(run, prompt, pruner, partial(_tower, reader, pruner, prompt, layout), kwargs)
    return run


def _tower(
    reader: TowerReader | None, pruner: Reader, prompt: Prompt, layout: Layout
) -> Mapping[int, TowerTokens]:
    """What the vision tower did, as far as the method wants to know."""
    if reader is None:
        return {}
    image = pruner.visual_token_ids[0]  # ids of videos follow
    ids = prompt.ids
    videos = [
        [ids is not None and int(ids[number, grid.start]) != image for grid in grids]
        for number, grids in enumerate(layout.grids)
    ]
    return reader.read(layout, videos)


def _check_explicit(call: Call, embeds: Tensor | None, past: int) -> None:
    """Raise InputError where the caller was to say which tokens are visual and did not."""
    if embeds is None:
        if call.visual_mask is not None and not past and bool(call.visual_mask.any()):
            raise InputError(
                "visual_mask marks embeddings, but the decoder got ids; pass "
                "inputs_embeds=model.get_input_embeddings()(input_ids) in place of input_ids."
            )
        return
    if call.visual_mask is None and embeds.shape[1] > 1:
        raise InputError(
            'with family="generic", pass visual_mask= with each call, a bool tensor (batch, '
            "sequence) that marks the visual tokens (all False for text alone)."
        )


def _check_later_turn(parts: Parts, cache: Cache, total: int) -> None:
    """Raise CacheError where an image in a later turn cannot be pruned."""
    if isinstance(cache.layers[0], StaticLayer):
        raise CacheError(
            "an image in a later turn cannot be pruned into a StaticCache; use a DynamicCache "
            "for conversations with several images."
        )
    narrowest = filled_window(parts, total)
    if narrowest is not None:
        raise CacheError(
            f"an image in a later turn cannot be pruned once the conversation ({total} tokens) "
            f"fills the sliding window of {narrowest}; put the image into the first turn, or use "
            "atp_patch.disabled(model) for this turn."
        )


def filled_window(parts: Parts, tokens: int) -> int | None:
    """The narrowest sliding window of the decoder where so many tokens fill it, else None.

    A full window has let its oldest key go already.
    """
    windows = (sliding_window(parts.config, layer) for layer in range(len(parts.layers)))
    return min((w for w in windows if w is not None and tokens >= w), default=None)


def sliding_window(config: Any, layer: int) -> int | None:
    """The window of a layer in tokens, None where it attends to everything before it."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    if types is None and not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)
