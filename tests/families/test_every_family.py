"""Every family in one table: plain when nothing goes, masked when something does, true grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.seam import locate
from tests.families.hosts import (
    HOST,
    NEWEST,
    REPEATED_ONE_BY_ONE,
    REPEATS_SAMPLES,
    shares_keys_by_the_cache,
    skip_where_samples_share_places,
    skip_where_the_cache_matters,
)
from tests.families.kinds import (
    ALIKE,
    MIXED,
    SINGLE,
    TWO,
    Batch,
    Kind,
    columns_ramp,
    make,
    rows_ramp,
)
from tests.families.tables import EVERY, every_kind, with_videos
from tests.helpers.compare import assert_close, assert_same_choice, snapshot
from tests.helpers.inputs import real_mask
from tests.helpers.oracle import masked_logits
from tests.helpers.run import forward, generate, kept_of
from tests.helpers.tiny import decoder_layers

FAST = {"method": "fastv", "keep": 0.5}

paddings = pytest.mark.parametrize("padding", ["left", "right"])


def patched(kind: Kind, **options: Any) -> Any:
    return atp_patch.patch_model(kind.build(), **{**FAST, "layers": kind.layers, **options})


@every_kind
def test_layers_left_out_are_in_proportion(kind: Kind) -> None:
    model = kind.build()
    vision = getattr(model.config, "vision_config", None)  # Fuyu has no tower
    late = getattr(vision, "deepstack_visual_indexes", ())
    atp_patch.patch_model(model, keep=0.5)
    forward(model, make(kind, SINGLE).inputs)
    proportional = (2, 4, 6) if len(late or ()) == 2 else kind.default_layers
    expected = {min(layer, kind.last_layer) for layer in proportional}
    assert list(atp_patch.last_trace(model).layers) == sorted(expected)


def placed(batch: Batch) -> Tensor:
    """(B, L) bool: the tokens that have a place in a grid."""
    return torch.tensor([[place is not None for place in row] for row in batch.places])


def check_masked(kind: Kind, model: Any, plain: Any, batch: Batch) -> None:
    """Logits of the survivors are those of the plain model that cannot see what went."""
    inputs, cached = batch.inputs, shares_keys_by_the_cache(plain)
    logits = forward(model, inputs, use_cache=cached or None).logits
    kept = kept_of(model)
    survivors = kept[max(kept)]
    assert survivors[real_mask(inputs) & ~placed(batch)].all(), "more than grids was pruned"
    assert not survivors[~real_mask(inputs)].any(), "padding was kept"
    assert (placed(batch) & ~survivors).any(), "nothing was pruned: this shows nothing"
    expected = masked_logits(plain, inputs, kept, cached=cached, **kind.seen(inputs))
    assert_close(logits, expected, survivors)


@every_kind
def test_keeping_all_is_plain_bit_for_bit(kind: Kind) -> None:
    plain, model = kind.build(), patched(kind, keep=1.0)
    inputs = make(kind, MIXED).inputs
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    expected, actual = (generate(one, inputs, 2, **wanted) for one in (plain, model))
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))


@paddings
@every_kind
def test_gathered_is_masked(kind: Kind, padding: str) -> None:
    check_masked(kind, patched(kind), kind.build(), make(kind, MIXED, padding))


@every_kind
def test_gathered_is_masked_without_padding(kind: Kind) -> None:
    check_masked(kind, patched(kind), kind.build(), make(kind, TWO))


@with_videos
def test_gathered_is_masked_with_videos(kind: Kind) -> None:
    """And a batch of videos is its samples, with a cache or without."""
    model, batch = patched(kind), make(kind, kind.video_samples)
    check_masked(kind, model, kind.build(), batch)
    skip_where_the_cache_matters(kind.build(), batch.inputs)
    answers = generate(model, batch.inputs, 2)
    assert torch.equal(generate(model, batch.inputs, 2, use_cache=False), answers)
    for answer, one in zip(answers, kind.video_samples, strict=True):
        assert torch.equal(generate(model, make(kind, [one]).inputs, 2)[0, -2:], answer[-2:])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atp", "fixed", "random", "uniform"])
@every_kind
def test_gathered_is_masked_with_every_method(kind: Kind, method: str) -> None:
    check_masked(kind, patched(kind, method=method), kind.build(), make(kind, MIXED))


@every_kind
def test_eager_attention_chooses_and_computes_alike(kind: Kind) -> None:
    inputs = make(kind, MIXED).inputs
    model = patched(kind)
    expected, kept = forward(model, inputs).logits, kept_of(model)
    model.set_attn_implementation("eager")
    actual = forward(model, inputs).logits
    for layer, mask in kept_of(model).items():
        assert_same_choice(mask, kept[layer])
    assert_close(actual, expected, kept[max(kept)])


@every_kind
def test_the_cache_changes_no_answer(kind: Kind) -> None:
    model = patched(kind)
    inputs = make(kind, MIXED).inputs
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    skip_where_the_cache_matters(kind.build(), inputs)
    cached = generate(model, inputs, 3, **wanted)
    uncached = generate(model, inputs, 3, use_cache=False, **wanted)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(uncached.logits))
    plain = generate(kind.build(), inputs, 3, **wanted)
    assert not torch.equal(torch.stack(plain.logits), torch.stack(cached.logits))


@paddings
@every_kind
def test_a_batch_is_its_samples_alone(kind: Kind, padding: str) -> None:
    skip_where_samples_share_places(kind.build())
    model = patched(kind)
    inputs = make(kind, MIXED, padding).inputs
    together, kept = forward(model, inputs).logits, kept_of(model)
    answers = generate(model, inputs, 2) if padding == "left" else None
    for b, one in enumerate(MIXED):
        real = real_mask(inputs)[b]
        single = make(kind, [one])
        alone = forward(model, single.inputs).logits
        if placed(single).any():
            chosen = kept_of(model)
            for layer, mask in kept.items():
                assert_same_choice(mask[b, real][None], chosen[layer])
        survivors = kept[max(kept)][b, real][None]
        assert_close(together[b, real][None], alone, survivors)
        if answers is not None:
            assert torch.equal(answers[b, -2:], generate(model, single.inputs, 2)[0, -2:])


@every_kind
def test_beams_of_a_batch_are_its_samples_beams(kind: Kind) -> None:
    """Beams repeat the samples, and so the grids, before anything is chosen."""
    if kind.name in ("qwen3_vl-flat", "llama4", "fuyu"):
        pytest.skip("transformers cannot repeat this model's samples, the plain one's either")
    if kind.name == "exaone4_5" and NEWEST > HOST:
        pytest.skip("the plain exaone4_5 cannot search with beams")
    skip_where_samples_share_places(kind.build())
    model = patched(kind)
    by_sample = REPEATS_SAMPLES and kind.name not in REPEATED_ONE_BY_ONE
    samples = MIXED[:2] if by_sample else ALIKE
    together = generate(model, make(kind, samples).inputs, 3, num_beams=2)
    for answer, one in zip(together, samples, strict=True):
        alone = generate(model, make(kind, [one]).inputs, 3, num_beams=2)
        assert torch.equal(answer[-3:], alone[0, -3:])


@every_kind
def test_unpatching_leaves_nothing(kind: Kind) -> None:
    model = kind.build()
    inputs = make(kind, SINGLE).inputs
    expected, before = forward(model, inputs).logits, snapshot(model)
    atp_patch.patch_model(model, **{**FAST, "layers": kind.layers})
    forward(model, inputs)
    generate(model, inputs, 2)
    atp_patch.unpatch_model(model)
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, expected)


@paddings
@every_kind
def test_grids_are_where_the_processor_puts_them(kind: Kind, padding: str) -> None:
    check_grids(patched(kind, method="uniform"), make(kind, MIXED, padding))


@with_videos
def test_grids_of_videos_are_where_the_processor_puts_them(kind: Kind) -> None:
    check_grids(patched(kind, method="uniform"), make(kind, kind.video_samples))


def check_grids(model: Any, batch: Batch) -> None:
    """Position, number of the grid, frame, row and column of every visual token."""
    forward(model, batch.inputs)
    layout = atp_patch.last_trace(model).layout
    for b, row in enumerate(batch.places):
        expected = [(at, *place) for at, place in enumerate(row) if place is not None]
        table = torch.stack(
            [layout.position, layout.image, layout.frame, layout.row, layout.column]
        )
        found = table[:, b, layout.valid[b]].T.tolist()
        assert sorted(map(tuple, found)) == expected


@every_kind
def test_grids_are_seen_in_pictures_of_stripes(kind: Kind) -> None:
    """A tower that looks at each patch alone makes equal features of equal stripes."""
    if not kind.placed:
        pytest.skip("each visual token has seen more of its picture than its own place")
    model = patched(kind, method="uniform")
    local(model)
    embeds: list[Tensor] = []
    locate(model).decoder.register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for paint, along in ((rows_ramp, "row"), (columns_ramp, "column")):
        forward(model, make(kind, MIXED, paint=paint).inputs)
        layout = atp_patch.last_trace(model).layout
        for b, total in enumerate(layout.totals):
            image, line = layout.image[b, :total], getattr(layout, along)[b, :total]
            check_stripes(embeds[-1][b, layout.position[b, :total]], image, line)


def check_stripes(features: Tensor, image: Tensor, line: Tensor) -> None:
    """Features (V, D) are equal along each line of a grid, and unlike those of the next line."""
    for number in image.unique().tolist():
        centres = []
        for stripe in line[image == number].unique().tolist():
            same = features[(image == number) & (line == stripe)]
            assert_close(same, same.mean(0).expand_as(same), tolerance=1e-4)
            centres.append(same.mean(0))
        steps = torch.stack(centres).diff(dim=0).abs().amax(-1)
        assert (steps > 1e-3).all(), f"lines of grid {number} look alike"


def local(model: Any) -> None:
    """Make the vision tower look at each patch alone, wherever it stands."""
    outputs = ("out_proj", "o_proj", "projection_layer", "attn.proj", "attention.dense")
    decoder = {id(weight) for weight in decoder_layers(model).parameters()}
    places = ("position_embedding", "positional_embedding", "pos_embed")
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        mixes = any(part in name for part in outputs) and "projector" not in name
        mixes = mixes or (any(part in name for part in places) and weight.is_floating_point())
        reads_cells = "head" in name or "pooling" in name
        if mixes and id(weight) not in decoder and not reads_cells:
            weight.data.zero_()


@every_kind
def test_adapters_come_back(kind: Kind, tmp_path: Path) -> None:
    inputs = make(kind, SINGLE).inputs
    model = patched(kind, method="atp")
    expected = forward(model, inputs).logits
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(kind.build(), weights=tmp_path)
    assert torch.equal(forward(again, inputs).logits, expected)


def test_inputs_are_used_up() -> None:
    """Guard of the tests: every kind is another kind, every prompt has dozens of tokens."""
    kinds = EVERY
    assert len({kind.name for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert placed(make(kind, SINGLE)).sum() >= 24
