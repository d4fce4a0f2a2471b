"""Which method serves which family: it does, or the error names the families that it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import atp_patch
from atp_patch.families import FAMILIES, family_of
from atp_patch.methods import METHODS, DoorMethod, LayerMethod
from tests.families.hosts import skip_where_samples_share_places, skip_where_the_cache_matters
from tests.families.kinds import MIXED, Kind, make
from tests.families.tables import every_kind, one_of_each_table
from tests.families.test_every_family import check_masked
from tests.helpers import tiny
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.inputs import real_mask
from tests.helpers.run import forward, generate, kept_of

CLASSES = {cls.name: cls for cls in METHODS}
BEFORE = [cls.name for cls in METHODS if not issubclass(cls, LayerMethod)]


def serves(method: str, config: Any) -> bool:
    """What the families' data say of one model."""
    family = family_of(config)
    if method == "voco":
        inside = family.late_layers(config) or family.told_kinds or family.keeps_state
        return family.causal and family.outer is None and not inside
    tower = family.tower(config)
    if issubclass(CLASSES[method], DoorMethod):
        reads = bool(CLASSES[method]().tower_blocks)
        return not reads or tower is not None
    if tower is None or not tower.mergeable:
        return False
    return method != "downsample" or family.resizable


@pytest.mark.parametrize("method", BEFORE)
@every_kind
def test_a_method_serves_a_family_or_names_those_it_serves(kind: Kind, method: str) -> None:
    model = kind.build()
    if serves(method, model.config):
        assert atp_patch.patch_model(model, method=method) is model
        return
    before = snapshot(model)
    with pytest.raises(atp_patch.UnsupportedModelError) as caught:
        atp_patch.patch_model(model, method=method)
    message = str(caught.value)
    named = {family.name for family in FAMILIES if f" {family.name}" in message}
    assert {"llava", "qwen2_vl"} <= named
    at_door = issubclass(CLASSES[method], DoorMethod)
    assert ("read no tower work here" if at_door else "inside the decoder works here") in message
    assert snapshot(model) == before


SELECTING: tuple[dict[str, Any], ...] = (
    {"method": "divprune"},
    {"method": "cdpruner"},
    {"method": "prunesid"},
    {"method": "scope", "alpha": 0.0},
)


@every_kind
def test_selections_by_features_take_turns_on_every_family(kind: Kind) -> None:
    """A batch keeps what its samples keep alone."""
    chosen = SELECTING[sum(map(ord, kind.name)) % len(SELECTING)]
    model = atp_patch.patch_model(kind.build(), keep=0.4, **chosen)
    inputs = make(kind, MIXED).inputs
    forward(model, inputs)
    (kept,) = kept_of(model).values()
    trace = atp_patch.last_trace(model)
    assert trace.layers[0].kept_counts == tuple(round(0.4 * n) for n in trace.layout.totals)
    for b, one in enumerate(MIXED):
        if trace.layout.totals[b]:
            forward(model, make(kind, (one,)).inputs)
            assert torch.equal(kept[b, real_mask(inputs)[b]], kept_of(model)[0][0])


@pytest.mark.parametrize(("method", "why"), [("voco", "only its caller"), ("prumerge", "llama")])
def test_decoders_that_no_family_knows_are_refused(method: str, why: str) -> None:
    config = tiny.tiny_model("llava-llama").config.get_text_config()
    with pytest.raises(atp_patch.UnsupportedModelError, match=f"{why}.* llava"):
        atp_patch.patch_model(LlamaForCausalLM(config), method=method, family="generic")


def patched(kind: Kind, method: str) -> Any:
    torch.manual_seed(0)
    inside = {"layers": kind.layers, "keep": 0.5, "recycle_share": 0.0}
    options = inside if method == "sparsevlm" else {"num_tokens": 2}
    return atp_patch.patch_model(kind.build(), method=method, **options)


@every_kind
def test_sparsevlm_is_masked(kind: Kind) -> None:
    check_masked(kind, patched(kind, "sparsevlm"), kind.build(), make(kind, MIXED))


@one_of_each_table
def test_batches_caches_and_unpatching_with_voco(kind: Kind) -> None:
    if not serves("voco", kind.build().config):
        return  # refused, see above
    model, inputs = kind.build(), make(kind, MIXED).inputs
    expected, before = forward(model, inputs).logits, snapshot(model)
    atp_patch.patch_model(model, method="voco")
    text = model.config.get_text_config()
    named = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if any(window is not None and window < inputs["input_ids"].shape[1] for window in named):
        with pytest.raises(atp_patch.CacheError, match="do not fit the sliding window"):
            forward(model, inputs)
    else:
        forward(model, inputs)
        check_batches_and_caches(kind, "voco")
    atp_patch.unpatch_model(model)
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, expected)


@one_of_each_table
def test_batches_and_caches_with_sparsevlm(kind: Kind) -> None:
    """What it recycles stays in its sample. It prunes and unpatches as other layer methods do."""
    check_batches_and_caches(kind, "sparsevlm")


def check_batches_and_caches(kind: Kind, method: str) -> None:
    skip_where_samples_share_places(kind.build())
    model = patched(kind, method)
    inputs = make(kind, MIXED).inputs
    together, kept = forward(model, inputs).logits, kept_of(model)
    survivors, real = kept[max(kept)], real_mask(inputs)
    for b, one in enumerate(MIXED):
        alone = forward(model, make(kind, (one,)).inputs).logits
        assert_close(together[b, real[b]][None], alone, survivors[b, real[b]][None])
    skip_where_the_cache_matters(kind.build(), inputs)
    assert torch.equal(generate(model, inputs, 2), generate(model, inputs, 2, use_cache=False))
