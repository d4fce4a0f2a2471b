"""Models of other packages: what cannot be known about their inputs is refused with the mend."""

from __future__ import annotations

import pytest
import torch

import atp_patch
from tests.families.kinds import MIXED, SINGLE, Picture, Words, sample
from tests.families.outside import CASES, Case
from tests.families.test_outside import SEEN, answers_only, forward, generate, patched
from tests.helpers import tiny

INTERNVL = CASES[0]
VILA = [case for case in CASES if case.decoder == "llm"]


@pytest.mark.parametrize("case", VILA, ids=lambda case: case.name)
def test_what_embed_returns_is_unchanged(case: Case) -> None:
    plain, model = case.build(), patched(case)
    given = case.batch(plain, MIXED)
    case.batch(model, MIXED)
    ids, media = given.forward["input_ids"], given.forward["media"]
    for labels in (None, answers_only(case, given)):
        arguments = (ids, media, {}, labels, given.forward["attention_mask"])
        for actual, expected in zip(
            model._embed(*arguments), plain._embed(*arguments), strict=True
        ):
            assert torch.equal(actual, expected)


def test_packed_samples_are_refused_with_the_mend() -> None:
    case = VILA[0]
    model = patched(case).train()
    given = case.batch(model, SEEN)
    with pytest.raises(atp_patch.InputError, match="packing=False"):
        model(**given.forward, labels=answers_only(case, given))


def test_embeddings_of_unknown_make_are_refused_with_the_mend() -> None:
    case = VILA[0]
    model = patched(case)
    given = case.batch(model, SINGLE)
    forward(model, given)  # what is known of these embeddings says nothing about the next
    with pytest.raises(atp_patch.InputError, match="visual_mask"):
        model.llm(inputs_embeds=torch.randn(*given.real.shape, tiny.HIDDEN))


def test_pooled_videos_are_refused_with_the_mend() -> None:
    case = VILA[0]
    model = patched(case)
    given = case.batch(model, [sample(Words(3), Picture(0), Words(4), seed=1)])
    model._features = lambda image: torch.randn(30, tiny.HIDDEN)
    with pytest.raises(atp_patch.InputError, match=r"30 visual embeddings.*disabled"):
        forward(model, given)


def test_an_unset_placeholder_is_named() -> None:
    case = INTERNVL
    model = patched(case)
    model.img_context_token_id = None
    with pytest.raises(atp_patch.InputError, match="img_context_token_id is not set"):
        forward(model, case.batch(model, SINGLE))


def test_a_prefill_in_chunks_is_refused() -> None:
    case = INTERNVL
    model = patched(case)
    with pytest.raises(atp_patch.UnsupportedModelError, match="prefill_chunk_size"):
        generate(model, case.batch(model, SINGLE), prefill_chunk_size=8)
