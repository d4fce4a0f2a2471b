"""The core of what every family promises, in few passes, for the rows that are held to it briefly.

The tests that take each promise by itself run for these rows too, where slow tests are asked for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

import atp_patch
from tests.families.hosts import (
    skip_where_keys_are_shared_by_the_cache,
    skip_where_samples_share_places,
    skip_where_the_cache_matters,
)
from tests.families.kinds import MIXED, Kind, make
from tests.families.tables import (
    EVERY,
    brief_kind,
    brief_with_videos,
    one_of_each_brief_table,
)
from tests.families.test_every_family import check_grids, check_masked, patched, placed
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.doors import Asked, told
from tests.helpers.inputs import real_mask
from tests.helpers.run import forward, generate, kept_of


@brief_kind
def test_plain_masked_alone_and_unpatched(kind: Kind) -> None:
    plain, batch = kind.build(), make(kind, MIXED)
    skip_where_keys_are_shared_by_the_cache(plain)
    inputs, real = batch.inputs, real_mask(batch.inputs)
    model, expected = kind.build(), forward(plain, inputs).logits
    atp_patch.patch_model(model, method="fastv", keep=1.0, layers=kind.layers)
    assert torch.equal(forward(model, inputs).logits, expected)
    atp_patch.unpatch_model(model)
    before = snapshot(model)
    atp_patch.patch_model(model, method="fastv", keep=0.5, layers=kind.layers)
    for padding in ("right", "left"):
        check_masked(kind, model, plain, make(kind, MIXED, padding))
    check_grids(model, batch)
    together, survivors = forward(model, inputs).logits, kept_of(model)[kind.layers[-1]]
    atp_patch.unpatch_model(model)
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, expected)
    skip_where_samples_share_places(plain)
    atp_patch.patch_model(model, method="fastv", keep=0.5, layers=kind.layers)
    for b, one in enumerate(MIXED):
        alone = forward(model, make(kind, [one]).inputs).logits
        assert_close(together[b, real[b]][None], alone, survivors[b, real[b]][None])


@one_of_each_brief_table
def test_generation(kind: Kind) -> None:
    """The cache changes no answer, and keeping all none of the plain model's."""
    plain, model, inputs = kind.build(), patched(kind), make(kind, MIXED).inputs
    everything = patched(kind, keep=1.0)
    assert torch.equal(generate(everything, inputs, 3), generate(plain, inputs, 3))
    skip_where_the_cache_matters(plain, inputs)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (
        torch.stack(generate(model, inputs, 3, use_cache=use, **wanted).logits)
        for use in (True, False)
    )
    assert_close(cached, uncached)


@one_of_each_brief_table
def test_a_door_method(kind: Kind) -> None:
    batch = make(kind, MIXED)
    skip_where_keys_are_shared_by_the_cache(kind.build())
    model = atp_patch.patch_model(kind.build(), method=Asked(), keep=0.5)
    logits = forward(model, batch.inputs).logits
    trace = atp_patch.last_trace(model)
    entered = trace.layers[0].kept
    assert entered[real_mask(batch.inputs) & ~placed(batch)].all()
    expected = told(
        kind.build(),
        batch.inputs,
        trace,
        merges=True,
        **kind.seen(batch.inputs),
    )
    assert_close(logits, expected, entered)


@brief_with_videos
def test_videos(kind: Kind) -> None:
    model, batch = patched(kind), make(kind, kind.video_samples)
    check_masked(kind, model, kind.build(), batch)
    check_grids(model, batch)


@one_of_each_brief_table
def test_adapters_come_back(kind: Kind, tmp_path: Path) -> None:
    inputs = make(kind, MIXED[:1]).inputs
    model = patched(kind, method="atp")
    expected = forward(model, inputs).logits
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(kind.build(), weights=tmp_path)
    assert torch.equal(forward(again, inputs).logits, expected)


SAME_CLASS = {  # a type of its own -> the row whose class and parts it has
    "ShieldGemma2Config": "gemma3",
    "GlmgaConfig": "glm46v",
    "PPChart2TableConfig": "got_ocr2",
}


@pytest.mark.parametrize("name", [name for name in SAME_CLASS if hasattr(transformers, name)])
def test_types_that_share_a_class_are_served_as_its_own(name: str) -> None:
    (kind,) = (kind for kind in EVERY if kind.name == SAME_CLASS[name])

    def config() -> PreTrainedConfig:
        given = kind.config().to_dict()
        del given["model_type"]
        made: PreTrainedConfig = getattr(transformers, name)(**given)
        return made

    typed = replace(kind, config=config)
    assert typed.build().config.model_type != kind.build().config.model_type
    check_grids(patched(typed, method="uniform"), make(typed, MIXED))
