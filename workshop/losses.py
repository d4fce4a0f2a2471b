"""The losses of the stages of training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from workshop.labels import IGNORE, PATCH_FIELDS

_EMPTY_WEIGHT = 0.05
"""Weight in the fields of objects of a patch without an object, as most patches are."""

_FIELD_WEIGHT = {"shape": 4.0, "character": 2.0, "background": 0.5, "texture": 0.5}
"""Weights of patch fields, 1 for those not named. Shape is learned slowest."""


def patch_loss(
    logits: Tensor, labels: Tensor, place_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Return the mean cross-entropy over PATCH_FIELDS, and the accuracy of each field.

    Args:
        logits: (images, 576, sum of all classes).
        labels: (images, 576, fields).
        place_weight: weight of the fields "row" and "column".
    """
    losses = []
    accuracy = {}
    for k, (name, part) in enumerate(
        zip(PATCH_FIELDS, logits.split(list(PATCH_FIELDS.values()), dim=-1), strict=True)
    ):
        target = labels[..., k]
        each = nn.functional.cross_entropy(part.flatten(0, 1), target.flatten(), reduction="none")
        in_grid = name in ("row", "column")
        if in_grid or name in ("background", "texture"):
            told = torch.ones_like(target, dtype=torch.bool)
        elif name == "core":
            told = target == 1
        else:
            told = target != PATCH_FIELDS[name] - 1
        weight = torch.where(told, 1.0, _EMPTY_WEIGHT).flatten()
        field_weight = place_weight if in_grid else _FIELD_WEIGHT.get(name, 1.0)
        losses.append(field_weight * (each * weight).sum() / weight.sum())
        hits = (part.argmax(-1) == target)[told]
        accuracy[name] = hits.float().mean().item() if hits.numel() else float("nan")
    return torch.stack(losses).mean(), accuracy


def place_loss(guess: Tensor, places: Tensor) -> Tensor:
    """Return the weighted mean squared error of rows and columns.

    Args:
        guess: (images, 576, 4) predictions.
        places: (images, 576, 5), from `patch_places`; the last entry is the weight.
    """
    weight = places[..., 4:]
    return ((guess - places[..., :4]).square() * weight).mean() / weight.mean()


def answer_loss(logits: Tensor, targets: Tensor, task_weight: Tensor) -> Tensor:
    """Return the mean cross-entropy over answer tokens, weighted by task.

    Args:
        logits: (rows, questions, length, vocabulary).
        targets: (rows, questions, length), IGNORE outside of answers.
        task_weight: (rows, questions), the weight of each question.
    """
    told = targets != IGNORE
    each = nn.functional.cross_entropy(logits[told], targets[told], reduction="none")
    weight = task_weight[..., None].expand_as(targets)[told]
    return (each * weight).sum() / weight.sum()


def field_loss(logits: Tensor, labels: Tensor, fields: Mapping[str, int]) -> Tensor:
    """Return the mean cross-entropy over `fields`.

    Args:
        logits: (..., all classes).
        labels: (..., fields), IGNORE where a field has no label.
        fields: the number of classes of each field.
    """
    losses = []
    for k, part in enumerate(logits.split(list(fields.values()), dim=-1)):
        target = labels[..., k]
        told = target != IGNORE
        if told.any():
            losses.append(nn.functional.cross_entropy(part[told], target[told].long()))
    return torch.stack(losses).mean() if losses else logits.new_zeros(())


def back_loss(attention: Tensor, back: Tensor) -> Tensor:
    """Return the mean of -log(attention from a question's second noun to its first).

    Args:
        attention: (rows, heads, packed, packed).
        back: (rows, packed), the distance in tokens to the first noun; 0 for other tokens.
    """
    wanted = torch.arange(back.shape[1], device=back.device) - back  # (rows, packed)
    share = attention.gather(3, wanted[:, None, :, None].expand(-1, attention.shape[1], -1, -1))
    told = share[..., 0].transpose(1, 2)[back > 0]
    return -(told + 1e-6).log().mean() if told.numel() else attention.new_zeros(())


def gaze_loss(gaze: Tensor, wanted: Tensor, owners: Tensor) -> Tensor:
    """Return the mean of -log(attention to the patches of what a token names).

    Args:
        gaze: (rows, heads, packed, visual), the attention.
        wanted: (rows, packed), the owners that a token names, as bits.
        owners: (rows, visual), the owner of each visual token.
    """
    on_it = (wanted[:, :, None] >> owners[:, None, :]) & 1  # (rows, packed, visual)
    told = on_it.any(-1)
    if not told.any():
        return gaze.new_zeros(())
    share = (gaze * on_it[:, None]).sum(-1)  # (rows, heads, packed)
    return -(share.transpose(1, 2)[told] + 1e-6).log().mean()


TALLY_REST = 8.0
"""Weight of the beginning of the sequence; the middle patches of an object have 4 together."""


def tally_loss(
    tally: Tensor, named: Tensor, told: Tensor, cores: Tensor, shares: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of attention that counts objects.

    The wanted attention has four shares on the middle patches of each object that a noun names, and
    TALLY_REST shares on the beginning of the sequence, so that the latter shows the number of
    objects.

    Args:
        tally: (rows, packed, 1 + visual), attention to the beginning and to the visual tokens.
        named: (rows, packed), the objects that a token names, as bits.
        told: (rows, packed) bool, True for such nouns.
        cores: (rows, visual), the object whose middle a visual token shows.
        shares: (rows, visual), the share of a visual token in its object's middle; by default 1.
    """
    on_it = ((named[:, :, None] >> cores[:, None, :]) & 1).to(tally.dtype)
    if shares is not None:
        on_it = on_it * shares[:, None]
    wanted = nn.functional.pad(on_it, (1, 0), value=TALLY_REST)
    wanted = wanted / wanted.sum(-1, keepdim=True)
    each = -(wanted * (tally + 1e-6).log()).sum(-1)
    least = -(wanted * (wanted + 1e-6).log()).sum(-1)
    return (each - least)[told].mean() if told.any() else tally.new_zeros(())


def answered(logits: Tensor, targets: Tensor) -> Tensor:
    """(rows, questions) bool: whether each token of the answer and `</s>` is the likeliest one.

    This is True exactly if greedy generation gives the correct answer, because both see the same
    tokens up to the first wrong one.
    """
    return ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(-1)
