"""The forward pass of training, with many questions about an image and some tokens left out.

It uses the modules of the Hugging Face model, so that their parameters are trained. Only attention
is written out, because many questions share one image in one pass. With one question and all tokens
it equals the model's own forward, which is tested.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from atp_patch.builtin.scenes import GRID, PATCH_PX
from atp_patch.builtin.tokens import BOS, PAD, USER, word_ids

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

PREFIX = (BOS, USER)
"""Tokens before the image."""


def to_pixel_values(pixels: NDArray[np.generic], device: torch.device | str = "cpu") -> Tensor:
    """(images, 3, 192, 192) in -1..1 from (images, 192, 192, 3) uint8, as the processor does."""
    values = torch.tensor(pixels, device=device).permute(0, 3, 1, 2).float()
    return values / 127.5 - 1.0


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(d) + bias) v; queries, keys and values are (..., tokens, d).

    It is written out because the backward pass of the fused kernel is slow on CPUs.
    """
    return attention_map(q, k, bias) @ v


def attention_map(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(d) + bias), (..., queries, keys)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """Split (batch, tokens, heads * d) into (batch, heads, tokens, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_together(x: Tensor) -> Tensor:
    """Join (batch, heads, tokens, d) into (batch, tokens, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def tower_forward(
    model: LlavaForConditionalGeneration,
    pixel_values: Tensor,
    order: Tensor | None = None,
    states: list[Tensor] | None = None,
) -> Tensor:
    """(images, 576, hidden): the patch features before the projector, in raster order.

    Args:
        model: the model.
        pixel_values: (images, 3, 192, 192).
        order: an order from `window_order`, or None. With it the grid is cut into four windows of
            12 x 12 patches that do not see each other, a fourth of the attention's work.
        states: a list to which the patches' states after each layer are added (without `order`).
    """
    tower = model.model.vision_tower
    embed = tower.embeddings
    cut = nn.functional.unfold(pixel_values, PATCH_PX, stride=PATCH_PX).mT  # (images, 576, 192)
    x = cut @ embed.patch_embedding.weight.flatten(1).mT
    position = embed.position_embedding.weight
    x = x + position[1:]
    images, _, hidden = x.shape
    if order is not None:
        x = x[:, order].reshape(images * 4, -1, hidden)
    cls = (embed.class_embedding + position[0]).expand(x.shape[0], 1, hidden)
    x = tower.pre_layrnorm(torch.cat([cls, x], dim=1))
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        normed = layer.layer_norm1(x)
        q, k, v = (
            heads_apart(p(normed), attention.num_heads)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.out_proj(heads_together(attend(q, k, v)))
        x = x + layer.mlp(layer.layer_norm2(x))
        if states is not None:
            states.append(x[:, 1:])
    x = x[:, 1:]
    if order is not None:
        x = x.reshape(images, -1, hidden)[:, order.argsort()]
    return x


def window_order(shift: tuple[int, int]) -> Tensor:
    """(576,): raster indices of the patches of a grid rolled by `shift`, window by window."""
    half = GRID // 2
    grid = torch.arange(GRID * GRID).reshape(GRID, GRID).roll(shift, (0, 1))
    return grid.reshape(2, half, 2, half).transpose(1, 2).reshape(-1)


@dataclass
class Notes:
    """What the auxiliary losses read from a forward pass.

    Attributes:
        probes: the layers whose text states are kept.
        gaze_layers: the layers whose attention to visual tokens is kept.
        back_layer: the layer whose attention to text is kept.
        states: for each of the `probes`, (rows, questions, length, hidden) text states.
        gazes: for each of the `gaze_layers`, (rows, heads / 2, packed, visual) attention of half of
            the heads from the packed text to the visual tokens.
        tally: (rows, packed, 1 + visual) attention of the last head of the first of the
            `gaze_layers` to the beginning of the sequence and to the visual tokens.
        backward: (rows, heads / 2, packed, packed) attention of half of the heads of `back_layer`
            to the packed text.
        order: (rows, packed) places of the packed tokens in the flattened questions.
    """

    probes: tuple[int, ...]
    gaze_layers: tuple[int, ...]
    back_layer: int
    states: list[Tensor] = field(default_factory=list)
    gazes: list[Tensor] = field(default_factory=list)
    tally: Tensor = field(default_factory=lambda: torch.empty(0))
    backward: Tensor = field(default_factory=lambda: torch.empty(0))
    order: Tensor = field(default_factory=lambda: torch.empty(0))


def decoder_forward(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    places: Tensor,
    ids: Tensor,
    notes: Notes | None = None,
) -> Tensor:
    """Compute the logits of many questions about the image of each row.

    Visual tokens and the prefix see each other causally and no text, so they are computed once. The
    tokens of a question see them and the earlier tokens of their own question.

    Args:
        model: the model.
        features: (rows, visual, hidden), the tower's features of the patches that are shown.
        places: (visual,) or (rows, visual), raster indices of these patches in rising order. They
            keep their position ids of the full sequence.
        ids: (rows, questions, length), each question padded with `<pad>`.
        notes: receives what the auxiliary losses read.

    Returns:
        (rows, questions, length, vocabulary) logits. Those at padding have no meaning.
    """
    decoder = model.model.language_model
    first = len(PREFIX)
    prefix_ids = torch.tensor([word_ids()[t] for t in PREFIX], device=ids.device)
    prefix = decoder.embed_tokens(prefix_ids).expand(len(ids), -1, -1)
    seen = torch.cat([prefix, model.model.multi_modal_projector(features)], dim=1)
    places = places.reshape(-1, places.shape[-1])
    start = torch.arange(first, device=ids.device).expand(places.shape[0], -1)
    seen_at = torch.cat([start, places + first], dim=1)
    shown = slice(first, seen.shape[1])
    text_from = first + GRID * GRID
    return read_questions(decoder, model.lm_head, seen, seen_at, shown, ids, text_from, notes)


def read_questions(
    decoder: Any,
    lm_head: nn.Module,
    seen: Tensor,
    seen_at: Tensor,
    shown: slice,
    ids: Tensor,
    text_from: int,
    notes: Notes | None,
) -> Tensor:
    """Compute the logits of many questions that follow the same tokens.

    Args:
        decoder: a decoder of Hugging Face with LLaMA's names; it may normalise queries and keys.
        lm_head: the head of the language model.
        seen: (rows, tokens, hidden), embeddings of the tokens that all questions see.
        seen_at: position ids of these tokens, as the decoder's rotary embedding takes them.
        shown: which of these tokens are visual tokens.
        ids: (rows, questions, length), each question padded with `<pad>`.
        text_from: position id of a question's first token.
        notes: receives what the auxiliary losses read.

    Returns:
        (rows, questions, length, vocabulary) logits. Those at padding have no meaning.
    """
    heads = int(decoder.config.num_attention_heads)
    questions, length = ids.shape[1:]
    device = ids.device
    order, question, step = _pack(ids)  # each (rows, packed)
    text = decoder.embed_tokens(ids.flatten(1).gather(1, order))  # (rows, packed, hidden)
    text_at = step + text_from
    tables = [decoder.rotary_emb(x, at) for x, at in ((seen, seen_at), (text, text_at))]
    seen_hidden = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=device).triu(1)
    text_hidden = (question[:, :, None] != question[:, None]) | (step[:, :, None] < step[:, None])
    seen_bias, text_bias = (
        torch.zeros(x.shape, device=device).masked_fill(x, float("-inf"))
        for x in (seen_hidden, text_hidden[:, None])
    )
    text_bias = nn.functional.pad(text_bias, (seen.shape[1], 0))
    for number, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        projected = []
        for x, (cos, sin) in ((seen, tables[0]), (text, tables[1])):
            normed = layer.input_layernorm(x)
            q, k, v = (
                heads_apart(p(normed), heads)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            projected.append((*apply_rotary_pos_emb(q, k, cos, sin), v))
        (q_seen, k_seen, v_seen), (q, k, v) = projected
        keys, values = torch.cat([k_seen, k], dim=2), torch.cat([v_seen, v], dim=2)
        weights = attention_map(q, keys, text_bias)
        text = text + attention.o_proj(heads_together(weights @ values))
        text = text + layer.mlp(layer.post_attention_layernorm(text))
        if number < len(decoder.layers) - 1:  # the last layer's states of these tokens are not used
            seen = seen + attention.o_proj(
                heads_together(attend(q_seen, k_seen, v_seen, seen_bias))
            )
            seen = seen + layer.mlp(layer.post_attention_layernorm(seen))
        if notes is not None and number in notes.gaze_layers:
            notes.gazes.append(weights[:, : heads // 2, :, shown])
        if notes is not None and number == notes.gaze_layers[0]:
            last = weights[:, -1]
            notes.tally = torch.cat([last[..., :1], last[..., shown]], dim=-1)
        if notes is not None and number == notes.back_layer:
            notes.backward = weights[:, : heads // 2, :, seen.shape[1] :]
        if notes is not None and number in notes.probes:
            notes.states.append(text)
    back = torch.zeros_like(ids).flatten(1)
    back = back.scatter(1, order, torch.arange(order.shape[1], device=device).expand_as(order))

    def unpack(x: Tensor) -> Tensor:
        spread = x.gather(1, back[..., None].expand(-1, -1, x.shape[-1]))
        return spread.unflatten(1, (questions, length))

    if notes is not None:
        notes.order = order
        notes.states = [unpack(x) for x in notes.states]
    return unpack(lm_head(decoder.norm(text)))


def _pack(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the tokens that are not padding; `packed` is their number in the fullest row.

    Returns:
        (rows, packed) each: the index in the flattened row, the number of the question, and the
        index in the question. Rows with fewer tokens end with padding, which no other token sees.
    """
    flat = ids.flatten(1)
    live = flat != word_ids()[PAD]
    packed = int(live.sum(1).max())
    order = live.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :packed]
    return order, order // ids.shape[-1], order % ids.shape[-1]
