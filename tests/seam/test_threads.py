"""Any number of threads use one patched model, and each gets what it would get alone."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from tests.core.test_own_methods import Remembers
from tests.families import outside
from tests.families.kinds import Picture, sample
from tests.families.kinds import Words as Text
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.doors import TowerReader
from tests.helpers.held import held
from tests.helpers.inputs import batch
from tests.helpers.pairing import pairs
from tests.helpers.run import FASTV, patched
from tests.helpers.voco import voco_model

THREADS, CALLS, FEW = 8, 50, 4
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Subject:
    """One patched model and keyword arguments of its calls: pairs for ``forward``, ``generate``."""

    model: Any
    inputs: list[tuple[dict[str, Any], dict[str, Any]]]


def _tiny(model: Any, *cases: tuple[prompts.Prompt, ...]) -> Subject:
    made = [batch(model, case, side) for case in cases for side in ("left", "right")]
    left = [batch(model, case) for case in cases for _ in range(2)]
    return Subject(model, list(zip(made, left, strict=True)))


def _still(model: Any) -> Subject:
    return _tiny(model, prompts.SINGLE, prompts.MIXED, prompts.RAGGED)


def _film(model: Any) -> Subject:
    return _tiny(model, prompts.SINGLE, prompts.VIDEO, prompts.RAGGED)


def _vila() -> Subject:
    case = next(case for case in outside.CASES if case.name == "vila-llama")
    model = atp_patch.patch_model(case.build(), **FASTV)
    samples = (
        (sample(Text(3), Picture(0), Text(9), seed=1),),
        (
            sample(Text(2), Picture(1), Text(4), seed=2),
            sample(Text(6), Picture(0), Text(3), seed=3),
        ),
    )
    given = [case.batch(model, one) for one in samples]
    return Subject(model, [(one.forward, one.generate) for one in given])


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "in the decoder": lambda: _still(patched("llava-llama")),
    "video": lambda: _film(patched("qwen2_vl")),
    "pair": lambda: _still(
        patched("llava-llama", method=["prumerge+", "atp"], layers=[2, 4], target_tokens=9)
    ),
    "tower of a budget": lambda: _film(patched("qwen2_vl", method="prumerge", target_tokens=8)),
    "at the door, then with state": lambda: _film(
        patched("qwen2_vl", method=[TowerReader(share=0.6), Remembers()], layers=[2, 4], keep=0.6)
    ),
    "smaller pictures": lambda: _film(patched("qwen2_vl", method="downsample", target_tokens=10)),
    "voco": lambda: _still(voco_model("llava-llama")),
    "outside": _vila,
}


def calls_of(subject: Subject) -> list[tuple[str, Callable[[], list[Tensor]]]]:
    """Every kind of call with every input, by name; each returns what it is to be compared by."""
    model, found = subject.model, []

    def forward(given: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            logits = model(**given).logits
        return [logits, *traced()]

    def generate(given: dict[str, Any]) -> list[Tensor]:
        return [model.generate(**given, max_new_tokens=4, do_sample=False), *traced()]

    def plain(given: dict[str, Any]) -> list[Tensor]:
        with atp_patch.disabled(model), torch.no_grad():
            return [model(**given).logits]

    def traced() -> list[Tensor]:
        trace = atp_patch.last_trace(model)
        return [trace.tokens_per_layer, *(layer.kept for layer in trace.layers.values())]

    def bound(call: Callable[..., list[Tensor]], given: Any) -> Callable[[], list[Tensor]]:
        return lambda: call(given)

    for number, (of_forward, of_generate) in enumerate(subject.inputs):
        found += [
            (f"forward {number}", bound(forward, of_forward)),
            (f"generate {number}", bound(generate, of_generate)),
            (f"plain {number}", bound(plain, of_forward)),
        ]
    return found


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize(
    ("name", "each"),
    [
        *((name, FEW) for name in SUBJECTS),
        *(pytest.param(name, CALLS, marks=pytest.mark.slow) for name in SUBJECTS),
    ],
)
@pytest.mark.usefixtures("switching")
def test_every_thread_gets_what_it_would_get_alone(name: str, each: int) -> None:
    calls = calls_of(SUBJECTS[name]())
    if each == FEW:
        calls = calls[:6]  # each kind of call, with two inputs
    alone = {call: run() for call, run in calls}
    wrong: list[str] = []
    together = threading.Barrier(THREADS)

    def work(number: int) -> None:
        drawn = random.Random(number)
        together.wait()
        for _ in range(each):
            call, run = drawn.choice(calls)
            try:
                got = run()
            except Exception as error:
                wrong.append(f"{call}: {type(error).__name__}: {error}")
                continue
            wanted = alone[call]
            same = [x.shape for x in got] == [x.shape for x in wanted] and all(
                float((x.double() - y.double()).abs().max()) <= TOLERANCE
                for x, y in zip(got, wanted, strict=True)
            )
            if not same:
                wrong.append(f"{call}: another answer than alone")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of {THREADS * each} calls went wrong: {sorted(wrong)[:5]}"


def test_disabled_in_one_thread_leaves_the_others_pruned() -> None:
    model = patched("llava-llama")
    inputs = batch(model, prompts.SINGLE)
    with torch.no_grad():
        pruned = model(**inputs).logits
    found: list[Tensor] = []

    def ask() -> None:
        with torch.no_grad():
            found.append(model(**inputs).logits)

    with atp_patch.disabled(model):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert torch.equal(found[0], pruned)


def test_overlapping_contexts_of_disabled_end_together() -> None:
    """Contexts need not end in the order in which they began, as those of generators do not."""
    plain, model = tiny.tiny_model("llava-llama"), patched("llava-llama")
    inputs = batch(model, prompts.SINGLE)
    with torch.no_grad():
        pruned, whole = model(**inputs).logits, plain(**inputs).logits
    first, second = atp_patch.disabled(model), atp_patch.disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole)
    second.__exit__(None, None, None)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, pruned)


def test_a_trace_is_the_threads_own() -> None:
    model = patched("llava-llama")
    one, other = batch(model, prompts.SINGLE), batch(model, prompts.MIXED)
    with torch.no_grad():
        model(**one)
    errors: list[BaseException] = []
    shapes: list[torch.Size] = []

    def ask() -> None:
        try:
            atp_patch.last_trace(model)
        except atp_patch.NotPatchedError as error:
            errors.append(error)
        with torch.no_grad():
            model(**other)
        shapes.append(atp_patch.last_trace(model).layers[2].kept.shape)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "thread" in str(errors[0])
    assert shapes == [other["input_ids"].shape]
    assert atp_patch.last_trace(model).layers[2].kept.shape == one["input_ids"].shape


OPTIONS: dict[str, dict[str, Any]] = {
    "fastv": FASTV,
    "pair": {"method": ["prumerge+", "atp"], "layers": [2, 4], "target_tokens": 9},
    "downsample": {"method": "downsample", "keep": 0.25},
    "voco": {"method": "voco", "num_tokens": 2},
}


@pairs(kind=tiny.FAMILIES, options=OPTIONS, broken=[None, ValueError, KeyboardInterrupt])
def test_nothing_of_a_pass_lives_on_the_model(
    kind: str, options: str, broken: type[BaseException] | None
) -> None:
    model = patched(kind, **OPTIONS[options])
    inputs = batch(model, prompts.MIXED)
    with torch.no_grad():
        model(**inputs)  # transformers installs hooks of its own in the first pass
    before = held(model)
    assert any(name.startswith("model") and " " in name for name in before), "no hook was found"
    places = [
        model.model.get_submodule("vision_tower" if tiny.is_llava(model) else "visual"),
        tiny.decoder_layers(model)[1].input_layernorm,
        tiny.decoder_layers(model)[5].mlp,
    ]
    for place in places:

        def stop(*_: Any) -> None:
            if broken is not None:
                raise broken

        handle = place.register_forward_pre_hook(stop)
        for call, more in ((model, {}), (model.generate, {"max_new_tokens": 2})):
            with torch.no_grad():
                if broken is None:
                    call(**inputs, **more)
                    continue
                with pytest.raises(broken):
                    call(**inputs, **more)
        handle.remove()
        assert held(model) == before
