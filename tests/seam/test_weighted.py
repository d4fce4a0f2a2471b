"""Attention with weighed keys: by hand, its gradients, and in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atp_patch.seam.learning import fused
from atp_patch.seam.learning.weighted import weighted_attention


@pytest.mark.parametrize("mask_kind", ["none", "bool", "float"])
@pytest.mark.parametrize("probabilities", [True, False])
def test_weighted_attention_by_hand(mask_kind: str, probabilities: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 3, generator=generator)
    key, value = torch.randn(2, 2, 2, 5, 3, generator=generator)
    weight = torch.tensor([[1.0, 0.0, 0.3, 1.0, 0.0], [0.0, 1.0, 1.0, 0.7, 1.0]])
    seen = torch.ones(5, 5).tril().bool()[None, None].expand(2, 1, 5, 5).clone()
    if mask_kind != "none":
        seen[1, :, :, 0] = False  # padding on the left of the second sample
    floats = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    mask = {"none": None, "bool": seen, "float": floats}[mask_kind]
    got, _ = weighted_attention(query, key, value, mask, 0.5, weight, probabilities=probabilities)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                e = [
                    float(torch.exp(query[b, h, i] @ key[b, h // 2, j] * 0.5))
                    * (1.0 if i == j else float(weight[b, j]))
                    * float(seen[b, 0, i, j])
                    for j in range(5)
                ]
                row = sum(e) and sum(e[j] / sum(e) * value[b, h // 2, j] for j in range(5))
                expected = row if isinstance(row, Tensor) else torch.zeros(3)
                torch.testing.assert_close(got[b, i, h], expected)


@pytest.mark.parametrize("capped", [True, False])
@pytest.mark.parametrize("sunk", [True, False])
def test_a_cap_of_logits_and_sinks_by_hand(capped: bool, sunk: bool) -> None:
    """What the host's own attention would do to the keys of weight 1 (Gemma 2, gpt-oss)."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = 3 * torch.randn(3, 1, 2, 4, 3, generator=generator)
    weight = torch.tensor([[1.0, 0.0, 1.0, 0.4]])
    cap, sinks = 2.0 if capped else None, torch.tensor([0.5, -1.0]) if sunk else None
    got, _ = weighted_attention(
        query, key, value, None, 1.0, weight, softcap=cap, sinks=sinks, probabilities=False
    )
    for h in range(2):
        for i in range(4):
            logits = key[0, h, : i + 1] @ query[0, h, i]
            logits = cap * torch.tanh(logits / cap) if cap else logits
            counted = weight[0, : i + 1].clone()
            counted[i] = 1.0
            e = logits.exp() * counted
            total = e.sum() + (sinks[h].exp() if sinks is not None else 0.0)
            row = (e[:, None] * value[0, h, : i + 1]).sum(0) / total
            torch.testing.assert_close(got[0, i, h], row)


@pytest.mark.parametrize("probabilities", [True, False])
def test_a_key_of_weight_zero_still_gets_its_gradient(probabilities: bool) -> None:
    """The derivative by a weight is (e_n / sum) (v_n - out), also at 0, also far above the
    maximum.
    """
    query = torch.tensor([[[[0.0], [1.0]]]])
    key = torch.tensor([[[[3.0], [1.0]]]])
    value = torch.tensor([[[[5.0], [2.0]]]])
    weight = torch.tensor([[0.0, 1.0]], requires_grad=True)
    out, _ = weighted_attention(query, key, value, None, 1.0, weight, probabilities=probabilities)
    assert out[0, 1, 0].tolist() == [2.0]
    out[0, 1, 0, 0].backward()
    assert weight.grad is not None
    assert float(weight.grad[0, 0]) == pytest.approx(5.0 - 2.0)  # clamped: e_n / sum is 1 at most
    loud = torch.tensor([[[[300.0], [1.0]]]])
    out, _ = weighted_attention(query, loud, value, None, 1.0, weight, probabilities=probabilities)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("mask_kind", ["none", "bool", "float", "padding", "heads"])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize(("rows", "numbers"), [(2, 1), (3, 2**20), (128, 1), (128, 2**20)])
def test_attention_in_pieces_is_attention_at_once(
    mask_kind: str, hard: bool, rows: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and all gradients; the second sample's first rows see nothing but padding."""
    monkeypatch.setattr(fused, "_CPU_NUMBERS", numbers)
    monkeypatch.setattr(fused, "_CPU_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    length = 7
    leaves = [torch.randn(2, h, length, 3, generator=generator) * 2 for h in (4, 2, 2)]
    weight = torch.rand(2, length, generator=generator)
    leaves.append((weight > 0.4).float() if hard else weight * (weight > 0.3))
    seen = torch.ones(length, length).tril().bool()[None, None].repeat(2, 1, 1, 1)
    seen[1, :, :, :2] = False
    floats = torch.where(seen, torch.randn(seen.shape, generator=generator), -3.4028e38)
    two = torch.tensor([[1] * length, [0, 0] + [1] * (length - 2)])
    any_way = (
        torch.rand(2, 4, length, length, generator=generator) > 0.6
    )  # of each head, not causal
    masks = {"none": None, "bool": seen, "float": floats, "padding": two, "heads": any_way}
    mask = masks[mask_kind]
    towards = torch.randn(2, length, 4, 3, generator=generator)
    towards[0, 1::3] = 0  # no gradient reaches these rows
    found = []
    for probabilities in (True, False):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        q, k, v, w = given
        out, table = weighted_attention(q, k, v, mask, 0.7, w, probabilities=probabilities)
        assert (table is None) == (not probabilities)
        found.append([out.detach(), *torch.autograd.grad((out * towards).sum(), given)])
    for at_once, in_pieces in zip(*found, strict=True):
        torch.testing.assert_close(in_pieces, at_once, rtol=1e-5, atol=1e-5)


def test_rows_that_no_gradient_reaches_cost_nothing_on_the_way_back() -> None:
    """Two of 64 rows: a 32nd of the products."""
    generator = torch.Generator().manual_seed(0)
    flops = {}
    for reached in (2, 64):
        leaves = [torch.randn(1, 2, 64, 4, generator=generator, requires_grad=True) for _ in "qkv"]
        weight = torch.ones(1, 64).masked_fill(torch.arange(64) % 2 == 0, 0.0).requires_grad_()
        seen = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        out, _ = weighted_attention(*leaves, seen, 0.5, weight, probabilities=False)
        with FlopCounterMode(display=False) as counter:
            out[:, -reached:].sum().backward()
        flops[reached] = counter.get_total_flops()
    assert 0 < flops[2] == flops[64] / 32
