"""What Gemma 4 alone has: layers that reuse keys, rows that the host cuts, heads of two sizes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import atp_patch
from atp_patch.seam import decoder_shape
from tests.families.gemma4 import GLOBAL_HEAD_DIM, KINDS, SHARED
from tests.families.kinds import MIXED, SINGLE, Kind, make
from tests.families.test_every_family import patched
from tests.helpers import tiny
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.inputs import extended, real_mask
from tests.helpers.run import forward, kept_of

pytestmark = pytest.mark.skipif(not KINDS, reason="this version of transformers has no Gemma 4")
CUTS = any(  # early versions run all layers on all tokens
    hasattr(kind.build().get_decoder(), "_maybe_slice_kv_shared_inputs") for kind in KINDS
)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture
def shared() -> Kind:
    return next(kind for kind in KINDS if kind.name == SHARED)


@pytest.mark.skipif(not CUTS, reason="this version of Gemma 4 runs all layers on all tokens")
@pytest.mark.parametrize(("padding", "cached"), [("left", True), ("right", False)])
def test_layers_that_reuse_keys_run_on_the_last_rows_alone(
    shared: Kind, padding: str, cached: bool
) -> None:
    """The host cuts the sequence to what ``logits_to_keep`` asks for; pruning leaves it that."""
    model, inputs = patched(shared), make(shared, MIXED, padding).inputs
    whole = forward(model, inputs).logits
    kept = kept_of(model)[3]
    model.set_attn_implementation("eager")  # with sdpa the host cuts one row alone
    rows: list[int] = []
    model.get_decoder().layers[-1].register_forward_hook(
        lambda module, args, output: rows.append(output.shape[1])
    )
    length = whole.shape[1]
    for wanted in (1, 30, length):
        logits = forward(model, inputs, logits_to_keep=wanted, use_cache=cached).logits
        assert_close(logits, whole[:, -wanted:], kept[:, -wanted:] & real_mask(inputs)[:, -wanted:])
    assert rows == [1, 30, int(kept.sum(1).max())]


def test_flops_are_counted_for_the_rows_that_layers_run_on(shared: Kind) -> None:
    model, inputs = shared.build(), make(shared, SINGLE).inputs
    model.set_attn_implementation("eager")
    atp_patch.patch_model(model, [2], "uniform", keep=1.0)
    flops = {}
    for wanted in (1, 0):
        with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
            model(**inputs, logits_to_keep=wanted)
        counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
        layer = re.compile(r".*language_model\.layers\.\d+\.(self_attn|mlp)")
        counted = sum(n for name, n in counts.items() if layer.fullmatch(name))
        text = model.config.text_config
        head = 2 * text.hidden_size * text.vocab_size  # of one row, as for the next token
        flops[wanted] = atp_patch.last_trace(model).flops_plain
        assert flops[wanted] == counted + head
    assert (flops[1] < flops[0]) == CUTS


def test_a_row_without_a_mask_sees_no_empty_slot(shared: Kind) -> None:
    """Samples of equal length keep different numbers of tokens, and the host gives no mask."""
    model = atp_patch.patch_model(shared.build(), [2], Uneven(), keep=0.5)
    inputs = make(shared, (MIXED[0], MIXED[0])).inputs
    del inputs["attention_mask"]
    expected = forward(model, inputs).logits[:, -1:]
    alive = kept_of(model)[2].sum(1)
    assert alive[0] != alive[1]
    assert_close(forward(model, inputs, logits_to_keep=1).logits, expected)


class Uneven(atp_patch.LayerMethod):
    """Keeps a quarter of the first sample's tokens and half of the others'."""

    name = "uneven"
    summary = "shares that differ from sample to sample"

    def attention_layers(self, layer: int) -> tuple[int, ...]:
        return ()

    def decide(self, view: atp_patch.View, module: Any = None) -> atp_patch.Decision:
        columns = torch.arange(view.slot_valid.shape[1])
        step = torch.tensor([4] + [2] * (len(view.slot_valid) - 1))
        return atp_patch.Decision((columns % step[:, None] == 0) & view.slot_valid)


@every_kind
def test_a_conversation_goes_on_with_the_cache(kind: Kind) -> None:
    model, inputs = patched(kind, method="uniform"), make(kind, MIXED[:1]).inputs
    more = torch.arange(tiny.FIRST_WORD, tiny.FIRST_WORD + 6)[None]
    longer = extended(inputs, more)
    expected = forward(model, longer).logits[:, -3:]
    cache = forward(model, inputs, use_cache=True).past_key_values
    for part in (slice(0, 2), slice(2, 6)):
        length = inputs["input_ids"].shape[1] + part.stop
        mask = longer["attention_mask"][:, :length]
        types = torch.zeros_like(more[:, part])
        last = forward(
            model,
            {"input_ids": more[:, part], "attention_mask": mask, "mm_token_type_ids": types},
            past_key_values=cache,
            logits_to_keep=3 if part.start else 1,
        ).logits
    assert_close(last, expected)


def test_later_layers_are_refused_with_those_that_can_be_pruned(shared: Kind) -> None:
    model = shared.build()
    before = snapshot(model)
    for family in (None, "generic"):
        with pytest.raises(atp_patch.ConfigError, match=r"from layer 5 on.*layers from 1 to 3"):
            atp_patch.patch_model(model, [2, 4], "fastv", keep=0.5, family=family)
    assert snapshot(model) == before


def test_keys_for_a_drafting_model_are_refused(shared: Kind) -> None:
    model, inputs = patched(shared), make(shared, SINGLE).inputs
    with pytest.raises(atp_patch.UnsupportedModelError, match="shared_kv_states"):
        forward(model, inputs, return_shared_kv_states=True)


@every_kind
def test_sizes_of_heads_are_read_layer_by_layer(kind: Kind) -> None:
    """The bytes that a trace counts are those of the cache."""
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    text = model.config.text_config
    cache = forward(model, inputs, use_cache=True).past_key_values
    trace = atp_patch.last_trace(model)
    sliding = [kind == "sliding_attention" for kind in text.layer_types]
    assert decoder_shape(text).head_dims == tuple(
        tiny.HEAD_DIM if slides else GLOBAL_HEAD_DIM for slides in sliding
    )
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert len(held) == tiny.LAYERS - text.num_kv_shared_layers
    tokens, a_token = inputs["input_ids"].shape[1], 2 * 4 * tiny.KV_HEADS * tiny.HEAD_DIM
    # Sliding layers before the first pruning may drop what is outside of their window.
    before = zip(cache.layers[: kind.layers[0]], sliding, strict=False)
    dropped = sum((tokens - layer.keys.shape[2]) * a_token for layer, slides in before if slides)
    assert trace.kv_bytes == sum(2 * layer.keys.nbytes for layer in held) + dropped


def test_placeholders_without_places_of_patches_are_refused() -> None:
    kind = KINDS[0]
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    features = model.get_image_features(inputs["pixel_values"], inputs["image_position_ids"])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    visual = inputs["input_ids"] == tiny.IMAGE
    made = features.pooler_output
    embeds[visual] = made if isinstance(made, torch.Tensor) else torch.cat(made)
    given = {"inputs_embeds": embeds.detach(), "visual_mask": visual}
    with pytest.raises(atp_patch.InputError, match="pass image_position_ids"):
        forward(model, given)
    places = {"image_position_ids": inputs["image_position_ids"]}
    types = {"mm_token_type_ids": inputs["mm_token_type_ids"]}
    actual = forward(model, {**given, **places, **types}).logits
    assert_close(actual, forward(model, inputs).logits, kept_of(model)[6])
