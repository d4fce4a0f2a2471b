"""Behaviour 7: un-patching leaves nothing, also after an exception; importing changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import atp_patch
from atp_patch.patching import api
from atp_patch.patching.api import is_patched
from atp_patch.seam import Recorder, Seam
from atp_patch.seam.host import recorder
from atp_patch.seam.host.replaced import Replaced
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close, hooks, shape_of, snapshot
from tests.helpers.inputs import batch
from tests.helpers.pairing import pairs
from tests.helpers.run import FASTV, METHODS, Session, forward, generate, kept_of, patched, words

families = pytest.mark.parametrize("kind", tiny.FAMILIES)
backends = pytest.mark.parametrize("attention", ["sdpa", "eager"])


class PoisonError(Exception):
    """Raised inside a forward pass."""


@contextmanager
def poisoned(module: nn.Module) -> Iterator[None]:
    """A module that raises, as one does that runs out of memory."""

    def fail(*_: Any) -> None:
        raise PoisonError

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def used(model: PreTrainedModel) -> PreTrainedModel:
    """After a forward pass and a generation, which set attributes of their own."""
    forward(model, batch(model, prompts.MIXED))
    generate(model, batch(model, prompts.SINGLE), 2)
    return model


@pairs(kind=tiny.FAMILIES, attention=["sdpa", "eager"], method=METHODS)
def test_unpatching_leaves_nothing(kind: str, attention: str, method: str) -> None:
    model = used(tiny.tiny_model(kind, attention))
    fresh, before = copy.deepcopy(model), snapshot(model)
    assert atp_patch.patch_model(model, **METHODS[method]) is model
    assert snapshot(model) != before, "patching changed nothing: this shows nothing"
    used(model)
    assert atp_patch.unpatch_model(model) is model
    check_restored(model, fresh, before)


def check_restored(model: PreTrainedModel, fresh: PreTrainedModel, before: dict[str, Any]) -> None:
    """Hooks, attributes, configs and keys are as they were; so is what the model answers."""
    after = snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part
    assert shape_of(model) == shape_of(fresh)
    inputs = batch(model, prompts.MIXED)
    assert torch.equal(forward(model, inputs).logits, forward(fresh, inputs).logits)
    assert torch.equal(generate(model, inputs, 2), generate(fresh, inputs, 2))
    with pytest.raises(atp_patch.ATPError):
        atp_patch.last_trace(model)


PLACES = {
    "vision": lambda model: model.model.get_submodule(
        "vision_tower" if tiny.is_llava(model) else "visual"
    ),
    "recorded attention": lambda model: tiny.decoder_layers(model)[1].self_attn.o_proj,
    "pruning layer": lambda model: tiny.decoder_layers(model)[2].input_layernorm,
    "between": lambda model: tiny.decoder_layers(model)[4].mlp,
    "final norm": lambda model: model.model.language_model.norm,
    "head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("place", PLACES)
@families
def test_after_an_exception_all_is_well(kind: str, place: str) -> None:
    """The next forward is right, and un-patching exact, wherever the last one broke off."""
    model = used(tiny.tiny_model(kind))
    fresh, before = copy.deepcopy(model), snapshot(model)
    atp_patch.patch_model(model, **FASTV)
    inputs = batch(model, prompts.MIXED)
    for call in (forward, generate):
        with poisoned(PLACES[place](model)), pytest.raises(PoisonError):
            call(model, inputs)
    text = batch(model, prompts.NO_IMAGE)
    assert torch.equal(forward(model, text).logits, forward(fresh, text).logits)
    assert torch.equal(forward(model, inputs).logits, forward(patched(kind), inputs).logits)
    with poisoned(PLACES[place](model)), pytest.raises(PoisonError):
        forward(model, inputs)
    atp_patch.unpatch_model(model)
    check_restored(model, fresh, before)


@families
def test_after_an_exception_in_decoding(kind: str) -> None:
    model = patched(kind)
    session = Session(model, batch(model, prompts.MIXED))
    kept = kept_of(model)
    twin = session.fork()
    with poisoned(tiny.decoder_layers(model)[5]), pytest.raises(PoisonError):
        session.feed(words(4, 1))
    answer = twin.feed(words(4, 2))
    assert_close(answer, twin.reference(tiny.tiny_model(kind), kept)[:, -2:])


@families
def test_patching_twice_replaces(kind: str) -> None:
    model = used(tiny.tiny_model(kind))
    fresh, before = copy.deepcopy(model), snapshot(model)
    atp_patch.patch_model(model, **METHODS["atp"])
    forward(model, batch(model, prompts.MIXED))
    atp_patch.patch_model(model, method="random", layers=[3], keep=0.5, seed=0)
    inputs = batch(model, prompts.MIXED)
    logits = forward(model, inputs).logits
    once = patched(kind, method="random", layers=[3], keep=0.5, seed=0)
    assert torch.equal(logits, forward(once, inputs).logits)
    assert list(atp_patch.last_trace(model).layers) == [3]
    numbers = [
        {name: {at: len(ids) for at, ids in kinds.items()} for name, kinds in hooks(one).items()}
        for one in (model, once)
    ]
    assert numbers[0] == numbers[1]
    atp_patch.unpatch_model(model)
    check_restored(model, fresh, before)
    with pytest.raises(atp_patch.NotPatchedError):
        atp_patch.unpatch_model(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": [0, 3]},
        {"layers": [3, 8]},
        {"layers": [4, 2]},
        {"layers": []},
        {"layers": [2], "keep": 0.0},
        {"layers": [2], "keep": 1.5},
        {"layers": [2], "keep": [0.5, 0.5]},
        {"layers": [2], "keep": 0.5, "target_tokens": 20},
        {"layers": [2], "target_tokens": -3},
        {"layers": [2], "target_tokens": 5},  # two of eight layers cost nine tokens
        {"layers": [2], "method": "no such method"},
        {"layers": [2], "no_such_option": 1},
    ],
    ids=str,
)
def test_a_refused_patch_changes_nothing(wrong: dict[str, Any]) -> None:
    model = tiny.tiny_model("llava-llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\w") as refusal:
        atp_patch.patch_model(model, **wrong)
    assert isinstance(refusal.value, atp_patch.ATPError)
    assert snapshot(model) == before
    atp_patch.patch_model(model, **FASTV)
    patched_once = snapshot(model)
    with pytest.raises(atp_patch.ATPError):
        atp_patch.patch_model(model, **wrong)
    assert snapshot(model) == patched_once, "a refused second patch damaged the first"


class Breaking:
    """Counts the steps of an installation, and has those from the ``at``-th on raise, from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.at, self.steps = at, 0
        for owner, name in STEPS:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            if self.at is not None and self.steps >= self.at:
                raise PoisonError
            return original(*args, **kwargs)

        return counted


STEPS = (
    (nn.Module, "register_forward_pre_hook"),
    (nn.Module, "register_forward_hook"),
    (nn.Module, "add_module"),
    (Replaced, "__init__"),
    (recorder, "register"),
    (Recorder, "watch"),
    (Seam, "__init__"),
    (api, "attach"),
)
EARLIER: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "fastv": FASTV,
    "learned": {"method": "atp", "layers": [2, 4], "thresholds": "learned", "reference_grid": 6},
    "prumerge+": {"method": "prumerge+"},
    "voco": {"method": "voco", "num_tokens": 2},
}
LATER: dict[str, dict[str, Any]] = {
    "both": {
        "method": ["prumerge+", "atp"],
        "layers": [3, 5],
        "thresholds": "learned",
        "reference_grid": 6,
    },
    "voco": {"method": "voco", "num_tokens": 3},
}


@pairs(kind=tiny.FAMILIES, earlier=EARLIER, later=LATER)
def test_a_failed_installation_changes_nothing(kind: str, earlier: str, later: str) -> None:
    """Whichever step fails; the old patch works on, and its trace is there."""
    model = used(tiny.tiny_model(kind))
    fresh, unpatched = copy.deepcopy(model), snapshot(model)
    torch.manual_seed(0)
    options = EARLIER[earlier]
    if options is not None:
        atp_patch.patch_model(model, **options)
    inputs = batch(model, prompts.MIXED)
    expected = forward(model, inputs).logits
    trace = None if options is None else atp_patch.last_trace(model)
    before, twin = snapshot(model), copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        watched = Breaking(monkeypatch)
        atp_patch.patch_model(twin, **LATER[later])
    assert watched.steps > 15
    for at in range(1, watched.steps + 1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            Breaking(monkeypatch, at)
            with pytest.raises(PoisonError):
                atp_patch.patch_model(model, **LATER[later])
        after = snapshot(model)
        for part, value in before.items():
            assert after[part] == value, f"{part}, broken at step {at}"
        assert is_patched(model) == (options is not None)
        assert trace is None or atp_patch.last_trace(model) is trace
    assert torch.equal(forward(model, inputs).logits, expected)
    if options is not None:
        atp_patch.unpatch_model(model)
    check_restored(model, fresh, unpatched)


@backends
@families
def test_disabled_is_plain_for_a_while(kind: str, attention: str) -> None:
    plain, model = tiny.tiny_model(kind, attention), patched(kind, attention)
    inputs = batch(plain, prompts.MIXED)
    pruned = forward(model, inputs).logits
    with atp_patch.disabled(model):
        assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
        with atp_patch.disabled(model):
            pass
        assert torch.equal(generate(model, inputs), generate(plain, inputs))
    assert torch.equal(forward(model, inputs).logits, pruned)
    with pytest.raises(PoisonError), atp_patch.disabled(model):
        raise PoisonError
    assert torch.equal(forward(model, inputs).logits, pruned)


@families
def test_disabled_contexts_may_overlap(kind: str) -> None:
    """They are left in the order in which they were entered: the first does not enable the model,
    and the last leaves it as it was.
    """
    plain, model = tiny.tiny_model(kind), patched(kind)
    inputs = batch(plain, prompts.MIXED)
    pruned, full = forward(model, inputs).logits, forward(plain, inputs).logits
    first, second = atp_patch.disabled(model), atp_patch.disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(forward(model, inputs).logits, full)
    second.__exit__(None, None, None)
    assert torch.equal(forward(model, inputs).logits, pruned)


@families
def test_a_copy_of_a_disabled_model_prunes(kind: str) -> None:
    """No context will ever enable it again."""
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    with atp_patch.disabled(model):
        twin = copy.deepcopy(model)
    assert torch.equal(forward(twin, inputs).logits, forward(model, inputs).logits)


@families
def test_disabled_reads_caches_of_either_kind(kind: str) -> None:
    """A prompt pruned before, and a prompt that was not, each go on as they began."""
    model, plain = patched(kind), tiny.tiny_model(kind)
    before = Session(model, batch(model, prompts.MIXED))
    kept = kept_of(model)
    with atp_patch.disabled(model):
        answer = before.feed(words(4, 2))
        whole = Session(model, batch(model, prompts.MIXED))
        whole.feed(words(4, 1))
    assert_close(answer, before.reference(plain, kept)[:, -2:])
    later = whole.feed(words(4, 2, seed=1))
    assert_close(later, whole.reference(plain, {})[:, -2:])


def test_functions_need_a_patched_model() -> None:
    model = tiny.tiny_model("llava-llama")
    for call in (atp_patch.unpatch_model, atp_patch.last_trace):
        with pytest.raises(atp_patch.NotPatchedError):
            call(model)
    with pytest.raises(atp_patch.NotPatchedError), atp_patch.disabled(model):
        pass
