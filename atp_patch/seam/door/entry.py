"""The decoder's door, where a forward pass with images gets its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import Cache

from atp_patch.contract import Decision, GridQuery, Layout, TowerTokens, VisualGrid
from atp_patch.contract.errors import CacheError, InputError, UnsupportedModelError
from atp_patch.seam.decoder.gathered_tokens import GatheredTokens
from atp_patch.seam.decoder.host_pass import HostPass
from atp_patch.seam.decoder.late_features import LateFeatures
from atp_patch.seam.decoder.prefill import LayerPolicy, Prefill
from atp_patch.seam.decoder.rope_2d import RowColumnRotary
from atp_patch.seam.decoder.visual_tokens import TokenState
from atp_patch.seam.door.choosing import DoorPolicy, choose, narrow_late_features
from atp_patch.seam.door.features import check_features
from atp_patch.seam.door.tombstones import find_tombstones
from atp_patch.seam.host.cache import cache_in, check_cache, check_prunable_again
from atp_patch.seam.host.call import Call
from atp_patch.seam.host.checkpointing import check_generation, check_learning
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.packing import refuse_packed
from atp_patch.seam.host.prompt import Prompt, TextRows
from atp_patch.seam.host.prompt_reading import find_grids, grid_query, read_prompt
from atp_patch.seam.host.recorder import Recorder
from atp_patch.seam.host.session import Session
from atp_patch.seam.host.states import check_padding, refuse_learning
from atp_patch.seam.learning.weighed_tokens import WeighedTokens


class PromptPolicy(Protocol):
    """What the rest of the package says about a model's prompts.

    Attributes:
        visual_token_ids: the ids of placeholders of images and videos.
        causal: True where no token attends to those behind it.
        newline: the name of the base model's parameter that ends rows of features, or None.
        explicit: True where only the caller knows which tokens are visual.
    """

    visual_token_ids: tuple[int, ...]
    causal: bool
    newline: str | None
    explicit: bool

    def grids(self, query: GridQuery) -> Sequence[Sequence[VisualGrid]]:
        """Return the grids of each sample's visual tokens."""


class PrefillPolicy(PromptPolicy, DoorPolicy, LayerPolicy, Protocol):
    """What the rest of the package says about a forward pass with images.

    Attributes:
        learned: True where something is learned at the pruning layers.
        leaves_tombstones: True where tokens are dropped between the vision tower and the decoder.
        rope_2d: True where the rotary embedding of visual tokens goes by row and column.
    """

    learned: bool
    leaves_tombstones: bool
    rope_2d: bool


class TowerOutputs(Protocol):
    """Reads the vision tower for a method at the door."""

    def read(self, layout: Layout, videos: Sequence[Sequence[bool]]) -> Mapping[float, TowerTokens]:
        """Return what each block did, in the layout's places, by the number that the method asked
        for.
        """


def prefill_of(
    parts: Parts,
    policy: PrefillPolicy,
    recorder: Recorder,
    tower_outputs: TowerOutputs | None,
    call: Call,
    session: Session | None,
    kwargs: dict[str, Any],
) -> Prefill | None:
    """Return the state of a forward pass with images, or None for a pass without any.

    Tombstones of tokens that were dropped before the decoder are taken out of ``inputs_embeds``. A
    method at the door makes its choice here, with what ``tower_outputs`` has read.

    Args:
        parts: the model's modules.
        policy: what the rest of the package says about pruning.
        recorder: records the attention of the layers.
        tower_outputs: reads the vision tower, or None.
        call: the arguments of the pass.
        session: the call of ``generate`` that the pass belongs to, or None.
        kwargs: what the decoder is about to get, which is changed in place.

    Raises:
        InputError: where the prompt cannot be read or its features are broken.
        CacheError: where the cache cannot hold a pruned prompt.
        UnsupportedModelError: where the family cannot serve these images.
    """
    embeds, cache = kwargs.get("inputs_embeds"), cache_in(kwargs)
    past = 0 if cache is None else int(cache.get_seq_length())
    if policy.explicit:
        _check_explicit(call, embeds, past)
        if call.visual_mask is None:
            return None
    elif call.visual_grids is not None:
        raise InputError(
            'visual_grids belongs to family="generic"; leave it out, since the family of this '
            "model finds the grids by itself."
        )
    if embeds is None:  # a language model that other code gives embeddings: ids are text
        return None
    late = LateFeatures.of(kwargs)
    if late is not None:
        embeds = late.shown(embeds)
    prompt = read_prompt(call, policy.visual_token_ids, embeds, past)
    if not bool(prompt.visual.any()):
        return None
    if kwargs.get("return_shared_kv_states"):
        raise UnsupportedModelError(
            "shared_kv_states would hold the keys of the remaining tokens alone, and the drafting "
            "model that reads them counts all tokens; generate without such an assistant, or "
            "within atp_patch.disabled(model)."
        )
    dropped = find_tombstones(embeds) if policy.leaves_tombstones else None
    check_features(embeds, prompt, dropped)
    replaced = call.inputs_embeds is not None and not call.has_pictures
    if replaced and dropped is not None and not bool(dropped.any()):
        raise InputError(
            "the patch prunes between the vision tower and the decoder, and this call brought "
            "features in place of pictures, so that nothing was pruned; give the pictures "
            "(pixel_values), or patch with a method at the decoder's door or inside the decoder."
        )
    shown = {**kwargs, "inputs_embeds": embeds}
    query = grid_query(parts, call, prompt, shown, policy.newline)
    refuse_packed(call.sequences, query.position_ids, prompt.attended)
    grids = find_grids(policy.grids, query, prompt)
    layout = Layout.from_grids(grids, embeds.shape[1], embeds.device)
    if session is not None:
        check_generation(parts.layers[0], cache)
    early = policy.leaves_tombstones or policy.chooses_at_door
    first = 0 if early else policy.layers[0]
    check_cache(cache, next((layer for layer in parts.attending if layer >= first), None))
    if past and cache is not None:
        _check_later_turn(parts, cache, past + layout.length)
    if parts.keeps_state and cache is not None:
        check_padding(prompt.attended, past, generates=session is not None)
    host = HostPass(
        cache=cache,
        past=past,
        total=past + layout.length,
        implementation=parts.config._attn_implementation,
        plain_mask=policy.causal and call.mask_is_plain,
        sliding_window=partial(sliding_window, parts.config),
        key_layers=parts.key_layers,
        attending=parts.attending,
    )
    attended = None if bool(prompt.attended.all()) else prompt.attended.to(embeds.device)
    tokens: TokenState = GatheredTokens(
        layout, attended, prompt.token_counts, padding_first=parts.keeps_state
    )
    # In training mode too, as in reinforcement learning, generation prunes as at inference.
    if policy.learned and parts.top.training and session is None:
        check_learning(parts.layers[0])
        refuse_learning(parts)
        if past:
            raise CacheError("thresholds learn from whole prompts: give no filled cache.")
        tokens = WeighedTokens(layout, attended)
    text = TextRows.of(prompt, embeds.device)
    known = session.choices if session is not None and cache is None else None
    entry = None if known is None else known.get(0)
    if dropped is not None and bool(dropped.any()):
        keep = layout.valid & ~dropped.gather(1, layout.position)
        entry = Decision(keep, soft=keep.float())
        kwargs["inputs_embeds"] = embeds.masked_fill(dropped[..., None], 0)
    if late is not None:
        late.take(kwargs)
    for name in call.sequences:  # They count tokens that may go.
        kwargs.pop(name, None)
    if policy.chooses_at_door and entry is None:
        tower = partial(_tower, tower_outputs, policy, prompt, layout)
        entry = choose(policy, layout, prompt, text.sample_key, embeds, tower)
    prefill = Prefill(
        policy=policy,
        recorder=recorder,
        tokens=tokens,
        text=text,
        prompt_tokens=tuple(prompt.token_counts),
        host=host,
        embeds=kwargs["inputs_embeds"] if late is None else embeds,
        entry=entry,
        rotary=RowColumnRotary(layout) if policy.rope_2d else None,
        known=known,
        late=late,
    )
    if policy.chooses_at_door:
        narrow_late_features(prefill, kwargs)
        # What a decoder makes of its inputs beside hidden states is then that of merged tokens too.
        kwargs["inputs_embeds"] = prefill.tokens.merged(0, kwargs["inputs_embeds"])
    return prefill


def _tower(
    tower_outputs: TowerOutputs | None, policy: PromptPolicy, prompt: Prompt, layout: Layout
) -> Mapping[float, TowerTokens]:
    """Return what the vision tower did in the blocks that the method asks for."""
    if tower_outputs is None:
        return {}
    image = policy.visual_token_ids[0]  # the ids of videos follow it
    ids = prompt.ids
    videos = [
        [ids is not None and int(ids[number, grid.start]) != image for grid in grids]
        for number, grids in enumerate(layout.grids)
    ]
    return tower_outputs.read(layout, videos)


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
    check_prunable_again(cache, parts.attending[0])
    narrowest = filled_window(parts, total)
    if narrowest is not None:
        raise CacheError(
            f"an image in a later turn cannot be pruned once the conversation ({total} tokens) "
            f"fills the sliding window of {narrowest}; put the image into the first turn, or use "
            "atp_patch.disabled(model) for this turn."
        )


def filled_window(parts: Parts, tokens: int) -> int | None:
    """Return the narrowest sliding window of the decoder that so many tokens fill, or None.

    A full window has dropped its oldest key already.
    """
    windows = (sliding_window(parts.config, layer) for layer in range(len(parts.layers)))
    return min((w for w in windows if w is not None and tokens >= w), default=None)


def sliding_window(config: Any, layer: int) -> int | None:
    """Return the window of a layer in tokens, or None where it attends to everything before.

    A layer that attends within chunks sees no more than a chunk.
    """
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] == "chunked_attention":
        chunk: int | None = config.attention_chunk_size
        return chunk
    if types is not None and types[layer] != "sliding_attention":
        return None
    if types is None and not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)
