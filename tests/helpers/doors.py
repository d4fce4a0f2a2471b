"""Door methods of the tests' own, and the plain model told their choice."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import atp_patch
from atp_patch.contract import Recycled
from atp_patch.methods import keep_best
from atp_patch.seam import locate
from tests.helpers.inputs import Inputs
from tests.helpers.oracle import Kept, masked_logits
from tests.helpers.run import forward


@dataclass(frozen=True)
class Asked(atp_patch.DoorMethod):
    """Keeps what is like the question, and merges each other token into the nearest kept one."""

    name = "test-asked"
    summary = "features that are like the question's words, the rest merged into them"
    merges: bool = True

    def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
        words = (view.text.float() * view.text_valid[..., None]).sum(1)
        features = normalize(view.features.float(), dim=-1)
        score = (features @ normalize(words, dim=-1)[..., None])[..., 0]
        keep = keep_best(view, score)
        if not self.merges:
            return atp_patch.Decision(keep, scores={"asked": score})
        width = keep.shape[1]
        column = keep.long().argsort(dim=1, descending=True, stable=True)
        valid = keep.gather(1, column)
        alike = features @ features.transpose(1, 2)
        alike = alike.masked_fill(~keep[:, None, :], -torch.inf)
        nearest = torch.where(keep, torch.arange(width), alike.argmax(-1))
        joins = (nearest[:, None, :] == column[..., None]) & view.slot_valid[:, None, :]
        joins = joins & valid[..., None]
        weight = joins.float() / joins.sum(-1, keepdim=True).clamp(min=1)
        return atp_patch.Decision(
            keep, scores={"asked": score}, recycled=Recycled(column, valid, weight)
        )


@dataclass(frozen=True)
class TowerReader(atp_patch.DoorMethod):
    """Keeps what the vision tower looks at, by the attention of its last blocks."""

    name = "tower-reader"
    summary = "attention and keys of two blocks of the tower"

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        return (-1,)

    def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
        seen = view.tower[-1]
        assert seen.key.shape[:2] == seen.attention.shape == view.token.shape
        return atp_patch.Decision(
            keep_best(view, seen.attention),
            scores={"attention": seen.attention, "key": seen.key.norm(dim=-1)},
        )


def view_of_the_tower(model: Any, inputs: Any, **options: Any) -> atp_patch.DoorView:
    """Patch the model with a reader of its tower, and return what that sees of one call."""
    views: list[atp_patch.DoorView] = []

    class Looks(TowerReader):
        name = "looks"

        def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
            views.append(view)
            return super().decide(view)

    forward(atp_patch.patch_model(model, method=Looks(), **options), inputs)
    (view,) = views
    return view


def joined_by_hand(embeds: Tensor, layout: Any, kept: Tensor) -> list[dict[int, list[int]]]:
    """Of each sample, the places of kept visual tokens -> of all tokens nearest to them."""
    found = []
    for b, total in enumerate(layout.totals):
        places = layout.position[b, :total].tolist()
        stay = [place for place in places if kept[b, place]]
        joined: dict[int, list[int]] = {place: [place] for place in stay}
        for place in places:
            if not kept[b, place]:
                one = embeds[b, place].float()
                alike = [float(torch.cosine_similarity(one, embeds[b, s].float(), 0)) for s in stay]
                joined[stay[alike.index(max(alike))]].append(place)
        found.append(joined)
    return found


def means(table: Tensor, joined: list[dict[int, list[int]]]) -> Tensor:
    """(B, L, D) with the mean of its members in place of each kept token."""
    made = table.clone()
    for b, groups in enumerate(joined):
        for place, members in groups.items():
            made[b, place] = table[b, members].float().mean(0).to(made)
    return made


def _embedded(decoder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """With embeddings in place of ids and pixels, where the decoder (Phi-4's) would make them."""
    if kwargs.get("inputs_embeds") is not None:
        return kwargs
    pictures = {
        name: kwargs.pop(name)
        for name in ("image_pixel_values", "image_sizes", "image_attention_mask")
    }
    ids = kwargs.pop("input_ids")
    embeds = decoder.embed_tokens_extend.image_embed(ids, decoder.embed_tokens(ids), **pictures)
    return {**kwargs, "inputs_embeds": embeds}


def _tables(embeds: Tensor, kwargs: dict[str, Any]) -> dict[int, Tensor]:
    """Layer -> (B, L, D), what Granite 4 Vision adds before it."""
    tables = {}
    for layer, features in (kwargs.get("deepstack_features") or {}).items():
        tables[layer] = torch.zeros_like(embeds)
        tables[layer][kwargs["vision_mask"][..., 0]] = features
    return tables


def told(
    plain: Any, inputs: Inputs, trace: atp_patch.PruningTrace, *, merges: bool, **options: Any
) -> Tensor:
    """(B, L, vocabulary) logits of the plain model whose visual tokens are merged by hand where the
    trace says who stays, and which cannot see those that went.

    Args:
        options: of :func:`~tests.helpers.oracle.masked_logits`.
    """
    kept: Kept = {number: layer.kept for number, layer in trace.layers.items()}
    plain = copy.deepcopy(plain)

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = _embedded(module, kwargs)
        embeds = kwargs["inputs_embeds"]
        added = _tables(embeds, kwargs)
        seen = embeds + added[min(added)] if added else embeds
        joined = joined_by_hand(seen, trace.layout, trace.layers[0].kept)
        made = {**kwargs, "inputs_embeds": means(embeds, joined)}
        if added:  # pictures enter as zeros, and features are added before some layers
            mask = kwargs["vision_mask"][..., 0]
            made["deepstack_features"] = {
                layer: means(table, joined)[mask] for layer, table in added.items()
            }
        late = kwargs.get("deepstack_visual_embeds")
        if late:  # features that are added behind the first layers
            mask, tables = kwargs["visual_pos_masks"], []
            for features in late:
                table = torch.zeros_like(embeds)
                table[mask] = features
                tables.append(means(table, joined)[mask])
            made["deepstack_visual_embeds"] = tables
        return args, made

    if merges:
        locate(plain).decoder.register_forward_pre_hook(enter, with_kwargs=True)
    return masked_logits(plain, inputs, kept, **options)
