"""Contracts of transformers, of patched models that keep everything and of such that prune."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.families import mrope, square
from tests.families.contracts import INNER, Contracts, gradients, loss_of, same
from tests.families.kinds import MIXED, SINGLE, Kind, make
from tests.families.tables import EVERY, rows
from tests.helpers.inputs import Inputs, real_mask
from tests.helpers.run import forward, generate


@rows(EVERY, mrope.KINDS[:1])
class TestPruned(Contracts):
    """Half of the tokens go before three layers."""

    keep = 0.5


@rows(EVERY, square.KINDS[:1])
class TestKeepingAll(Contracts):
    """Nothing goes, so that every output is the plain model's, bit for bit."""

    keep = 1.0

    def seen(self, model: Any, inputs: Inputs) -> Tensor:
        return real_mask(inputs)

    def test_all_outputs_are_the_plain_ones(self, kind: Kind) -> None:
        inputs = make(kind, MIXED).inputs
        plain, model = self.eager_pair(kind)
        theirs, ours = (forward(one, inputs, **INNER) for one in (plain, model))
        for name in ("logits", "hidden_states", "attentions"):
            assert same(ours[name], theirs[name]), name
        more = {"return_dict_in_generate": True, "output_scores": True, **INNER}
        theirs, ours = (generate(one, inputs, 2, **more) for one in (plain, model))
        for name in ("sequences", "scores", "hidden_states", "attentions"):
            assert same(ours[name], theirs[name]), name

    def test_gradients_are_the_plain_ones(self, kind: Kind) -> None:
        inputs, found = make(kind, SINGLE).inputs, []
        for model in (kind.build(), self.patched(kind)):
            loss_of(model, inputs).backward()
            found.append(gradients(model))
        theirs, ours = found
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())

    def test_bfloat16_is_the_plain_model_in_bfloat16(self, kind: Kind) -> None:
        inputs = self.rounded(make(kind, MIXED).inputs)
        expected = forward(kind.build().bfloat16(), inputs).logits
        model = self.patch(kind, kind.build().bfloat16())
        assert torch.equal(forward(model, inputs).logits, expected)
