"""Rows of several samples are refused by name; ordinary prompts never are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

import atp_patch
from atp_patch.seam.host.packing import refuse_packed
from tests.families.kinds import ALIKE, MIXED, SINGLE, Kind, make
from tests.families.tables import EVERY, ROTARY_PLACES, every_kind, with_rotary_places
from tests.families.test_every_family import patched
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Inputs
from tests.helpers.run import BEFORE, INSIDE, forward, generate, kept_of
from tests.helpers.voco import voco_model

MESSAGE = "a row holds several samples"
TEXT_ALONE = (MIXED[2], MIXED[2])
# Their position ids say rows and columns too.
ROWS_AND_COLUMNS = ("hunyuan_vl", "minicpmv4_7", "qwen2_5_omni", "qwen3_omni_moe")


def collated(inputs: list[Inputs], **options: Any) -> Inputs:
    """What transformers' collator without padding makes of the ids of each sample."""
    features = [{"input_ids": one["input_ids"][0]} for one in inputs]
    made = DataCollatorWithFlattening(**options)(features, return_tensors="pt")
    del made["labels"]
    return dict(made)


def packed(kind: Kind, samples: Any, **options: Any) -> Inputs:
    """The samples in one row, with their pictures."""
    apart = [make(kind, [one]).inputs for one in samples]
    together = make(kind, samples).inputs
    shape = together["input_ids"].shape
    row = collated(apart, **options)
    for name, value in together.items():
        if name in ("input_ids", "attention_mask"):
            continue
        rows = hasattr(value, "shape") and value.shape[:2] == shape
        row[name] = torch.cat([one[name] for one in apart], 1) if rows else value
    return row


def rotary_places(model: Any, kind: Kind, samples: Any) -> Tensor:
    """(3, 1, L): multimodal position ids that begin again with every sample."""
    found = []
    for one in samples:
        inputs = make(kind, [one]).inputs
        del inputs["pixel_values"]
        found.append(model.model.get_rope_index(**inputs)[0])
    return torch.cat(found, 2)


@every_kind
def test_samples_in_one_row_are_refused(kind: Kind) -> None:
    model = patched(kind)
    with pytest.raises(atp_patch.InputError, match=f"{MESSAGE}.*position ids begin again"):
        forward(model, packed(kind, ALIKE))
    forward(model, make(kind, ALIKE).inputs)  # the mend
    assert len(atp_patch.last_trace(model).layout.grids) == 2


@with_rotary_places
def test_multimodal_positions_that_begin_again_are_refused(kind: Kind) -> None:
    model, row = patched(kind), packed(kind, ALIKE)
    places = rotary_places(model, kind, ALIKE)
    for positions in (places, torch.cat([row["position_ids"][None], places])):
        with pytest.raises(atp_patch.InputError, match="begin again"):
            forward(model, {**row, "position_ids": positions})


@pytest.mark.parametrize("method", [*INSIDE, *BEFORE])
def test_every_method_refuses_them(method: str) -> None:
    kind = next(kind for kind in EVERY if kind.name == "llava")
    options: dict[str, Any] = {"layers": [2], "keep": 0.5} if method in INSIDE else {}
    options |= {"keep": 0.5} if method == "downsample" else {}
    model = atp_patch.patch_model(kind.build(), method=method, **options)
    with pytest.raises(atp_patch.InputError, match=MESSAGE):
        forward(model, packed(kind, ALIKE))


@pytest.mark.parametrize("how", ["return_flash_attn_kwargs", "return_seq_idx"])
def test_arguments_that_tell_sequences_apart_are_refused(how: str) -> None:
    kind = next(kind for kind in EVERY if kind.name == "llava")
    for model in (patched(kind), voco_model("llava-llama")):
        row = packed(kind, ALIKE, return_position_ids=False, **{how: True})
        with pytest.raises(atp_patch.InputError, match=MESSAGE):
            forward(model, row)


def test_a_row_of_one_sample_is_an_ordinary_prompt() -> None:
    """Its sequence's length is not handed on to layers that run on fewer tokens."""
    kind = next(kind for kind in EVERY if kind.name == "llava")
    model, seen = patched(kind), []
    forward(model, make(kind, SINGLE).inputs)
    kept = kept_of(model)
    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
        )
    row = packed(kind, SINGLE, return_flash_attn_kwargs=True, return_seq_idx=True)
    forward(model, row)
    assert all(torch.equal(kept[layer], found) for layer, found in kept_of(model).items())
    assert len(seen) == tiny.LAYERS
    assert not any("cu_seq_lens_q" in names or "seq_idx" in names for names in seen)


@every_kind
def test_text_in_one_row_is_the_hosts_affair(kind: Kind) -> None:
    row = packed(kind, TEXT_ALONE)
    assert torch.equal(forward(patched(kind), row).logits, forward(kind.build(), row).logits)


# -- Ordinary prompts -----------------------------------------------------------------------------


@every_kind
def test_padding_may_have_any_position(kind: Kind) -> None:
    """Callers write 0 or 1 there; half of the kinds are given the one, half the other."""
    model = patched(kind)
    filler = len(kind.name) % 2
    inputs = make(kind, MIXED).inputs
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
    forward(model, {**inputs, "position_ids": positions})
    expected = generate(patched(kind), inputs, 2)
    if kind in ROTARY_PLACES or kind.name in ROWS_AND_COLUMNS:
        return  # other positions, other answers
    got = generate(model, {**inputs, "position_ids": positions}, 2)
    assert torch.equal(got, expected)


def test_padding_in_front_without_a_mask_is_no_sample() -> None:
    real = torch.ones(1, 7, dtype=torch.bool)
    for ids in ([0, 0, 0, 0, 1, 2, 3], [1, 1, 1, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11]):
        refuse_packed({}, torch.tensor([ids]), real)
    for ids in ([0, 1, 2, 0, 1, 2, 3], [1, 2, 1, 2, 3, 4, 5], [4, 5, 0, 1, 0, 1, 2]):
        with pytest.raises(atp_patch.InputError, match=r"at position [23]\)"):
            refuse_packed({}, torch.tensor([ids]), real)


def test_hidden_tokens_begin_nothing() -> None:
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 0], [1, 1, 0, 1, 2, 3, 4]])
    real = torch.tensor([[True] * 5 + [False] * 2, [False] * 2 + [True] * 5])
    refuse_packed({}, ids, real)
    with pytest.raises(atp_patch.InputError, match="in row 0 the position ids begin again"):
        refuse_packed({}, ids, torch.ones_like(real))


def test_a_batch_equals_what_was_packed() -> None:
    """Padded rows are what packing promises: each sample as if it were alone."""
    kind = next(kind for kind in EVERY if kind.name == "llava")
    model = patched(kind)
    together = forward(model, make(kind, ALIKE, "right").inputs).logits
    kept = kept_of(model)[max(kind.layers)]
    for b, one in enumerate(ALIKE):
        alone = forward(model, make(kind, [one]).inputs).logits
        length = alone.shape[1]
        assert_close(together[b : b + 1, :length], alone, kept[b : b + 1, :length])
