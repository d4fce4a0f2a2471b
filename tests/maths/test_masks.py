"""Hard decisions, soft masks and the gradient between them, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atp_patch.maths import hard_keep, soft_mask, straight_through_mask


def case(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    s_redundant, s_spatial = torch.rand(2, 3, tokens, generator=generator)
    theta_r, theta_s = torch.rand(2, 3, generator=generator)
    valid = torch.arange(tokens) < torch.tensor([[tokens], [4], [0]])
    return s_redundant, s_spatial, theta_r, theta_s, valid


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


@pytest.mark.parametrize("temperature", [1.0, 30.0, 1e6])
def test_masks_are_equations_9_to_11(temperature: float) -> None:
    s_redundant, s_spatial, theta_r, theta_s, valid = case()
    soft = soft_mask(s_redundant, s_spatial, theta_r, theta_s, valid, temperature)
    hard = hard_keep(s_redundant, s_spatial, theta_r, theta_s, valid)
    for b in range(3):
        for n in range(9):
            by_redundant = float(s_redundant[b, n]) - float(theta_r[b])
            by_spatial = float(s_spatial[b, n]) - float(theta_s[b])
            expected = max(sigmoid(by_redundant * temperature), sigmoid(by_spatial * temperature))
            assert float(soft[b, n]) == pytest.approx(expected * bool(valid[b, n]), abs=1e-5)
            assert bool(hard[b, n]) == (bool(valid[b, n]) and max(by_redundant, by_spatial) >= 0)


def test_a_score_on_its_threshold_stays() -> None:
    half, no = torch.full((1, 1), 0.5), torch.zeros(1, 1)
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert bool(hard_keep(half, no, half[0], torch.ones(1), valid).all())
    assert bool(hard_keep(no, half, torch.ones(1), half[0], valid).all())


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    s_redundant, s_spatial, theta_r, theta_s, valid = case()
    weight = torch.randn(3, 9, generator=torch.Generator().manual_seed(4))
    gradients = []
    for mask in (soft_mask, straight_through_mask):
        leaves = [x.clone().requires_grad_() for x in (s_redundant, s_spatial, theta_r, theta_s)]
        got = mask(*leaves, valid, 30.0)
        (got * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    hard = hard_keep(s_redundant, s_spatial, theta_r, theta_s, valid)
    assert torch.equal(got, hard.float())
    for of_soft, of_straight_through in zip(*gradients, strict=True):
        assert torch.equal(of_soft, of_straight_through)
    assert bool((gradients[1][2][:2] != 0).all())
    assert float(gradients[1][2][2]) == 0.0  # a sample without tokens teaches nothing


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_invalid_slots_reach_neither_masks_nor_gradients(garbage: float) -> None:
    s_redundant, s_spatial, theta_r, theta_s, valid = case()
    results = []
    for fill in (0.0, garbage):
        thetas = [x.clone().requires_grad_() for x in (theta_r, theta_s)]
        scores = [x.masked_fill(~valid, fill) for x in (s_redundant, s_spatial)]
        mask = straight_through_mask(*scores, *thetas, valid, 30.0)
        mask.sum().backward()
        results.append((mask, *(theta.grad for theta in thetas)))
    for clean, spoiled in zip(*results, strict=True):
        assert torch.equal(clean, spoiled)


def test_half_precision_scores_meet_the_papers_temperature() -> None:
    """1e6 does not fit in float16: the masks are float32 whatever comes in."""
    s_redundant, s_spatial, theta_r, theta_s, valid = case()
    theta_r = s_redundant[:, 0].clone()  # a margin of exactly 0
    halves = (x.half() for x in (s_redundant, s_spatial, theta_r, theta_s))
    soft = soft_mask(*halves, valid, 1e6)
    assert soft.dtype == torch.float32
    assert bool(soft.isfinite().all())
