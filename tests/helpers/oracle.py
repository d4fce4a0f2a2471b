"""Independent references for pruning: the plain model, at full length, with pruned keys masked out.

Nothing here knows how the package prunes. Masks are built from scratch (causality, padding, sliding
window, kept keys), given to each decoder layer by a pre-hook, and eager attention adds them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.inputs import Inputs, real_mask, visual_mask
from tests.helpers.tiny import decoder_layers

Kept = Mapping[int, Tensor]  # pruning layer -> (B, L) bool in original positions, cumulative


@contextmanager
def masked(
    model: PreTrainedModel,
    real: Tensor,
    kept: Kept,
    backend: str = "eager",
    *,
    blocks: Tensor | None = None,
    blocks_slide: bool = False,
    window_over_blocks: bool = False,
) -> Iterator[PreTrainedModel]:
    """A plain copy of ``model`` whose layers from each pruning layer on miss the pruned keys.

    Args:
        model: a plain model of any attention backend; it is copied.
        real: (B, L) bool, False at padding.
        kept: for each pruning layer, which keys it and the later layers may see. The sequence may
            grow beyond ``L`` and the batch may be repeated, as generation does it.
        backend: "eager", or "sdpa", which alone takes double precision through the softmax.
        blocks: (B, L) int64 numbers of the blocks (>= 0) whose tokens see each other both ways.
        blocks_slide: only sliding layers let the tokens of a block see each other both ways.
        window_over_blocks: sliding windows bound what is seen within a block too.
    """
    reference = copy.deepcopy(model)
    reference.set_attn_implementation(backend)
    config = reference.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    types = getattr(config, "layer_types", None)
    hooks = []
    for number, layer in enumerate(decoder_layers(reference)):
        passed = [step for step in kept if step <= number]
        chosen = kept[max(passed)] if passed else real
        slides = types is None or types[number] == "sliding_attention"
        parts = _chunks(real, chunk) if types and types[number] == "chunked_attention" else None

        def mask_keys(
            _: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            chosen: Tensor = chosen,
            near: int | None = window if slides else None,
            parts: Tensor | None = parts,
            blocks: Tensor | None = None if blocks_slide and not slides else blocks,
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            batch, length = args[0].shape[-3:-1]  # in front of them, Gemma 3n has streams
            visible = _fitted(chosen, batch, length) & _fitted(real, batch, length)
            both = None if blocks is None else _fitted(blocks, batch, length, value=-1)
            apart = None if parts is None else _fitted(parts, batch, length, value=-1)
            mask = additive_mask(
                visible, near, args[0].dtype, both, over=window_over_blocks, parts=apart
            )
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.register_forward_pre_hook(mask_keys, with_kwargs=True))
    yield reference
    for hook in hooks:
        hook.remove()


def additive_mask(
    visible: Tensor,
    window: int | None,
    dtype: torch.dtype,
    blocks: Tensor | None = None,
    *,
    over: bool = False,
    parts: Tensor | None = None,
) -> Tensor:
    """(B, 1, L, L), 0 where a query may see a key and hugely negative elsewhere.

    Every token sees itself, so that no row is empty. Tokens of one block (numbers >= 0) see each
    other both ways; ``over``: the window bounds that too. A token sees nothing outside of its own
    part (B, L).
    """
    place = torch.arange(visible.shape[1])
    distance = place[:, None] - place[None, :]
    near = distance >= 0
    if window is not None:
        near = near & (distance < window)
    near = near.expand(visible.shape[0], 1, -1, -1)
    if blocks is not None:
        same = (blocks[:, None, :, None] == blocks[:, None, None, :]) & (blocks >= 0)[:, None, None]
        if over and window is not None:
            same = same & (distance < window)
        near = near | same
    if parts is not None:
        near = near & (parts[:, None, :, None] == parts[:, None, None, :])
    seen = near & visible[:, None, None, :] | (distance == 0)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _chunks(real: Tensor, size: int) -> Tensor:
    """(B, L) int64: the chunk of each position, counted from the first token behind padding."""
    first = real.long().argmax(1, keepdim=True)
    return torch.div(torch.arange(real.shape[1]) - first, size, rounding_mode="floor")


def masked_logits(
    model: PreTrainedModel,
    inputs: Inputs,
    kept: Kept,
    backend: str = "eager",
    cached: bool = False,
    **options: Any,
) -> Tensor:
    """(B, L, vocabulary) logits of the masked full-length model, which fills a cache where
    ``cached``; options as of :func:`masked`.

    A layer that keeps a state has no mask, so there they are those of :func:`unseen_logits`.
    """
    if not all(hasattr(layer, "self_attn") for layer in decoder_layers(model)):
        return unseen_logits(model, inputs, kept)
    with torch.no_grad(), masked(model, real_mask(inputs), kept, backend, **options) as reference:
        return reference(**inputs, use_cache=cached).logits


def unseen_logits(model: PreTrainedModel, inputs: Inputs, kept: Kept) -> Tensor:
    """(B, L, vocabulary) logits of a decoder that never sees the pruned tokens from each pruning
    layer on; zeros at places that went, and at padding.

    A loop over samples and layers runs the host's own layers, eagerly and without a cache, on each
    sample's tokens alone, with the rotary tables of their places in the whole sequence. Embeddings
    and tables are those that the plain model gives its layers.
    """
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    decoder, layers = reference.get_decoder(), decoder_layers(reference)
    given: dict[int, Any] = {}
    entered: list[Tensor] = []

    def note(number: int) -> Any:
        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[number] = kwargs["position_embeddings"]
            entered.append(args[0])

        return read

    hooks = [
        layer.register_forward_pre_hook(note(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    with torch.no_grad():
        reference(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    real = real_mask(inputs)
    head = reference.get_output_embeddings()
    logits = torch.zeros(*real.shape, head.out_features)
    with torch.no_grad():
        for b, row in enumerate(real):
            place = row.nonzero().flatten()
            hidden = entered[0][b : b + 1, place]
            for number, layer in enumerate(layers):
                if number in kept:
                    stays = kept[number][b, place]
                    place, hidden = place[stays], hidden[:, stays]
                hidden = layer(
                    hidden,
                    attention_mask=_mask_among(reference.config, number, place),
                    position_embeddings=_tables_of(given[number], b, place),
                )
            norm = decoder.norm if hasattr(decoder, "norm") else decoder.embedding_norm
            logits[b, place] = head(norm(hidden))[0]
    return logits


def _mask_among(config: Any, number: int, place: Tensor) -> Tensor | None:
    """(1, 1, n, n) added to the logits of a layer that attends; None for one that keeps a state."""
    text = config.get_text_config()
    kind = text.layer_types[number]
    if kind not in ("full_attention", "sliding_attention"):
        return None
    distance = place[:, None] - place[None, :]
    seen = distance >= 0
    if kind == "sliding_attention":
        seen &= distance < text.sliding_window
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def _tables_of(tables: Any, sample: int, place: Tensor) -> Any:
    """One sample's rotary tables at some places; None where a layer gets none."""
    if tables is None:
        return None
    return tuple(table[min(sample, len(table) - 1)][None, place] for table in tables)


def masked_generate(model: PreTrainedModel, inputs: Inputs, kept: Kept, **kwargs: Any) -> Any:
    """``generate`` of the masked model, every step at full length without any cache."""
    with torch.no_grad(), masked(model, real_mask(inputs), kept) as reference:
        return reference.generate(**inputs, use_cache=False, **kwargs)


@dataclass(frozen=True)
class Maps:
    """What the full-length masked model computed.

    Attributes:
        attentions: a layer's (B, H, L, L) probabilities, one a layer.
        logits: a layer's (B, H, L, L) attention logits before any mask.
        hidden_states: (B, L, D), one a layer and the normed last.
    """

    attentions: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...]


def attention_maps(model: PreTrainedModel, inputs: Inputs, kept: Kept) -> Maps:
    """Full maps of every layer, by ``output_attentions`` and by multiplying q and k out anew."""
    logits: list[Tensor] = []

    def multiply(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = (table.unsqueeze(1) for table in kwargs["position_embeddings"])
        query, key = (
            _rotated(_heads(projection(hidden), module.head_dim), cos, sin)
            for projection in (module.q_proj, module.k_proj)
        )
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits.append(torch.einsum("bhqd,bhkd->bhqk", query, key) / module.head_dim**0.5)

    with torch.no_grad(), masked(model, real_mask(inputs), kept) as reference:
        for layer in decoder_layers(reference):
            layer.self_attn.register_forward_pre_hook(multiply, with_kwargs=True)
        out = reference(
            **inputs, use_cache=False, output_attentions=True, output_hidden_states=True
        )
    return Maps(out.attentions, tuple(logits), out.hidden_states)


def atp_scores(
    maps: Maps, inputs: Inputs, layer: int, alive: Tensor, renormalise: bool = False
) -> tuple[Tensor, Tensor]:
    """``S_self`` (eq. 3) and ``S_cross`` (eq. 4) before ``layer``: (B, L), NaN where not scored.

    Args:
        maps: of a model masked as the layers before ``layer`` are.
        alive: (B, L) bool, the tokens that reach ``layer - 1``.
        renormalise: every head's and row's probabilities over the visual tokens sum to one.
    """
    visual, real = visual_mask(inputs), real_mask(inputs)
    own, cross = (torch.full(visual.shape, torch.nan) for _ in range(2))
    for b in range(visual.shape[0]):
        scored = (visual & alive)[b].nonzero().flatten()
        if not len(scored):
            continue
        first = int(visual[b].nonzero()[0])
        text = [p for p in range(visual.shape[1]) if real[b, p] and not visual[b, p] and p > first]
        raw = maps.logits[layer - 1][b].mean(0)
        own[b, scored] = raw[scored][:, scored].mean(0)
        paid = maps.attentions[layer - 1][b][:, text][:, :, scored]
        if renormalise:
            paid = paid / paid.sum(-1, keepdim=True)
        cross[b, scored] = paid.mean((0, 1))
    return own, cross


def fastv_choice(
    model: PreTrainedModel, inputs: Inputs, layers: Sequence[int], counts: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """What FastV keeps, greedily: the tokens to which the last token pays most attention.

    Args:
        counts: for each pruning layer, how many visual tokens each sample keeps.

    Returns:
        Pruning layer -> (B, L) bool, text kept and padding not.
    """
    visual, real = visual_mask(inputs), real_mask(inputs)
    alive, kept = real.clone(), {}
    for layer, wanted in zip(layers, counts, strict=True):
        paid = attention_maps(model, inputs, kept).attentions[layer - 1].mean(1)
        alive = alive.clone()
        for b, count in enumerate(wanted):
            last = int(real[b].nonzero()[-1])
            scored = (visual & alive)[b].nonzero().flatten()
            order = paid[b, last, scored].argsort(descending=True)
            alive[b, scored[order[count:]]] = False
        kept[layer] = alive
    return kept


def _fitted(table: Tensor, batch: int, length: int, value: float = True) -> Tensor:
    """(B, L) repeated for beams and grown by the generated tokens, which are never pruned."""
    table = table.repeat_interleave(batch // table.shape[0], 0)
    return nn.functional.pad(table, (0, length - table.shape[1]), value=value)


def _heads(states: Tensor, size: int) -> Tensor:
    return states.unflatten(-1, (-1, size)).transpose(1, 2)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin
