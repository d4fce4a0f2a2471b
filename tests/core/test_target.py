"""The budget's loss over several passes: the value of their average, the gradient of the last."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.methods.atp_heads import Thresholds
from tests.core.test_learning import labelled, learner


def test_the_target_may_remember_several_passes() -> None:
    """The value is that of the running average, the gradient that of the present pass."""
    model = learner("llava-llama", target_tokens=12, target_passes=4, lambda_atp=0).train()
    inputs = labelled(model)
    remembered, heads = None, model.atp_patch_heads
    for shift in (0.0, 0.7, -0.4):
        with torch.no_grad():
            for name, bias in heads.named_parameters():
                if name.startswith("theta") and name.endswith("bias"):
                    bias += shift
        model(**inputs)
        trace = atp_patch.last_trace(model)
        now = trace.average_tokens
        remembered = now if remembered is None else remembered + (now - remembered) / 4
        expected = 500 * ((remembered - 12) / trace.visual_tokens) ** 2
        assert trace.losses["target"] == pytest.approx(expected, rel=1e-4)
    assert abs(now - remembered) > 0.1
    assert float(heads.state_dict()["average"]) == pytest.approx(remembered, rel=1e-5)


def test_a_remembered_target_pulls_with_the_slope_of_this_pass() -> None:
    class Heads(Thresholds):
        def forward(self, *_: Any) -> Any:
            raise NotImplementedError

        def shift(self, *_: Any) -> None:
            raise NotImplementedError

    heads = Heads((1,), remembers=True)
    assert float(heads.remembered(torch.tensor(10.0), 5)) == 10
    now = torch.tensor(20.0, requires_grad=True)
    found = heads.remembered(now, 5)
    assert float(found) == 12
    (found**2).backward()
    assert float(now.grad) == 24  # 2 * 12 * 1, and not a fifth of it
