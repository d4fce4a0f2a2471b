"""Everything that training changes, and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workshop.labels import HOLDS_FIELDS, NOUN_FIELDS, PATCH_FIELDS, SIDE_FIELDS
from workshop.optim import Muon
from workshop.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_OF_LAYERS = ("layers.", "blocks.", "projector", "merger")


@dataclass
class Learner:
    """Everything that training changes.

    Attributes:
        model: the model.
        heads: heads of the auxiliary losses, which are not part of the model.
        optimizers: the optimizers.
    """

    model: PreTrainedModel
    heads: nn.ModuleDict
    optimizers: list[torch.optim.Optimizer]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint by name."""
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        for n, optimizer in enumerate(self.optimizers):
            for k, state in optimizer.state_dict()["state"].items():
                found |= {f"optimizer.{n}.{k}.{name}": v for name, v in state.items()}
        return found


def make_heads() -> nn.ModuleDict:
    """Make the heads of the auxiliary losses, which are not part of the built-in model."""
    width = 128
    return nn.ModuleDict(
        {
            "patch": nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, sum(PATCH_FIELDS.values()))
            ),
            "place": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4)),
            "noun": nn.Sequential(nn.RMSNorm(width), nn.Linear(width, sum(NOUN_FIELDS.values()))),
            "side": nn.Sequential(nn.RMSNorm(width), nn.Linear(width, sum(SIDE_FIELDS.values()))),
            "holds": nn.Sequential(nn.RMSNorm(width), nn.Linear(width, sum(HOLDS_FIELDS.values()))),
        }
    )


def make_optimizers(
    model: PreTrainedModel, heads: nn.ModuleDict, stage: Stage
) -> list[torch.optim.Optimizer]:
    """Make Muon for matrices of layers and projector, and Adam for other parameters.

    The tower's learning rates are multiplied by `stage.tower_rate`.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in [*model.named_parameters(), *heads.named_parameters()]:
        in_tower = "vision_tower" in name or name.startswith(("model.visual.b", "model.visual.p"))
        if "post_layernorm" in name or (in_tower and stage.tower_rate == 0):
            continue
        if stage.kind == "tower" and not in_tower and name in dict(model.named_parameters()):
            continue
        if stage.kind == "distil" and not name.startswith("model.visual."):
            continue
        is_matrix = p.dim() == 2 and any(part in name for part in _OF_LAYERS)
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
    """Return the factor of the learning rate: linear warm-up, 1, linear decay to a twentieth."""
    rise = min(1.0, (step + 1) / stage.warm_up)
    fall = min(1.0, (stage.steps - step) / max(1, stage.decay))
    return rise * max(fall, 0.05)


def load_checkpoint(path: Path, learner: Learner, with_optimizers: bool) -> int:
    """Load what `save_checkpoint` wrote, and return the number of steps done."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        stored = {name: file.get_tensor(name) for name in names}
        step = int(file.metadata()["step"])
    for part, module in (("model.", learner.model), ("heads.", learner.heads)):
        values = {k[len(part) :]: v for k, v in stored.items() if k.startswith(part)}
        if part == "heads.":
            # A stage may have a head that the previous stage did not have, or one with more
            # classes.
            shapes = {k: v.shape for k, v in module.state_dict().items()}
            values = {k: v for k, v in values.items() if shapes.get(k) == v.shape}
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
    """Return the number of steps after which a checkpoint was written."""
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def save_checkpoint(path: Path, learner: Learner, step: int) -> None:
    """Write a checkpoint to a new file and rename it, so that a killed run keeps the old one."""
    partial = path.with_suffix(".partial")
    tensors = {k: v.contiguous() for k, v in learner.tensors().items()}
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.rename(path)
