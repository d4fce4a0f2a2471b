"""The second model's forward pass in training, with many questions about each image.

With one question it equals the model's own forward, which is tested.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from atp_patch.builtin.dynamic.tokens import PREFIX, VISION_END, token_ids
from atp_patch.builtin.scenes import GRID, PATCH_PX
from workshop.dynamic.architecture import MERGE
from workshop.forward import Notes, attend, heads_apart, heads_together, read_questions

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration


def tower_forward(
    model: Qwen3VLForConditionalGeneration,
    pixel_values: Tensor,
    states: list[Tensor] | None = None,
) -> Tensor:
    """(images, rows * columns, hidden): the patch features before the merger, in raster order.

    Args:
        model: the model.
        pixel_values: (images, 3, height, width) in -1..1, with sides that are multiples of 16.
        states: a list to which the patches' states after each layer are added, (images, patches,
            hidden) in raster order.
    """
    rows, columns = (side // PATCH_PX for side in pixel_values.shape[-2:])
    tower = model.model.visual
    device = pixel_values.device
    cut = nn.functional.unfold(pixel_values, PATCH_PX, stride=PATCH_PX).mT
    kernel = tower.patch_embed.proj.weight.sum(2)  # all frames are the same picture
    x = cut @ kernel.flatten(1).mT + tower.patch_embed.proj.bias
    table = tower.pos_embed.weight.mT.reshape(1, -1, GRID, GRID)
    places = nn.functional.interpolate(table, (rows, columns), mode="bilinear", align_corners=True)
    x = x + places.flatten(2).mT
    grid = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (rows, columns)))
    turns = (grid[..., None] * tower.rotary_pos_emb.inv_freq).flatten(1)
    turns = torch.cat([turns, turns], dim=-1)  # (patches, head size)
    cos, sin = turns.cos(), turns.sin()
    for block in tower.blocks:
        heads = block.attn.num_heads
        q, k, v = (heads_apart(p, heads) for p in block.attn.qkv(block.norm1(x)).chunk(3, -1))
        q, k = (p * cos + _turned(p) * sin for p in (q, k))
        x = x + block.attn.proj(heads_together(attend(q, k, v)))
        x = x + block.mlp(block.norm2(x))
        if states is not None:
            states.append(x)
    return x


def merged(
    model: Qwen3VLForConditionalGeneration, features: Tensor, rows: int, columns: int
) -> Tensor:
    """(images, rows * columns, hidden): the visual tokens for the decoder, in raster order.

    Args:
        model: the model.
        features: (images, patches, hidden), from `tower_forward`.
        rows, columns: number of rows and columns of visual tokens.
    """
    cells = features.unflatten(1, (rows, MERGE, columns, MERGE)).transpose(2, 3)
    return model.model.visual.merger(cells.flatten(0, 4)).unflatten(0, (len(features), -1))


def _turned(x: Tensor) -> Tensor:
    """Return the values that a rotation multiplies by the sine."""
    one, other = x.chunk(2, -1)
    return torch.cat([-other, one], dim=-1)


def decoder_forward(
    model: Qwen3VLForConditionalGeneration,
    visual: Tensor,
    rows: int,
    columns: int,
    ids: Tensor,
    notes: Notes | None = None,
) -> Tensor:
    """(images, questions, length, vocabulary): logits of many questions about each image.

    Args:
        model: the model.
        visual: (images, rows * columns, hidden), from `merged`.
        rows, columns: number of rows and columns of visual tokens.
        ids: (images, questions, length), each question padded with `<pad>`.
        notes: receives what the auxiliary losses read.
    """
    decoder = model.model.language_model
    known = token_ids()
    first = len(PREFIX)
    frame = torch.tensor([known[t] for t in (*PREFIX, VISION_END)], device=ids.device)
    around = decoder.embed_tokens(frame).expand(len(ids), -1, -1)
    seen = torch.cat([around[:, :first], visual, around[:, first:]], dim=1)
    end = first + max(rows, columns)
    grid = torch.cartesian_prod(torch.tensor([0]), torch.arange(rows), torch.arange(columns)).mT
    flat = torch.arange(first).expand(3, -1)
    at = torch.cat([flat, grid + first, torch.full((3, 1), end)], dim=1)[:, None].to(ids.device)
    shown = slice(first, first + rows * columns)
    return read_questions(decoder, model.lm_head, seen, at, shown, ids, end + 1, notes)
