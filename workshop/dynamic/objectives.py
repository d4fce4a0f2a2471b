"""The losses of the second model's stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atp_patch.builtin.dynamic.sizes import TOKEN_PX
from atp_patch.builtin.scenes import GRID
from workshop import forward as first_model
from workshop.architecture import (
    GAZING_ORIGINALS,
    HOLDS_ORIGINAL,
    NOUN_ORIGINAL,
    SIDE_ORIGINAL,
)
from workshop.batches import Batch
from workshop.dynamic.architecture import MERGE
from workshop.dynamic.forward import (
    decoder_forward,
    merged,
    tower_forward,
)
from workshop.forward import Notes, to_pixel_values
from workshop.labels import NOTHING
from workshop.learner import Learner
from workshop.objectives import answers, noun_losses
from workshop.stage import Stage

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_EMPTY_WEIGHT = 0.25
"""Weight of a token that shows neither an object nor a character."""
_HINT_WEIGHT = 0.25
"""Weight of a layer of the tower; the visual tokens have weight 1."""


def distil_loss(
    learner: Learner,
    first: LlavaForConditionalGeneration,
    batch: Batch,
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """Return how far the tower is from the first model's on pictures of 192 x 192 pixels.

    Visual tokens are compared, and patches after each layer. The token (i, j) is compared with the
    first model's visual token of patch (2i + 1, 2j + 1); exactly one of the 2 x 2 patches in the
    middle of an object is such a patch.
    """
    pixels = to_pixel_values(batch["shown"])
    rows, columns = (side // TOKEN_PX for side in pixels.shape[-2:])
    wanted: list[Tensor] = []
    with torch.no_grad():
        features = first_model.tower_forward(first, to_pixel_values(batch["pixels"]), states=wanted)
        target = first.model.multi_modal_projector(features)
    found: list[Tensor] = []
    tokens = merged(learner.model, tower_forward(learner.model, pixels, found), rows, columns)
    owners = torch.as_tensor(batch["owners"])
    at = torch.arange(GRID * GRID).reshape(GRID, GRID)[1::MERGE, 1::MERGE].flatten()
    error = _error(tokens, target[:, at], owners[:, at])
    hints = [_error(mine, its, owners) for mine, its in zip(found, wanted, strict=True)]
    shares = {"token_error": error.item()}
    shares |= {f"layer_error_{k}": hint.item() for k, hint in enumerate(hints)}
    return error + _HINT_WEIGHT * torch.stack(hints).sum(), shares


def _error(found: Tensor, wanted: Tensor, owners: Tensor) -> Tensor:
    """Return the weighted mean squared error divided by the variance.

    Args:
        found, wanted: (images, cells, hidden).
        owners: (images, cells), what each cell shows.
    """
    weight = torch.where(owners == NOTHING, _EMPTY_WEIGHT, 1.0)[..., None]
    weight = weight / weight.sum()
    variance = ((wanted - (wanted * weight).sum((0, 1))).square() * weight).sum((0, 1)).mean()
    return ((found - wanted).square() * weight).sum((0, 1)).mean() / variance


def questions_loss(
    learner: Learner,
    stage: Stage,
    batch: Batch,
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of answers and auxiliary losses, and the accuracy of each task."""
    pixels = to_pixel_values(batch["shown"])
    rows, columns = (side // TOKEN_PX for side in pixels.shape[-2:])
    with torch.set_grad_enabled(stage.tower_rate > 0):
        features = tower_forward(learner.model, pixels)
    notes = Notes((NOUN_ORIGINAL, SIDE_ORIGINAL, HOLDS_ORIGINAL), GAZING_ORIGINALS, SIDE_ORIGINAL)
    visual = merged(learner.model, features, rows, columns)
    ids = torch.as_tensor(batch["ids"])
    logits = decoder_forward(learner.model, visual, rows, columns, ids, notes)
    loss, shares = answers(logits, batch, stage)
    owners, near, middle = (
        torch.as_tensor(batch[f"token_{name}"]) for name in ("owners", "near", "middle")
    )
    tallied = (near, middle)
    for name, (weight, extra) in noun_losses(learner, batch, stage, notes, owners, tallied).items():
        loss = loss + weight * extra
        shares[name] = extra.item()
    return loss, shares
