"""Whatever operation of a call fails, the next call is right, and nothing of the failed one stays.

The allocator is simulated: a dispatch mode of torch counts the operations of a call and raises at
one of them, as a device does whose memory is full, or a user who presses Ctrl-C.
"""

from __future__ import annotations

import gc
import random
import weakref
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import atp_patch
from atp_patch.patching.api import require_patch
from tests.cells import KINDS, METHODS
from tests.families.kinds import MIXED, SINGLE, Kind, make
from tests.helpers.held import held
from tests.helpers.inputs import Inputs

# Tiles of several sizes; M-RoPE and features that come late; tiles of one size.
FAMILIES = ("llava_next", "qwen3_vl", "internvl")
ERRORS = (torch.OutOfMemoryError, KeyboardInterrupt, RuntimeError)
FEW = [
    ("llava_next", "layer"),
    ("qwen3_vl", "layer, learned"),
    ("internvl", "door"),
    ("llava_next", "door, then layer"),
    ("internvl", "tower"),
    ("internvl", "picture"),
    ("llava_next", "voco"),
]
REFUSED = [
    ("qwen3_vl", "tower"),
    ("qwen3_vl", "picture"),
    ("qwen3_vl", "voco"),
    ("llava_next", "picture"),
]
ALL = [pair for pair in product(FAMILIES, METHODS) if pair not in REFUSED]


class Counted(TorchDispatchMode):
    """Counts operations, raises at one of them, and knows which of their tensors are alive.

    Attributes:
        count: how many operations there were.
        decoding: the number of the first operation behind the prefill of ``generate``.
    """

    def __init__(self, fails_at: int | None = None, error: type[BaseException] = Exception) -> None:
        super().__init__()
        self.count, self.decoding = 0, 0
        self.fails_at, self.error = fails_at, error
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count - 1 == self.fails_at:
            raise self.error("simulated")
        out = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(one) for one in tree_leaves(out) if isinstance(one, Tensor)]
        return out

    def processor(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Takes part in ``generate``, and so sees where the prefill ends."""
        self.decoding = self.decoding or self.count
        return scores

    def alive(self) -> int:
        """How many numbers the tensors hold that were made and are still there."""
        gc.collect()
        there = {id(one): one for ref in self.made if (one := ref()) is not None}
        return sum(one.numel() for one in there.values())


def asked(model: Any, inputs: Inputs, mode: Counted) -> tuple[Tensor, Tensor]:
    """A prefill and a decode step: the ids and the logits of both."""
    torch.manual_seed(0)
    with mode:
        out = model.generate(
            **inputs,
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=[mode.processor],
        )
    return out.sequences, torch.stack(out.logits, 1)


def patched(kind: Kind, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    settings = dict(options)
    if settings["method"] in ("fastv", "atp") or isinstance(settings["method"], list):
        settings["layers"] = kind.layers
    return atp_patch.patch_model(kind.build(), **settings)


def check(family: str, method: str, sample: int) -> None:
    """Fail at some seeded operations of the prefill, and at as many of the decode step."""
    kind = KINDS[family]
    model = patched(kind, METHODS[method])
    inputs, others = make(kind, MIXED).inputs, make(kind, SINGLE).inputs
    asked(model, inputs, Counted())  # transformers sets up some of its own in the first call
    whole = Counted()
    ids, logits = asked(model, inputs, whole)
    usual = whole.alive()
    of_others = asked(model, others, Counted())
    asked(model, inputs, Counted())
    before = held(model)
    assert 0 < whole.decoding < whole.count
    drawn = random.Random(f"{family} {method}")
    parts = range(whole.decoding), range(whole.decoding, whole.count)
    for number in [n for part in parts for n in drawn.sample(part, min(sample, len(part)))]:
        error = ERRORS[number % len(ERRORS)]
        broken = Counted(number, error)
        with pytest.raises(error):
            asked(model, inputs, broken)
        state = require_patch(model).seam.thread
        assert (state.disabled, state.session, state.call) == (0, None, None), number
        assert held(model) == before, number
        assert broken.alive() <= usual, number
        turn = asked(model, others, Counted()) if number % 2 else of_others
        assert torch.equal(turn[0], of_others[0]), number
        assert torch.equal(turn[1], of_others[1]), number
        again = asked(model, inputs, Counted())
        assert torch.equal(again[0], ids), number
        assert torch.equal(again[1], logits), number
    plain = asked(kind.build(), inputs, Counted())
    unpatched = asked(atp_patch.unpatch_model(model), inputs, Counted())
    assert torch.equal(unpatched[1], plain[1])


@pytest.mark.parametrize(("family", "method"), FEW)
def test_any_operation_may_fail(family: str, method: str) -> None:
    check(family, method, sample=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("family", "method"), ALL)
def test_any_of_many_operations_may_fail(family: str, method: str) -> None:
    check(family, method, sample=60)


@pytest.mark.parametrize("method", ["layer, learned", "voco"])
def test_patching_that_fails_leaves_the_model_plain(method: str) -> None:
    kind = KINDS["llava_next"]
    options = METHODS[method]
    with (whole := Counted()):
        patched(kind, options)
    model = kind.build()
    inputs = make(kind, SINGLE).inputs
    expected = asked(model, inputs, Counted())[1]
    keys = list(model.state_dict())
    settings = {**options, **({"layers": kind.layers} if method == "layer, learned" else {})}
    assert whole.count > 10
    failed = 0
    for number in random.Random(method).sample(range(whole.count), 10):
        broken = Counted(number, ERRORS[number % len(ERRORS)])
        try:
            with broken:
                atp_patch.patch_model(model, **settings)
        except broken.error:
            failed += 1
            with pytest.raises(atp_patch.NotPatchedError):
                atp_patch.last_trace(model)
        else:
            atp_patch.unpatch_model(model)
        assert list(model.state_dict()) == keys
        assert torch.equal(asked(model, inputs, Counted())[1], expected)
    assert failed
