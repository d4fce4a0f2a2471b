"""Trains the built-in model from nothing: `python -m atp_patch.builtin.train --work FOLDER`.

Stages: the tower alone on patch labels; a shallow decoder on a quarter of the visual tokens;
the same on all of them; then 32 layers. A killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from atp_patch.builtin.architecture import (
    GAZING_ORIGINALS,
    ORIGINALS,
    PROBED_ORIGINAL,
    build,
    grow,
    recentre,
)
from atp_patch.builtin.batches import Batch, batches, make_batch
from atp_patch.builtin.forward import (
    Notes,
    decoder_forward,
    to_pixel_values,
    tower_forward,
    window_order,
)
from atp_patch.builtin.labels import IGNORE, NOTHING, NOUN_FIELDS, PATCH_FIELDS
from atp_patch.builtin.losses import (
    answer_loss,
    answered,
    gaze_loss,
    noun_loss,
    patch_loss,
    place_loss,
)
from atp_patch.builtin.optim import Muon
from atp_patch.builtin.scenes import GRID
from atp_patch.builtin.stages import STAGES, Stage
from atp_patch.builtin.vocabulary import TASKS

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@dataclass
class Learner:
    """All that training changes: the model, the throw-away heads, the optimizers."""

    model: LlavaForConditionalGeneration
    heads: nn.ModuleDict
    optimizers: list[torch.optim.Optimizer]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        for n, optimizer in enumerate(self.optimizers):
            for k, state in optimizer.state_dict()["state"].items():
                found |= {f"optimizer.{n}.{k}.{name}": v for name, v in state.items()}
        return found


def make_heads() -> nn.ModuleDict:
    """Linear read-outs of the auxiliary losses; they do not ship."""
    width = 128
    return nn.ModuleDict(
        {
            "patch": nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, sum(PATCH_FIELDS.values()))
            ),
            "place": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4)),
            "noun": nn.Sequential(nn.RMSNorm(width), nn.Linear(width, sum(NOUN_FIELDS.values()))),
        }
    )


def make_optimizers(
    model: LlavaForConditionalGeneration, heads: nn.ModuleDict, stage: Stage
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers and projector, Adam for the rest; the tower by its share."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in [*model.named_parameters(), *heads.named_parameters()]:
        in_tower = "vision_tower" in name
        if "post_layernorm" in name or (in_tower and stage.tower_rate == 0):
            continue
        if stage.kind == "tower" and not in_tower and name in dict(model.named_parameters()):
            continue
        is_matrix = p.dim() == 2 and ("layers." in name or "projector" in name)
        groups.setdefault((is_matrix, in_tower), []).append(p)
    muon: list[dict[str, object]] = []
    adam: list[dict[str, object]] = []
    for (is_matrix, in_tower), params in groups.items():
        share = stage.tower_rate if in_tower else 1.0
        rate = (stage.muon_rate if is_matrix else stage.adam_rate) * share
        (muon if is_matrix else adam).append({"params": params, "lr": rate, "top_lr": rate})
    return [
        Muon(muon, weight_decay=stage.weight_decay),
        torch.optim.Adam(adam, betas=(0.9, 0.98), eps=1e-8),
    ]


def rate_share(step: int, stage: Stage) -> float:
    """Share of the full learning rate: linear warm-up, level, linear decay to a twentieth."""
    rise = min(1.0, (step + 1) / stage.warm_up)
    fall = min(1.0, (stage.steps - step) / max(1, stage.decay))
    return rise * max(fall, 0.05)


def visible_places(stage: Stage, step: int, owners: Tensor) -> Tensor:
    """Raster indices of the patches that the decoder is shown, ascending, (rows, visual).

    Args:
        owners: (rows, 576) what each patch shows.
    """
    grid = torch.arange(GRID * GRID).reshape(GRID, GRID)
    if stage.visual_tokens == GRID * GRID:
        return grid.reshape(1, -1)
    generator = torch.Generator().manual_seed(step)
    row, column = torch.randint(2, (2,), generator=generator).tolist()
    subset = grid[row::2, column::2].reshape(-1)
    # Of the patches that show nothing only so many as are needed to fill up.
    rank = torch.rand(owners.shape[0], len(subset), generator=generator)
    rank += (owners[:, subset] == NOTHING).float()
    chosen = rank.argsort(dim=1)[:, : stage.visual_tokens].sort(dim=1).values
    return subset[chosen]


def load_checkpoint(path: Path, learner: Learner, with_optimizers: bool) -> int:
    """Load what `save_checkpoint` wrote; returns the number of steps done."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        stored = {name: file.get_tensor(name) for name in names}
        step = int(file.metadata()["step"])
    for part, module in (("model.", learner.model), ("heads.", learner.heads)):
        values = {k[len(part) :]: v for k, v in stored.items() if k.startswith(part)}
        # A stage may have a head that the stage before had not.
        module.load_state_dict(values, strict=part == "model.")
    if with_optimizers:
        for n, optimizer in enumerate(learner.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in stored.items():
                if name.startswith(f"optimizer.{n}."):
                    _, _, k, key = name.split(".", 3)
                    state.setdefault(int(k), {})[key] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step


def steps_done(path: Path) -> int:
    """Number of steps after which a checkpoint was written."""
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def save_checkpoint(path: Path, learner: Learner, step: int) -> None:
    """Write beside, then rename: a killed run leaves the old checkpoint whole."""
    partial = path.with_suffix(".partial")
    tensors = {k: v.contiguous() for k, v in learner.tensors().items()}
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.rename(path)


def tower_loss(
    learner: Learner, batch: Batch, stage: Stage, step: int, compiled: bool
) -> tuple[Tensor, dict[str, float]]:
    """Loss and accuracies by patch field."""
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
    """Loss and accuracies by task."""
    owners = torch.as_tensor(batch["owners"]).repeat_interleave(stage.batch.views, 0)
    places = visible_places(stage, step, owners)
    run = _compiled_tower if compiled else tower_forward
    with torch.set_grad_enabled(stage.tower_rate > 0):
        features = run(learner.model, to_pixel_values(batch["pixels"]), None)
    whole = features
    features = features.repeat_interleave(stage.batch.views, 0)
    places = places.expand(len(features), -1)
    features = features.gather(1, places[..., None].expand(-1, -1, features.shape[-1]))
    ids, targets = torch.as_tensor(batch["ids"]), torch.as_tensor(batch["targets"])
    task = torch.as_tensor(batch["task"])
    at = ORIGINALS if stage.kind == "deep" else range(len(ORIGINALS))
    notes = Notes(at[PROBED_ORIGINAL], tuple(at[k] for k in GAZING_ORIGINALS))
    logits = decoder_forward(learner.model, features, places, ids, notes)
    weight = torch.tensor([stage.task_weight.get(t, 1.0) for t in TASKS])[task.clamp(min=0)]
    loss = answer_loss(logits, targets, weight)
    shares = {"answer_loss": loss.item()}
    if stage.patch_weight > 0:
        labels = torch.as_tensor(batch["labels"])
        patch, seen = patch_loss(learner.heads["patch"](whole), labels, 0.0)
        placed = place_loss(learner.heads["place"](whole), torch.as_tensor(batch["places"]))
        loss = loss + stage.patch_weight * (patch + 3 * placed)
        shares |= {"patch_loss": patch.item(), "place_loss": placed.item()}
        shares["patch_shape"] = seen["shape"]
    if stage.noun_weight > 0:
        nouns = torch.as_tensor(batch["nouns"])
        here = (nouns != IGNORE).any(-1)
        extra = noun_loss(learner.heads["noun"](notes.states[here]), nouns[here])
        loss = loss + stage.noun_weight * extra
        shares["noun_loss"] = extra.item()
    if stage.gaze_weight > 0:
        wanted = torch.as_tensor(batch["gaze"]).flatten(1, 2)  # (rows, questions * length, 2)
        shown = owners.gather(1, places)
        for k, gaze in enumerate(notes.gazes):
            extra = gaze_loss(gaze, wanted[..., k].gather(1, notes.order), shown)
            loss = loss + stage.gaze_weight * extra
            shares[f"gaze_loss_{k}"] = extra.item()
    right = answered(logits, targets)
    for k, name in enumerate(TASKS):
        asked = task == k
        if asked.any():
            shares[name] = right[asked].float().mean().item()
    return loss, shares


@torch.compile(dynamic=False)
def _compiled_tower(
    model: LlavaForConditionalGeneration, pixel_values: Tensor, order: Tensor | None
) -> Tensor:
    return tower_forward(model, pixel_values, order)


def run_stage(
    learner: Learner, stage: Stage, path: Path, compiled: bool, log_every: int = 20
) -> None:
    """Train one stage, from its checkpoint at `path` if there is one."""
    step = load_checkpoint(path, learner, with_optimizers=True) if path.exists() else 0
    compute = tower_loss if stage.kind == "tower" else decoder_loss
    start = saved = time.monotonic()
    sums: dict[str, list[float]] = {}
    for batch in batches(stage.batch, step, stage.steps):
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top_lr"] * rate_share(step, stage)
        loss, shares = compute(learner, batch, stage, step, compiled)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.model.parameters(), 5.0)
        for optimizer in learner.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        for name, value in ({"loss": loss.item()} | shares).items():
            if value == value:
                sums.setdefault(name, []).append(value)
        if step % log_every == 0 or step == stage.steps:
            row: dict[str, object] = {"stage": stage.name, "step": step}
            row["seconds"] = round(time.monotonic() - start, 1)
            row |= {name: round(_mean(values), 4) for name, values in sums.items()}
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            sums = {}
        if time.monotonic() - saved > 120 or step == stage.steps:
            save_checkpoint(path, learner, step)
            saved = time.monotonic()


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items)


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are not done yet and write the shipped folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--until", default=STAGES[-1].name, help="last stage to run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, heads = build(len(ORIGINALS)), make_heads()
    before: Path | None = None
    for number, stage in enumerate(STAGES):
        torch.manual_seed(1 + number)
        path = options.work / f"{number}-{stage.name}.safetensors"
        if path.exists() and steps_done(path) >= stage.steps and stage.name != options.until:
            before = path
            continue
        learner = Learner(model, heads, [])
        if before is not None:
            load_checkpoint(before, learner, with_optimizers=False)
        if stage.kind == "deep" and len(model.model.language_model.layers) == len(ORIGINALS):
            model = grow(model)
        if stage.recentre and not path.exists():
            pixels = make_batch(replace(stage.batch, images=16), 0)["pixels"]
            recentre(model, tower_forward(model, to_pixel_values(pixels)))
        learner = Learner(model, heads, make_optimizers(model, heads, stage))
        run_stage(learner, stage, path, not options.no_compile)
        before = path
        if stage.name == options.until:
            break


if __name__ == "__main__":
    main()
