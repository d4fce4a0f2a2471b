"""A method at the decoder's door serves every family, merges included; the tower where it can be
read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from packaging.version import Version

import atp_patch
from atp_patch.families import FAMILIES, family_of
from tests.families.hosts import (
    HOST,
    REPEATS_SAMPLES,
    skip_where_keys_are_shared_by_the_cache,
    skip_where_samples_share_places,
    skip_where_the_cache_matters,
)
from tests.families.kinds import MIXED, Kind, make
from tests.families.tables import every_kind, one_of_each_table, with_videos
from tests.families.test_every_family import placed
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.doors import Asked, TowerReader, told, view_of_the_tower
from tests.helpers.inputs import real_mask
from tests.helpers.run import forward, generate, kept_of
from tests.seam.vision_cases import (
    CASES,
    MORE,
    Case,
    groups,
    part_of,
    read,
    rows_in_sequence,
)


def patched(kind: Kind, method: Any = None, **options: Any) -> Any:
    asked = {"method": method or Asked(), "keep": 0.5, **options}
    return atp_patch.patch_model(kind.build(), **asked)


@every_kind
def test_what_entered_is_merged_and_the_rest_is_masked(kind: Kind) -> None:
    plain, model = kind.build(), patched(kind)
    skip_where_keys_are_shared_by_the_cache(plain)
    batch = make(kind, MIXED)
    inputs = batch.inputs
    logits = forward(model, inputs).logits
    trace = atp_patch.last_trace(model)
    entered = trace.layers[0].kept
    assert entered[real_mask(inputs) & ~placed(batch)].all()
    assert trace.layers[0].kept_counts == tuple(round(n / 2) for n in trace.layout.totals)
    expected = told(plain, inputs, trace, merges=True, **kind.seen(inputs))
    assert_close(logits, expected, entered)


@every_kind
def test_keeping_all_is_plain_bit_for_bit(kind: Kind) -> None:
    plain, model = kind.build(), patched(kind, keep=1.0)
    inputs = make(kind, MIXED).inputs
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)


@one_of_each_table
def test_batches_caches_and_unpatching(kind: Kind) -> None:
    skip_where_samples_share_places(kind.build())
    model = patched(kind)
    inputs = make(kind, MIXED).inputs
    together, kept = forward(model, inputs).logits, kept_of(model)[0]
    answers = generate(model, inputs, 2)
    real = real_mask(inputs)
    for b, one in enumerate(MIXED):
        alone = make(kind, (one,)).inputs
        assert_close(
            together[b, real[b]][None], forward(model, alone).logits, kept[b, real[b]][None]
        )
    alone = make(kind, MIXED[:1]).inputs
    assert torch.equal(generate(model, alone, 2)[0, -2:], answers[0, -2:])
    skip_where_the_cache_matters(kind.build(), inputs)
    assert torch.equal(generate(model, inputs, 2, use_cache=False), answers)
    plain = kind.build()
    expected, before = forward(plain, inputs).logits, snapshot(plain)
    atp_patch.patch_model(plain, method=Asked())
    forward(plain, inputs)
    atp_patch.unpatch_model(plain)
    assert snapshot(plain) == before
    assert torch.equal(forward(plain, inputs).logits, expected)


@with_videos
def test_videos(kind: Kind) -> None:
    batch, model = make(kind, kind.video_samples), patched(kind)
    logits = forward(model, batch.inputs).logits
    trace = atp_patch.last_trace(model)
    expected = told(kind.build(), batch.inputs, trace, merges=True, **kind.seen(batch.inputs))
    assert_close(logits, expected, trace.layers[0].kept)


# -- the tower ------------------------------------------------------------------------------------

READABLE = [case for case in CASES if not case.name.startswith(("llava_next", "llava_onevision"))]
by_name = pytest.mark.parametrize("case", [*READABLE, *MORE], ids=lambda case: case.name)
by_name_or_slow = pytest.mark.parametrize(
    "case",
    [*READABLE, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)],
    ids=lambda case: case.name,
)


@every_kind
def test_the_tower_is_read_or_the_families_are_named_where_it_can_be(kind: Kind) -> None:
    model = kind.build()
    tower = family_of(model.config).tower(model.config)
    if tower is not None:
        assert atp_patch.patch_model(model, method=TowerReader()) is model
        return
    before = snapshot(model)
    with pytest.raises(atp_patch.UnsupportedModelError, match="tower-reader reads") as caught:
        atp_patch.patch_model(model, method=TowerReader())
    able = str(caught.value).partition("where they can: ")[2].partition(".")[0].split(", ")
    named = {family.name for family in FAMILIES if family.name in able}
    assert {"llava", "llava_next", "qwen2_vl", "internvl"} <= named
    assert snapshot(model) == before


@by_name
def test_attention_and_keys_of_the_tower_stand_where_the_tokens_do(case: Case) -> None:
    if case.name == "lfm2_vl" and Version("5.24") <= HOST:
        pytest.skip("its projector reads all pictures as one, which this oracle does not follow")
    plain = case.build()
    inputs = case.feed(plain, "right" if case.name == "video_llava" else "left")
    view = view_of_the_tower(case.build(), inputs, keep=0.5)
    tower, seen = view.tower[-1], torch.zeros_like(view.slot_valid)
    traced = rows_in_sequence(plain, case.projector, inputs)
    for one, where in zip(read(case, plain, inputs), traced, strict=True):
        for group, rows in zip(*groups(case, one), strict=True):
            for number, row in enumerate(rows):
                ((b, place),) = (where == row).nonzero().tolist()
                (column,) = (view.layout.position[b] == place).nonzero()[:1].flatten().tolist()
                attention = float(tower.attention[b, column])
                assert attention == pytest.approx(group.attention[number], abs=1e-5)
                key = torch.from_numpy(group.key[number]).float()
                torch.testing.assert_close(tower.key[b, column], key, rtol=1e-4, atol=1e-4)
                seen[b, column] = True
    assert torch.equal(seen, view.slot_valid)


@by_name_or_slow
def test_a_method_that_reads_the_tower_is_the_same_in_any_batch_and_with_beams(case: Case) -> None:
    model = atp_patch.patch_model(case.build(), method=TowerReader(), keep=0.5)
    inputs = case.feed(model, "left")
    together, kept = forward(model, inputs).logits, kept_of(model)[0]
    real = real_mask(inputs)
    beams = case.beams and REPEATS_SAMPLES
    answers = generate(model, inputs, 3, num_beams=2) if beams else None
    for b in range(case.count):
        alone = case.alone(model, b)
        assert_close(
            together[b, real[b]][None], forward(model, alone).logits, kept[b, real[b]][None]
        )
        if answers is not None:
            assert torch.equal(generate(model, alone, 3, num_beams=2)[0, -3:], answers[b, -3:])


def test_class_tokens_and_earlier_blocks() -> None:
    (case,) = (case for case in READABLE if case.name == "vipllava")  # it uses the last of two

    class Deep(TowerReader):
        name = "deep"

        @property
        def tower_blocks(self) -> tuple[int, ...]:
            return (0, -1, -2)

        def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
            towers.append(view)
            return super().decide(view)

    towers: list[atp_patch.DoorView] = []
    model = atp_patch.patch_model(case.build(), method=Deep(), keep=0.5)
    inputs = case.feed(model, "left")
    forward(model, inputs)
    plain, states = case.build(), []
    for layer in part_of(plain, "vision_tower.encoder.layers"):
        layer.register_forward_hook(lambda *given: states.append(given[-1]))
    forward(plain, inputs)
    first, last = (out[0] if isinstance(out, tuple) else out for out in states[:2])
    (view,) = towers
    assert set(view.tower) == {0, -1, -2}
    assert torch.equal(view.tower[0].attention, view.tower[-2].attention)
    assert not torch.equal(view.tower[0].attention, view.tower[-1].attention)
    number = 0
    for b, grids in enumerate(view.layout.grids):
        for image in range(len(grids)):
            mine = view.slot_valid[b] & (view.image[b] == image)
            for block, out in ((0, first), (-1, last)):
                made = view.tower[block].class_token
                assert made is not None
                assert torch.equal(made[b, mine], out[number, 0].expand(int(mine.sum()), -1))
            number += 1
    assert number == len(first)


def test_towers_without_class_tokens_and_wrong_blocks() -> None:
    @dataclass(frozen=True)
    class Block(TowerReader):
        name = "block"
        number: int = 0

        @property
        def tower_blocks(self) -> tuple[int, ...]:
            return (self.number,)

    cases = {case.name: case for case in READABLE}
    for name, number, message in (
        ("llava-llama", 2, "no block 2 in a tower of 2 blocks"),
        ("llava-llama", -2, "no block -2"),
        ("qwen2_vl", -3, "no block -3"),
    ):
        with pytest.raises(atp_patch.ConfigError, match=message):
            atp_patch.patch_model(cases[name].build(), method=Block(number=number))
    with pytest.raises(atp_patch.UnsupportedModelError, match="within windows"):
        atp_patch.patch_model(cases["qwen2_5_vl"].build(), method=Block(number=-2))
    model = cases["qwen2_vl"].build()
    view = view_of_the_tower(model, cases["qwen2_vl"].feed(model, "left"))
    assert view.tower[-1].class_token is None


def test_a_tower_that_did_not_run_is_named() -> None:
    (case,) = (case for case in READABLE if case.name == "llava-llama")
    model = atp_patch.patch_model(case.build(), method=TowerReader(), keep=0.5)
    inputs = case.feed(model, "left")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {
        "inputs_embeds": embeds,
        "attention_mask": inputs["attention_mask"],
        "visual_mask": inputs["input_ids"] == 5,
    }
    with pytest.raises(atp_patch.InputError, match=re.escape("ran for 0 images")):
        forward(model, given)
    expected = forward(model, inputs).logits
    assert torch.equal(forward(model, inputs).logits, expected)
