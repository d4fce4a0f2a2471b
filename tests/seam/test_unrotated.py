"""Scores before rotary embedding: queries and keys as the projections put them out."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor

import atp_patch
from atp_patch.methods.base import keep_best
from atp_patch.seam.host.rotation import _ROTATES
from tests.families import anyres, gemma4, llama4, mrope, square, towers
from tests.families.kinds import MIXED, Kind, Picture, Sample, Words, make
from tests.families.tables import EVERY
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close, assert_same_choice
from tests.helpers.inputs import batch, real_mask, visual_mask
from tests.helpers.run import forward, generate, kept_of, words

KINDS = tuple(
    kind for table in (square, anyres, towers, mrope, gemma4, llama4) for kind in table.KINDS
)
# Decoders that leave out the rotary embedding of some layers.
PARTLY = (
    "aya_vision",
    "cohere2_vision",
    "exaone4_5",
    "cohere_compass",
    "muse_glimmer",
    "muse_spark",
)
LAYER = 3


@dataclass(frozen=True)
class Spy(atp_patch.LayerMethod):
    """Keeps the first tokens, and what it saw."""

    name: ClassVar[str] = "spy"
    summary: ClassVar[str] = "for tests"
    seen: tuple[Any, ...] = ()

    def decide(self, view: atp_patch.View, module: object) -> atp_patch.Decision:
        found: Any = self.seen[0]
        found.append(view.unrotated())
        return atp_patch.Decision(keep_best(view, -view.token.float()))


@dataclass(frozen=True)
class SpyOnAll(Spy):
    """Keeps everything, and what it saw."""

    name: ClassVar[str] = "spy on all"

    def decide(self, view: atp_patch.View, module: object) -> atp_patch.Decision:
        super().decide(view, module)
        return atp_patch.Decision(view.slot_valid)


def projections(attention: Any) -> list[Tensor]:
    """A list that will hold what goes into rotary embedding at the next call: q, then k."""
    found: list[Tensor] = []
    for name in ("q", "k"):
        last = f"{name}_norm" if hasattr(attention, f"{name}_norm") else f"{name}_proj"
        getattr(attention, last).register_forward_hook(
            lambda module, args, output: found.append(output)
        )
    return found


@pytest.mark.parametrize(
    "kind",
    [*KINDS, *(kind for kind in EVERY if kind.name in PARTLY)],
    ids=lambda kind: kind.name,
)
def test_turned_back_they_are_the_projections(kind: Kind) -> None:
    """Of every layer, since some decoders leave out the rotary embedding of some layers."""
    layers = list(range(kind.layers[0], kind.last_layer + 1))
    model, seen = kind.build(), []
    atp_patch.patch_model(model, layers, SpyOnAll((seen,)), keep=0.97)
    attentions = [tiny.decoder_layers(model)[layer - 1].self_attn for layer in layers]
    raws = [projections(attention) for attention in attentions]
    forward(model, make(kind, MIXED).inputs)
    assert len(seen) == len(layers)
    for attention, found, pair in zip(attentions, raws, seen, strict=True):
        factors = (getattr(attention, "qk_scale_factor", 1.0), 1.0)  # of queries, and of keys
        for turned, raw, factor in zip(pair, found, factors, strict=True):
            if raw.ndim == 3:
                raw = raw.unflatten(-1, (-1, turned.shape[-1]))
            raw = getattr(attention, "qk_norm", lambda states: states)(raw)
            raw = raw if raw.shape[1] == turned.shape[1] != raw.shape[2] else raw.transpose(1, 2)
            assert_close(turned, raw * factor)


def test_a_choice_does_not_depend_on_the_padding_of_layers_without_rotary_embedding() -> None:
    """Keys of such layers were turned by the positions that nothing had turned them by."""
    kind = next(kind for kind in EVERY if kind.name == "aya_vision")
    samples = [
        Sample((Picture(0), Words(1)), 0),
        Sample((Words(6), Picture(0), Words(1)), 1),
    ]
    model = atp_patch.patch_model(kind.build(), [1, 2, 4], "dart", target_share=0.3)
    forward(model, make(kind, samples, "left").inputs)
    together = kept_of(model)
    forward(model, make(kind, samples[:1]).inputs)
    for layer, alone in kept_of(model).items():
        assert torch.equal(together[layer][:1, -alone.shape[1] :], alone)


def test_keys_that_are_changed_after_rotation_are_refused() -> None:
    kind = next(kind for kind in EVERY if kind.name == "hunyuan_vl")
    model = atp_patch.patch_model(kind.build(), [LAYER], "dart", keep=0.5)
    with pytest.raises(atp_patch.ATPError, match="HunYuanVLDenseV1Attention cannot be undone"):
        forward(model, make(kind, MIXED).inputs)


@pytest.mark.parametrize("kind", tiny.ALL_KINDS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_fastv_before_rotation_ranks_by_the_unrotated_attention(kind: str, padding: str) -> None:
    plain = tiny.tiny_model(kind)
    inputs = batch(plain, prompts.MIXED, padding)
    found = projections(plain.get_decoder().layers[LAYER - 1].self_attn)
    forward(plain, inputs)
    query, key = (t.unflatten(-1, (-1, tiny.HEAD_DIM)).transpose(1, 2).double() for t in found)
    key = key.repeat_interleave(tiny.HEADS // tiny.KV_HEADS, 1)
    real, visual = real_mask(inputs), visual_mask(inputs)
    scores, expected = torch.zeros(real.shape), real.clone()
    for b in range(len(real)):
        last = int(real[b].nonzero()[-1])
        places = real[b].nonzero().flatten()
        logits = query[b, :, last] @ key[b, :, places].transpose(1, 2) / tiny.HEAD_DIM**0.5
        per_head = torch.stack([logits[h, h] for h in range(tiny.HEADS)])
        scores[b, places] = per_head.softmax(-1).mean(0).float()
        own = visual[b].nonzero().flatten()
        order = own[scores[b, own].argsort(descending=True)]
        expected[b, order[len(own) // 2 :]] = False
    chosen = {}
    for rope in ("before", "after"):
        model = atp_patch.patch_model(tiny.tiny_model(kind), [LAYER], "fastv", keep=0.5, rope=rope)
        forward(model, inputs)
        chosen[rope] = kept_of(model)[LAYER]
    assert_same_choice(chosen["before"], expected, scores)
    assert not torch.equal(chosen["before"], chosen["after"])


def test_an_image_in_a_later_turn_is_scored_too() -> None:
    """Keys of the first turn take no part in scores before rotation."""
    model = atp_patch.patch_model(
        tiny.tiny_model("llava-llama"), [LAYER], "fastv", keep=0.5, rope="before"
    )
    inputs = batch(model, prompts.SINGLE)
    ids = torch.cat([words(1, 5), inputs["input_ids"]], 1)
    first = forward(model, {"input_ids": words(1, 5)}, use_cache=True)
    forward(
        model,
        {
            "input_ids": inputs["input_ids"],
            "pixel_values": inputs["pixel_values"],
            "attention_mask": torch.ones_like(ids),
        },
        past_key_values=first.past_key_values,
    )
    layer = atp_patch.last_trace(model).layers[LAYER]
    assert layer.kept_counts == (18,)
    scores = layer.scores["last"][visual_mask(inputs)]
    assert 0 < scores.sum() < 1
    assert torch.equal(generate(model, inputs, 3), generate(model, inputs, 3, use_cache=False))


def test_a_wrong_place_is_named() -> None:
    with pytest.raises(atp_patch.ConfigError, match="after, before"):
        atp_patch.patch_model(tiny.tiny_model("llava-llama"), [2], "fastv", rope="between")


def _conditions(tree: ast.AST) -> set[str]:
    """The conditions under which a piece of source rotates queries and keys."""
    return {
        ast.unparse(node.test)
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and any("apply_rotary_pos_emb" in ast.unparse(line) for line in node.body)
    }


@pytest.mark.slow
def test_every_attention_of_transformers_that_rotates_in_some_layers_is_known() -> None:
    by_layer = re.compile("sliding|local|force_rope|nope")
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if "apply_rotary_pos_emb" not in source:
            continue
        for piece in ast.parse(source).body:
            if isinstance(piece, ast.ClassDef) and any(map(by_layer.search, _conditions(piece))):
                found.add(piece.name)
    assert {"Cohere2Attention", "Exaone4Attention"} <= found
    assert found <= set(_ROTATES)
