"""Methods that look at the attention of several earlier layers, or of none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import atp_patch
from atp_patch.methods import attention_paid, keep_best
from atp_patch.seam import Recorder
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close, assert_same_choice
from tests.helpers.inputs import batch, real_mask, visual_mask
from tests.helpers.oracle import attention_maps
from tests.helpers.run import forward, generate, kept_of

LAYERS = (2, 4, 6)
WANTED = {2: (0, 1), 4: (1, 2), 6: (1, 3, 5)}
kinds = pytest.mark.parametrize("kind", tiny.FAMILIES)


@dataclass(frozen=True)
class Looks(atp_patch.LayerMethod):
    """Ranks by what the last token paid in several layers, some of them before earlier prunings."""

    name = "looks-back"
    summary = "the last token's attention, summed over several layers"

    def attention_layers(self, layer: int) -> tuple[int, ...]:
        return WANTED[layer]

    def build(self, spec: Any) -> nn.Module | None:
        return None

    def decide(self, view: atp_patch.View, module: Any) -> atp_patch.Decision:
        assert tuple(view.attention) == WANTED[view.layer]
        scores = {
            str(number): attention_paid(
                view, of.last[:, None], torch.ones_like(of.last[:, None], dtype=torch.bool), of=of
            )
            for number, of in view.attention.items()
        }
        total = torch.stack(list(scores.values())).sum(0)
        keep = keep_best(view, total)
        return atp_patch.Decision(keep, scores=scores)


def patched(kind: str, method: Any = None, attention: str = "sdpa", **options: Any) -> Any:
    options = {"keep": 0.5, **options}
    return atp_patch.patch_model(
        tiny.tiny_model(kind, attention), LAYERS, method or Looks(), **options
    )


def check_scores(trace: atp_patch.PruningTrace, plain: Any, inputs: Any) -> None:
    """Every score is what the full map of its layer says, masked as that layer was."""
    real = real_mask(inputs)
    maps = attention_maps(plain, inputs, {n: trace.layers[n].kept for n in LAYERS})
    for layer in LAYERS:
        for name, found in trace.layers[layer].scores.items():
            paid = maps.attentions[int(name)].mean(1)
            scored = ~found.isnan()
            assert torch.equal(scored.any(1), visual_mask(inputs).any(1))
            for b in scored.any(1).nonzero().flatten().tolist():
                last = int(real[b].nonzero()[-1])
                assert_close(found[b, scored[b]], paid[b, last, scored[b]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@kinds
def test_scores_are_those_of_the_layers_asked_for(kind: str, padding: str, attention: str) -> None:
    model = patched(kind, attention=attention)
    inputs = batch(model, prompts.MIXED, padding)
    forward(model, inputs)
    trace = atp_patch.last_trace(model)
    assert [set(trace.layers[n].scores) for n in LAYERS] == [
        {str(number) for number in WANTED[n]} for n in LAYERS
    ]
    check_scores(trace, tiny.tiny_model(kind), inputs)


@kinds
def test_a_batch_is_its_samples_and_the_cache_changes_no_answer(kind: str) -> None:
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    together, kept = forward(model, inputs).logits, kept_of(model)
    real = real_mask(inputs)
    for b, one in enumerate(prompts.MIXED):
        alone = forward(model, batch(model, (one,))).logits
        if visual_mask(inputs)[b].any():
            for layer, mask in kept_of(model).items():
                assert_same_choice(mask, kept[layer][b, real[b]][None])
        assert_close(together[b, real[b]][None], alone, kept[6][b, real[b]][None])
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


def test_an_image_in_a_later_turn() -> None:
    """Keys of an earlier turn stand before those of the pass, in every layer asked for."""
    model = patched("llava-llama")
    text = batch(model, (prompts.prompt(prompts.Words(6), seed=3),))["input_ids"]
    image = batch(model, prompts.SINGLE)
    ids = torch.cat([text, image["input_ids"]], 1)
    whole = {**image, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = forward(model, whole).logits
    at_once, earlier = atp_patch.last_trace(model), text.shape[1]
    cache = forward(model, {"input_ids": text}, use_cache=True).past_key_values
    later = {
        **image,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(earlier, ids.shape[1])[None],
    }
    logits = forward(model, later, past_key_values=cache, use_cache=True).logits
    trace = atp_patch.last_trace(model)
    for layer in LAYERS:
        kept = at_once.layers[layer].kept[:, earlier:]
        assert torch.equal(trace.layers[layer].kept, kept)
        for name, found in trace.layers[layer].scores.items():
            scores = at_once.layers[layer].scores[name][:, earlier:]
            assert_close(found, scores, ~found.isnan())
    assert_close(logits, expected[:, earlier:], kept)


class Biases(atp_patch.LearnedThresholds):
    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(layers)
        self.bias = nn.Parameter(torch.full((7,), -3.0))

    def shift(self, layer: int, by: float) -> None:
        raise NotImplementedError


class Learns(Looks):
    """The same scores against a learned threshold."""

    name = "learns-looking-back"

    def build(self, spec: Any) -> nn.Module:
        return Biases(spec.layers)

    @property
    def needs_budget(self) -> bool:
        return False

    @property
    def takes_budget(self) -> bool:
        return False

    def decide(self, view: atp_patch.View, module: Any) -> atp_patch.Decision:
        scores = {
            str(number): attention_paid(
                view, of.last[:, None], torch.ones_like(of.last[:, None], dtype=torch.bool), of=of
            )
            for number, of in view.attention.items()
        }
        total = torch.stack(list(scores.values())).mean(0)
        theta = torch.sigmoid(module.bias[view.layer]) * view.layer / 8
        best = keep_best(view, total, view.slot_valid.sum(1).clamp(max=3))
        keep = view.slot_valid & ((total >= theta) | best)
        relaxed = torch.sigmoid((total - theta) * 100)
        soft = (keep.float() - relaxed).detach() + relaxed
        soft = soft.masked_fill(~view.slot_valid, 0.0)
        return atp_patch.Decision(keep, scores=scores, soft=soft)


@kinds
@pytest.mark.parametrize("padding", ["left", "right"])
def test_learning_sees_what_inference_sees(kind: str, padding: str) -> None:
    """Full-length layers hide, layer by layer, what was pruned before each."""
    model = patched(kind, Learns(), keep=None)
    inputs = batch(model, prompts.MIXED, padding)
    forward(model, inputs)
    trace = atp_patch.last_trace(model)
    counts = [sum(trace.layers[n].kept_counts) for n in LAYERS]
    assert sum(trace.layout.totals) > counts[0] > counts[1] > counts[2]
    check_scores(trace, tiny.tiny_model(kind), inputs)
    model.train()
    model(**inputs)
    learned = atp_patch.last_trace(model)
    for layer in LAYERS:
        assert torch.equal(learned.layers[layer].kept, trace.layers[layer].kept)
        for name, found in trace.layers[layer].scores.items():
            assert_close(learned.layers[layer].scores[name], found, ~found.isnan())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_checkpointing_replays_the_same(checkpointed: bool) -> None:
    grads: list[Tensor] = []
    for checkpoints in (False, checkpointed):
        model = patched("llava-llama", Learns(), keep=None)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        inputs = batch(model, prompts.MIXED, "right")
        labels = inputs["input_ids"].masked_fill(~real_mask(inputs) | visual_mask(inputs), -100)
        model(**inputs, labels=labels).loss.backward()
        grads.append(model.atp_patch_heads.bias.grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_where_no_attention_is_asked_for_none_is_recorded(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Recorder, "expect", lambda *given, **more: asked.append(given))
    model = patched("llava-llama", method)
    forward(model, batch(model, prompts.MIXED))
    assert asked == []
    assert atp_patch.last_trace(model).average_tokens < 36


def test_attention_that_was_not_asked_for_is_named() -> None:
    class Blind(Looks):
        name = "blind"

        def attention_layers(self, layer: int) -> tuple[int, ...]:
            return ()

        def decide(self, view: atp_patch.View, module: Any) -> atp_patch.Decision:
            return atp_patch.Decision(view.slot_valid, scores={"q": view.query.sum((1, 3))})

    model = patched("llava-llama", Blind())
    with pytest.raises(atp_patch.ConfigError, match=r"layer 1 was not recorded.*layers\(2\)"):
        forward(model, batch(model, prompts.SINGLE))


@pytest.mark.parametrize("wanted", [(2,), (-1,), ("1",)])
def test_layers_that_do_not_run_before_are_refused(wanted: Any) -> None:
    class Ahead(Looks):
        name = "ahead"

        def attention_layers(self, layer: int) -> Any:
            return wanted

    with pytest.raises(atp_patch.ConfigError, match=r"ahead: attention_layers\(2\).* 0 to 1"):
        patched("llava-llama", Ahead())


@dataclass(frozen=True)
class ByHead(atp_patch.LayerMethod):
    """Shows what each head of the layer before pays, and what they pay on average."""

    name = "by-head"
    summary = "the last token's attention, head by head"

    def decide(self, view: atp_patch.View, module: Any) -> atp_patch.Decision:
        last = view.last[:, None]
        rows = torch.ones_like(last, dtype=torch.bool)
        heads = attention_paid(view, last, rows, per_head=True)
        assert heads.shape == (len(last), view.query.shape[1], view.token.shape[1])
        paid = {str(head): heads[:, head] for head in range(heads.shape[1])}
        mean = attention_paid(view, last, rows)
        return atp_patch.Decision(keep_best(view, mean), scores={**paid, "mean": mean})


@kinds
def test_scores_by_head_are_those_of_the_full_map(kind: str) -> None:
    model = patched(kind, ByHead())
    inputs = batch(model, prompts.MIXED)
    forward(model, inputs)
    trace, real = atp_patch.last_trace(model), real_mask(inputs)
    maps = attention_maps(tiny.tiny_model(kind), inputs, {n: trace.layers[n].kept for n in LAYERS})
    for layer in LAYERS:
        scores = trace.layers[layer].scores
        paid = maps.attentions[layer - 1]
        assert len(scores) == paid.shape[1] + 1
        for name, found in scores.items():
            wanted = paid.mean(1) if name == "mean" else paid[:, int(name)]
            scored = ~found.isnan()
            for b in scored.any(1).nonzero().flatten().tolist():
                last = int(real[b].nonzero()[-1])
                assert_close(found[b, scored[b]], wanted[b, last, scored[b]])
