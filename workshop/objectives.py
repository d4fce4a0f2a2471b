"""The loss of a training step, and the values that are logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atp_patch.builtin.scenes import GRID
from atp_patch.builtin.vocabulary import MAX_OBJECTS, TASKS
from workshop.architecture import (
    GAZING_ORIGINALS,
    HOLDS_ORIGINAL,
    NOUN_ORIGINAL,
    SIDE_ORIGINAL,
)
from workshop.batches import Batch
from workshop.forward import (
    Notes,
    decoder_forward,
    to_pixel_values,
    tower_forward,
    window_order,
)
from workshop.labels import HOLDS_FIELDS, IGNORE, NOTHING, NOUN_FIELDS, SIDE_FIELDS
from workshop.learner import Learner
from workshop.losses import (
    answer_loss,
    answered,
    back_loss,
    field_loss,
    gaze_loss,
    patch_loss,
    place_loss,
    tally_loss,
)
from workshop.stage import Stage

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def visible_places(stage: Stage, step: int, owners: Tensor) -> Tensor:
    """(rows, visual): raster indices of the patches that the decoder is shown, in rising order.

    Args:
        stage: the stage of training.
        step: the number of the step, which seeds the choice.
        owners: (rows, 576), what each patch shows.
    """
    grid = torch.arange(GRID * GRID).reshape(GRID, GRID)
    if stage.visual_tokens == GRID * GRID:
        return grid.reshape(1, -1)
    generator = torch.Generator().manual_seed(step)
    row, column = torch.randint(stage.stride, (2,), generator=generator).tolist()
    subset = grid[row :: stage.stride, column :: stage.stride].reshape(-1)
    # Patches that show nothing are only used to fill up.
    rank = torch.rand(owners.shape[0], len(subset), generator=generator)
    rank += (owners[:, subset] == NOTHING).float()
    chosen = rank.argsort(dim=1)[:, : stage.visual_tokens].sort(dim=1).values
    return subset[chosen]


def tower_loss(
    learner: Learner, batch: Batch, stage: Stage, step: int, compiled: bool
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss, and the accuracy of each patch field."""
    order = None
    if step < stage.windowed_steps:
        generator = torch.Generator().manual_seed(step)
        rows, columns = torch.randint(GRID, (2,), generator=generator).tolist()
        order = window_order((rows, columns))
    run = _compiled_tower if compiled else tower_forward
    features = run(learner.model, to_pixel_values(batch["pixels"]), order)
    labels = torch.as_tensor(batch["labels"])
    return patch_loss(learner.heads["patch"](features), labels, stage.place_weight)


def decoder_loss(
    learner: Learner, batch: Batch, stage: Stage, step: int, compiled: bool
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss, and the accuracy of each task."""
    owners = torch.as_tensor(batch["owners"]).repeat_interleave(stage.batch.views, 0)
    places = visible_places(stage, step, owners)
    run = _compiled_tower if compiled else tower_forward
    with torch.set_grad_enabled(stage.tower_rate > 0):
        features = run(learner.model, to_pixel_values(batch["pixels"]), None)
    whole = features
    features = features.repeat_interleave(stage.batch.views, 0)
    places = places.expand(len(features), -1)
    features = features.gather(1, places[..., None].expand(-1, -1, features.shape[-1]))
    ids = torch.as_tensor(batch["ids"])
    notes = Notes((NOUN_ORIGINAL, SIDE_ORIGINAL, HOLDS_ORIGINAL), GAZING_ORIGINALS, SIDE_ORIGINAL)
    logits = decoder_forward(learner.model, features, places, ids, notes)
    loss, shares = answers(logits, batch, stage)
    if stage.patch_weight > 0:
        labels = torch.as_tensor(batch["labels"])
        patch, seen = patch_loss(learner.heads["patch"](whole), labels, 0.0)
        placed = place_loss(learner.heads["place"](whole), torch.as_tensor(batch["places"]))
        loss = loss + stage.patch_weight * (patch + 3 * placed)
        shares |= {"patch_loss": patch.item(), "place_loss": placed.item()}
        shares["patch_shape"] = seen["shape"]
    if stage.smooth_tally:
        near, middle = (
            torch.as_tensor(batch[k]).repeat_interleave(stage.batch.views, 0).gather(1, places)
            for k in ("near", "middle")
        )
        tallied: tuple[Tensor, Tensor | None] = near, middle
    else:
        cores = torch.as_tensor(batch["cores"]).repeat_interleave(stage.batch.views, 0)
        tallied = cores.gather(1, places), None
    auxiliary = noun_losses(learner, batch, stage, notes, owners.gather(1, places), tallied)
    for name, (share, extra) in auxiliary.items():
        loss = loss + share * extra
        shares[name] = extra.item()
    return loss, shares


def answers(logits: Tensor, batch: Batch, stage: Stage) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of the answers, and the accuracy of each task."""
    targets, task = torch.as_tensor(batch["targets"]), torch.as_tensor(batch["task"])
    weight = torch.tensor([stage.task_weight.get(t, 1.0) for t in TASKS])[task.clamp(min=0)]
    loss = answer_loss(logits, targets, weight)
    shares = {"answer_loss": loss.item()}
    right = answered(logits, targets)
    for k, name in enumerate(TASKS):
        asked = task == k
        if asked.any():
            shares[name] = right[asked].float().mean().item()
    return loss, shares


def noun_losses(
    learner: Learner,
    batch: Batch,
    stage: Stage,
    notes: Notes,
    owners: Tensor,
    tallied: tuple[Tensor, Tensor | None],
) -> dict[str, tuple[float, Tensor]]:
    """Return the weight and the value of each auxiliary loss on nouns.

    `owners` and `tallied` (the cores and shares of `tally_loss`) are those of the visual tokens.
    """
    found: dict[str, tuple[float, Tensor]] = {}
    heads = learner.heads
    if stage.noun_weight > 0:
        labels = torch.as_tensor(batch["nouns"])
        told = (labels != IGNORE).any(-1)
        extra = field_loss(heads["noun"](notes.states[0][told]), labels[told], NOUN_FIELDS)
        found["noun_loss"] = (stage.noun_weight, extra)
    if stage.gaze_weight > 0:
        wanted = torch.as_tensor(batch["gaze"]).flatten(1, 2)  # (rows, questions * length, 2)
        for k, gaze in enumerate(notes.gazes):
            extra = gaze_loss(gaze, wanted[..., k].gather(1, notes.order), owners)
            found[f"gaze_loss_{k}"] = (stage.gaze_weight, extra)
    if stage.side_weight > 0:
        # "sides" holds the labels of two heads, which read different layers.
        sides, holds = torch.as_tensor(batch["sides"]).split((len(SIDE_FIELDS), 1), dim=-1)
        told = (sides != IGNORE).any(-1)
        extra = field_loss(heads["side"](notes.states[1][told]), sides[told], SIDE_FIELDS)
        found["side_loss"] = (stage.side_weight, extra)
        extra = field_loss(heads["holds"](notes.states[2][told]), holds[told], HOLDS_FIELDS)
        found["holds_loss"] = (stage.side_weight, extra)
        back = torch.as_tensor(batch["back"]).flatten(1).gather(1, notes.order)
        found["back_loss"] = (0.3 * stage.side_weight, back_loss(notes.backward, back))
    if stage.tally_weight > 0:
        told = (torch.as_tensor(batch["nouns"]) != IGNORE).any(-1).flatten(1)
        named = torch.as_tensor(batch["gaze"])[..., 0].flatten(1) & ((1 << MAX_OBJECTS) - 1)
        named, told = named.gather(1, notes.order), told.gather(1, notes.order)
        found["tally_loss"] = (stage.tally_weight, tally_loss(notes.tally, named, told, *tallied))
    return found


@torch.compile(dynamic=False)
def _compiled_tower(
    model: LlavaForConditionalGeneration, pixel_values: Tensor, order: Tensor | None
) -> Tensor:
    return tower_forward(model, pixel_values, order)
