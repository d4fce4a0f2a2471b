"""What models that hear have, latent attention, and tiles on the fine way."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config

import atp_patch
from atp_patch.contract import GridQuery, Span
from atp_patch.families import family_of
from atp_patch.seam import decoder_shape
from tests.families.kinds import SINGLE, Batch, Kind, make
from tests.families.omni import AUDIO, AUDIO_END, AUDIO_START, HEARING, KINDS
from tests.families.test_every_family import check_masked, patched
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.run import forward, generate, kept_of
from tests.seam.test_unrotated import Spy

TABLE = {kind.name: kind for kind in KINDS}
FRAMES, TOKENS = 40, 10  # of sound; the encoder halves its frames twice


def kind_of(name: str) -> Kind:
    if name not in TABLE:
        pytest.skip(f"this version of transformers has no {name}")
    return TABLE[name]


def test_what_is_heard_is_text() -> None:
    kind = kind_of("qwen2_5_omni")
    batch = make(kind, SINGLE)
    heard = [AUDIO_START, *[AUDIO] * TOKENS, AUDIO_END]
    ids = batch.inputs["input_ids"]
    ids = torch.cat([ids[:, :3], torch.tensor([heard]), ids[:, 3:]], 1)
    sound = torch.randn(
        1, HEARING["num_mel_bins"], FRAMES, generator=torch.Generator().manual_seed(3)
    )
    inputs = {
        **batch.inputs,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": sound,
        "feature_attention_mask": torch.ones(1, FRAMES, dtype=torch.long),
    }
    places = [batch.places[0][:3] + [None] * len(heard) + batch.places[0][3:]]
    model = patched(kind)
    check_masked(kind, model, kind.build(), Batch(inputs, places))
    assert kept_of(model)[6][0, 3 : 3 + len(heard)].all()
    silent = forward(model, {**inputs, "input_features": sound * 0}).logits
    assert not torch.equal(silent, forward(model, inputs).logits), "the sound is not heard"
    assert torch.equal(generate(model, inputs, 2), generate(model, inputs, 2, use_cache=False))


def test_latents_are_counted_as_they_are_cached() -> None:
    kind = kind_of("kimi_k25")
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    cache = forward(model, inputs, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert atp_patch.last_trace(model).kv_bytes == held


def test_heads_of_latent_attention_have_the_sizes_of_the_config() -> None:
    shape = decoder_shape(DeepseekV3Config(num_hidden_layers=2))
    assert shape.head_dims == ((192 + 128) // 2,) * 2
    assert shape.kv_sizes == (512 + 64,) * 2


def test_latent_attention_is_turned_back_in_the_rotated_end_of_its_heads() -> None:
    """The order of the numbers in that end is the host's, so products are compared."""
    kind = kind_of("kimi_k25")
    model, seen, raw = kind.build(), [], {}
    attention = tiny.decoder_layers(model)[2].self_attn
    for name in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, name=name: raw.__setitem__(name, output)
        )
    atp_patch.patch_model(model, [3], Spy((seen,)), keep=0.5)
    forward(model, make(kind, SINGLE).inputs)
    query = raw["q_b_proj"].unflatten(-1, (tiny.HEADS, -1)).transpose(1, 2)
    plain = raw["kv_b_proj"].squeeze(1).unflatten(-1, (tiny.HEADS, -1)).transpose(1, 2)
    turned = raw["kv_a_proj_with_mqa"][:, None, :, -attention.qk_rope_head_dim :]
    key = torch.cat(
        [plain[..., : attention.qk_nope_head_dim], turned.expand(-1, tiny.HEADS, -1, -1)], -1
    )
    found = torch.einsum("bhqd,bhkd->bhqk", *seen[0])
    assert_close(found, torch.einsum("bhqd,bhkd->bhqk", query, key))


def test_a_tile_on_the_fine_way_has_four_times_the_tokens() -> None:
    kind = kind_of("granite_docling")
    config = kind.config()
    spans = [[Span(2, 38, tiny.IMAGE), Span(41, 185, tiny.IMAGE)]]
    (grids,) = family_of(config).grids(GridQuery(config, spans, None))
    assert [(grid.start, grid.height, grid.width) for grid in grids] == [(2, 6, 6), (41, 12, 12)]


def test_kimi_needs_the_sizes_of_its_pictures() -> None:
    kind = kind_of("kimi_k25")
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "visual_mask": inputs["input_ids"] == tiny.IMAGE}
    with pytest.raises(atp_patch.InputError, match="pass image_grid_thw"):
        forward(model, given)
