"""Models of other packages: pruned by their structure, as exactly as transformers' own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import atp_patch
from tests.families.kinds import MIXED, SINGLE, TWO
from tests.families.outside import CASES, Case, Given
from tests.helpers import tiny
from tests.helpers.compare import assert_close, assert_same_choice, snapshot
from tests.helpers.oracle import masked
from tests.helpers.run import kept_of

LAYERS = (2, 4, 6)
FAST: dict[str, Any] = {"layers": LAYERS, "method": "fastv", "keep": 0.5}
SEEN = MIXED[:2] + MIXED[3:]  # every sample has an image

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
paddings = pytest.mark.parametrize("padding", ["left", "right"])


def patched(case: Case, **options: Any) -> Any:
    return atp_patch.patch_model(case.build(), **{**FAST, **options})


def forward(model: Any, given: Given, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(**given.forward, **kwargs)


def generate(model: Any, given: Given, tokens: int = 5, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **given.generate, **{"max_new_tokens": tokens, "do_sample": False, **kwargs}
    )


def embedded(case: Case, given: Given) -> Tensor:
    """(B, L, D) what the plain model gives to its language model."""
    model, seen = case.build(), []
    model.padding_side = "left" if not given.real[:, 0].all() else "right"
    case.language_model(model).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    forward(model, given)
    return seen[0]


def reference(case: Case, given: Given, kept: Any, answer: Tensor | None = None) -> Tensor:
    """Logits of the plain language model that cannot see what went, at full length, uncached."""
    embeds, real, plain = embedded(case, given), given.real, case.language_model(case.build())
    if answer is not None:
        answer = answer.clone()  # made in inference mode
        embeds = torch.cat([embeds, plain.get_input_embeddings()(answer).detach()], 1)
        real = torch.cat([real, torch.ones_like(answer).bool()], 1)
    with torch.no_grad(), masked(plain, real, kept) as model:
        return model(inputs_embeds=embeds, use_cache=False).logits


@every_case
def test_keeping_all_is_plain_bit_for_bit(case: Case) -> None:
    plain, model = case.build(), patched(case, keep=1.0)
    given = case.batch(plain, MIXED)
    case.batch(model, MIXED)
    assert torch.equal(forward(model, given).logits, forward(plain, given).logits)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    expected, actual = (generate(one, given, **wanted) for one in (plain, model))
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))


@paddings
@every_case
def test_gathered_is_masked(case: Case, padding: str) -> None:
    for samples in (MIXED, TWO):
        model = patched(case)
        given = case.batch(model, samples, padding)
        logits, kept = forward(model, given).logits, kept_of(model)
        survivors = kept[max(kept)]
        assert survivors[given.real & ~given.placed].all(), "more than grids was pruned"
        assert not survivors[~given.real].any(), "padding was kept"
        assert (given.placed & ~survivors).any(), "nothing was pruned: this shows nothing"
        assert_close(logits, reference(case, given, kept), survivors)


@every_case
def test_cached_answers_are_those_of_the_masked_model_without_a_cache(case: Case) -> None:
    model = patched(case)
    given = case.batch(model, MIXED)
    forward(model, given)
    kept = kept_of(model)
    out = generate(model, given, return_dict_in_generate=True, output_logits=True)
    expected = reference(case, given, kept, out.sequences)[:, given.real.shape[1] - 1 : -1]
    assert_close(torch.stack(out.logits, 1), expected)
    best = expected[..., tiny.FIRST_WORD :].argmax(-1) + tiny.FIRST_WORD
    assert torch.equal(out.sequences, best)
    plain = generate(case.build(), given, return_dict_in_generate=True, output_logits=True)
    assert not torch.equal(torch.stack(plain.logits), torch.stack(out.logits))


@paddings
@every_case
def test_a_batch_is_its_samples_alone(case: Case, padding: str) -> None:
    model = patched(case)
    given = case.batch(model, SEEN, padding)
    together, kept = forward(model, given).logits, kept_of(model)
    answers = generate(model, given) if padding == "left" else None
    for b, one in enumerate(SEEN):
        real = given.real[b]
        single = case.batch(model, [one])
        alone, chosen = forward(model, single).logits, kept_of(model)
        for layer, mask in kept.items():
            assert_same_choice(mask[b, real][None], chosen[layer])
        assert_close(together[b, real][None], alone, chosen[max(chosen)])
        if answers is not None:
            assert torch.equal(answers[b], generate(model, single)[0])


@every_case
def test_beams_of_a_batch_are_its_samples_beams(case: Case) -> None:
    model = patched(case)
    together = generate(model, case.batch(model, SEEN[:2]), num_beams=2)
    for answer, one in zip(together, SEEN[:2], strict=True):
        alone = generate(model, case.batch(model, [one]), num_beams=2)
        assert torch.equal(answer, alone[0])


@every_case
def test_grids_are_where_the_model_puts_them(case: Case) -> None:
    model = patched(case, method="uniform")
    given = case.batch(model, MIXED)
    forward(model, given)
    layout = atp_patch.last_trace(model).layout
    table = torch.stack([layout.position, layout.image, layout.frame, layout.row, layout.column])
    for b, row in enumerate(given.places):
        expected = [(at, *place) for at, place in enumerate(row) if place is not None]
        assert table[:, b, layout.valid[b]].T.tolist() == [list(place) for place in expected]


@every_case
def test_unpatching_leaves_nothing(case: Case) -> None:
    model = case.build()
    given = case.batch(model, SINGLE)
    expected, before = forward(model, given).logits, _state(case, model)
    atp_patch.patch_model(model, **FAST)
    forward(model, given)
    generate(model, given, 2)
    with atp_patch.disabled(model):
        assert torch.equal(forward(model, given).logits, expected)
    atp_patch.unpatch_model(model)
    assert _state(case, model) == before
    assert torch.equal(forward(model, given).logits, expected)


def _state(case: Case, model: Any) -> Any:
    language_model = case.language_model(model)
    model.generation_config = language_model.generation_config  # the original has none of its own
    return snapshot(model), snapshot(language_model)


@every_case
def test_eager_attention_chooses_and_computes_alike(case: Case) -> None:
    model = patched(case)
    given = case.batch(model, MIXED)
    expected, kept = forward(model, given).logits, kept_of(model)
    case.language_model(model).set_attn_implementation("eager")
    actual = forward(model, given).logits
    for layer, mask in kept_of(model).items():
        assert_same_choice(mask, kept[layer])
    assert_close(actual, expected, kept[max(kept)])


@pytest.mark.parametrize("method", ["atp", "fixed", "random", "uniform"])
@every_case
def test_gathered_is_masked_with_every_method(case: Case, method: str) -> None:
    model = patched(case, method=method)
    given = case.batch(model, MIXED)
    logits, kept = forward(model, given).logits, kept_of(model)
    assert_close(logits, reference(case, given, kept), kept[max(kept)])


@every_case
def test_adapters_come_back(case: Case, tmp_path: Path) -> None:
    model = patched(case, method="atp")
    given = case.batch(model, SINGLE)
    expected = forward(model, given).logits
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(case.build(), weights=tmp_path)
    case.batch(again, SINGLE)
    assert torch.equal(forward(again, given).logits, expected)


@every_case
def test_copies_are_models_of_their_own(case: Case) -> None:
    model = patched(case)
    given = case.batch(model, SINGLE)
    twin = copy.deepcopy(model)
    expected = forward(model, given).logits
    atp_patch.unpatch_model(model)
    assert torch.equal(forward(twin, given).logits, expected)
    assert not torch.equal(forward(model, given).logits, expected)


@every_case
def test_an_exception_leaves_no_trace_in_the_next_pass(case: Case) -> None:
    model = patched(case)
    given, other = case.batch(model, SINGLE), case.batch(model, TWO)
    expected = forward(model, given).logits
    language_model = case.language_model(model)
    handle = language_model.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="on the way"):
        forward(model, other)
    handle.remove()
    assert torch.equal(forward(model, given).logits, expected)


def _fail(*_: Any) -> None:
    raise RuntimeError("on the way")


def answers_only(case: Case, given: Given) -> Tensor:
    """The last words of every sample are the answer."""
    labels = given.forward["input_ids"].clone()
    real = given.forward["attention_mask"].bool()
    for row, mask in zip(labels, real, strict=True):
        row[mask.nonzero().flatten()[:-3]] = -100
    return labels.masked_fill(~real, -100)


@every_case
def test_the_loss_is_that_of_the_masked_model(case: Case) -> None:
    model = patched(case)
    given = case.batch(model, SEEN)
    labels = answers_only(case, given)
    before = labels.clone()
    loss = forward(model, given, labels=labels).loss
    assert torch.equal(labels, before)
    logits = reference(case, given, kept_of(model))
    targets = torch.full(given.real.shape, -100)
    for b, row in enumerate(labels):
        places = given.real[b].nonzero().flatten()[-3:]
        targets[b, places] = row[row != -100]
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    assert_close(loss, expected)


@every_case
def test_thresholds_learn_in_the_model_s_own_loss(case: Case) -> None:
    model = patched(case, method="atp", thresholds="learned", keep=None, target_tokens=20)
    given = case.batch(model, SEEN)
    model.train()
    packing = {"packing": False} if case.decoder == "llm" else {}
    out = model(**given.forward, labels=answers_only(case, given), **packing)
    assert atp_patch.last_trace(model).losses
    out.loss.backward()
    gradients = [weight.grad for weight in model.atp_patch_heads.parameters()]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in gradients)
