"""Losses against values found by hand."""

from __future__ import annotations

import torch

from workshop.labels import NOTHING
from workshop.losses import answered, back_loss, tally_loss


def test_answered_needs_every_token() -> None:
    targets = torch.tensor([[[-100, 1, 2, -100], [-100, 1, 2, -100]]])
    logits = torch.zeros(1, 2, 4, 3)
    logits[0, :, 1, 1] = 1
    logits[0, 0, 2, 2] = 1
    assert answered(logits, targets).tolist() == [[True, False]]


def test_attention_to_the_first_noun_is_what_back_loss_measures() -> None:
    attention = torch.full((1, 2, 6, 6), 0.01)
    attention[0, :, 5, 1] = torch.tensor([0.5, 0.25])
    back = torch.tensor([[0, 0, 0, 0, 0, 4]])
    loss = back_loss(attention, back)
    torch.testing.assert_close(
        loss, torch.tensor([0.5, 0.25]).log().mean().neg(), atol=1e-4, rtol=0
    )
    assert back_loss(attention, torch.zeros_like(back)) == 0


def test_tally_loss_is_nought_for_attention_that_counts() -> None:
    cores = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, NOTHING, NOTHING]])
    named = torch.tensor([[0b11, 0b01, 0b00]])
    told = torch.tensor([[True, True, True]])
    right = torch.zeros(1, 3, 11)
    right[0, 0, :9] = torch.tensor([0.5, *[0.0625] * 8])
    right[0, 1, :5] = torch.tensor([8 / 12, *[1 / 12] * 4])
    right[0, 2, 0] = 1.0
    torch.testing.assert_close(
        tally_loss(right, named, told, cores), torch.tensor(0.0), atol=1e-4, rtol=0
    )
    assert tally_loss(torch.full_like(right, 1 / 11), named, told, cores) > 0.3
    assert tally_loss(right, named, torch.zeros_like(told), cores) == 0
    # Shares within an object may differ: what counts is that they sum to 4.
    shares = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.5, 0.5, 0.5, 0.5, 0.0, 0.0]])
    assert tally_loss(right, named, told, cores, shares) > 0.02
    right[0, 0, 5:9] = torch.tensor([2.5, 0.5, 0.5, 0.5]) / 16
    torch.testing.assert_close(
        tally_loss(right, named, told, cores, shares), torch.tensor(0.0), atol=1e-4, rtol=0
    )
