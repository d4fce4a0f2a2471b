"""SparseVLM in the decoder: the plain algorithm's tokens, sums and logits, cached or not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.methods import SparseVLM
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import batch, visual_mask
from tests.helpers.oracle import masked_logits
from tests.helpers.pairing import pairs
from tests.helpers.run import LAYERS, Session, forward, generate, kept_of, patched, words
from tests.helpers.sparse import sparse_choice, with_edits
from tests.seam.test_choices import budgets

families = pytest.mark.parametrize("kind", tiny.FAMILIES)
HALF = (0.5, 0.5, 1 / 3)
# More clusters than the paper's share would make of so few tokens.
MANY = {"recycle_share": 0.6, "cluster_share": 0.4}


def sparse(kind: str, attention: str = "sdpa", **options: Any) -> Any:
    return patched(kind, attention, method="sparsevlm", layers=LAYERS, **options)


@pairs(kind=tiny.ALL_KINDS, attention=["sdpa", "eager"], padding=["left", "right"])
def test_a_budget_is_the_plain_algorithm(kind: str, attention: str, padding: str) -> None:
    check_plain_algorithm(kind, attention, padding, "sum")


@families
def test_clusters_may_be_means(kind: str) -> None:
    check_plain_algorithm(kind, "sdpa", "left", "mean")


def check_plain_algorithm(kind: str, attention: str, padding: str, merge: str) -> None:
    plain = tiny.tiny_model(kind, "eager")
    model = sparse(kind, attention, keep=HALF, merge=merge, **MANY)
    inputs = batch(plain, prompts.MIXED, padding)
    session = Session(model, inputs)
    counts = budgets(visual_mask(inputs).sum(1).tolist())
    mean = merge == "mean"
    expected = sparse_choice(plain, inputs, LAYERS, counts, tau=0.6, theta=0.4, mean=mean)
    assert expected.clusters >= 6
    kept = kept_of(model)
    for layer in LAYERS:
        assert torch.equal(kept[layer], expected.kept[layer])
    reference = with_edits(plain, expected, mean=mean)
    assert_close(session.logits, session.reference(reference, kept), kept[6])
    answer = session.feed(words(4, 2))
    assert_close(answer, session.reference(reference, kept)[:, -2:])


@families
def test_without_a_budget_the_rank_decides(kind: str) -> None:
    plain = tiny.tiny_model(kind, "eager")
    inputs = batch(plain, prompts.MIXED)
    sizes = set()
    for scale in (0.3, 0.8):
        model = sparse(kind, scale=scale, **MANY)
        logits = forward(model, inputs).logits
        expected = sparse_choice(plain, inputs, LAYERS, None, scale=scale, tau=0.6, theta=0.4)
        kept = kept_of(model)
        for layer in LAYERS:
            assert torch.equal(kept[layer], expected.kept[layer])
        assert expected.clusters
        reference = with_edits(plain, expected)
        assert_close(logits, masked_logits(reference, inputs, kept), kept[6])
        sizes |= {tuple((kept[6] & visual_mask(inputs)).sum(1).tolist())}
    assert len(sizes) == 2


def test_the_oracle_can_fail() -> None:
    """Sums of other tokens, or none, are other logits."""
    plain = tiny.tiny_model("qwen2_vl", "eager")
    inputs = batch(plain, prompts.SINGLE)
    pruned = sparse_choice(plain, inputs, LAYERS, [[12], [6], [4]], tau=0.6, theta=0.4)
    right = masked_logits(with_edits(plain, pruned), inputs, pruned.kept)
    without = masked_logits(plain, inputs, pruned.kept)
    last = pruned.kept[6]
    assert (right - without)[last].abs().max() > 1e-3
    b, centre, members = next(e for e in pruned.edits[2] if len(e[2]) > 1)
    pruned.edits[2][pruned.edits[2].index((b, centre, members))] = (b, centre, members[:-1])
    other = masked_logits(with_edits(plain, pruned), inputs, pruned.kept)
    assert (right - other)[last].abs().max() > 1e-4


@families
def test_no_recycling_only_prunes(kind: str) -> None:
    plain, model = tiny.tiny_model(kind), sparse(kind, keep=0.5, recycle_share=0.0)
    inputs = batch(plain, prompts.RAGGED)
    logits = forward(model, inputs).logits
    assert_close(logits, masked_logits(plain, inputs, kept_of(model)), kept_of(model)[6])


@pytest.mark.parametrize("options", [{}, {"keep": 0.5}], ids=["rank", "budget"])
@families
def test_generation(kind: str, options: dict[str, Any]) -> None:
    """With a cache as without, in a batch as alone, with beams, with guessed tokens."""
    model = sparse(kind, **options, **MANY)
    inputs = batch(model, prompts.MIXED)
    together = generate(model, inputs)
    assert torch.equal(together, generate(model, inputs, use_cache=False))
    beams = {"num_beams": 2, "num_return_sequences": 2}
    assert torch.equal(
        generate(model, inputs, **beams), generate(model, inputs, use_cache=False, **beams)
    )
    for b, one in enumerate(prompts.MIXED):
        alone = generate(model, batch(model, (one,)))
        assert torch.equal(alone[0, -4:], together[b, -4:])
    single = batch(model, prompts.SINGLE)
    assert torch.equal(generate(model, single), generate(model, single, prompt_lookup_num_tokens=3))


@families
def test_a_minimum_holds_without_a_budget(kind: str) -> None:
    model = sparse(kind, scale=1.0, min_tokens_per_image=5, min_tokens=7)
    inputs = batch(model, prompts.TWO_IMAGES)
    forward(model, inputs)
    trace = atp_patch.last_trace(model)
    for grid in trace.grids[0]:
        assert int(trace.layers[6].kept[0, grid.start : grid.start + grid.length].sum()) >= 5
    single = batch(model, prompts.SINGLE)
    forward(model, single)
    assert int((kept_of(model)[6] & visual_mask(single)).sum()) >= 7


@pytest.mark.parametrize(
    "method", ["fastv", "sparsevlm", ["prumerge+", "sparsevlm"]], ids=["fastv", "sparsevlm", "pair"]
)
@families
def test_training_reaches_what_was_recycled_also_with_checkpointing(kind: str, method: Any) -> None:
    gradients = {}
    for checkpointing in (False, True):
        options = MANY if "sparsevlm" in method else {}
        model = patched(kind, method=method, layers=LAYERS, keep=0.5, **options).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = batch(model, prompts.MIXED)
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients[checkpointing] = [p.grad for p in model.parameters() if p.grad is not None]
        assert atp_patch.last_trace(model).average_tokens < 30
    assert gradients[True]
    for one, other in itertools.zip_longest(*gradients.values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0},
        {"rank_tolerance": 1},
        {"recycle_share": 1},
        {"neighbours": 0},
        {"merge": "max"},
    ],
)
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(atp_patch.ConfigError, match=next(iter(options))):
        sparse("llava-llama", **options)


def test_raters_are_the_same_at_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are chosen from the whole image, whatever earlier layers left of it."""
    seen = []
    choose = SparseVLM._raters

    def noted(self: SparseVLM, view: atp_patch.View) -> torch.Tensor:
        seen.append(choose(self, view))
        return seen[-1]

    monkeypatch.setattr(SparseVLM, "_raters", noted)
    model = sparse("llava-llama", keep=0.3)
    forward(model, batch(model, prompts.MIXED))
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert 0 < int(seen[0].sum()) < seen[0].numel()
