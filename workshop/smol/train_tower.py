"""Trains the tower and the projector alone: `python -m workshop.smol.train_tower --work FOLDER
--base FOLDER`.

The learning rate is constant after its warm-up, so a training may be stopped at any time and be
continued from its last checkpoint. `--decay STEPS` lets the rate fall to zero in that many further
steps and ends the training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, Mistral3Config, PixtralVisionModel

from atp_patch.builtin.scenes import PATCH_PX
from workshop.batches import Batch
from workshop.smol.labels import FIELDS
from workshop.smol.masters import Masters, cast_parameters
from workshop.smol.pieces import BLANK, UNKNOWN, Pieces, by_token, ideal_tokens
from workshop.smol.tower import (
    HIDDEN,
    MERGE,
    build_projector,
    build_tower,
    layers_forward,
    projector_forward,
    turns,
    vision_config,
)
from workshop.smol.windows import WindowSpec, made_ahead, pieces_of, window_batch

MUON_RATE, ADAM_RATE, WARM_UP = 0.006, 0.0006, 100
_TALLY_STEPS, _SAVE_S = 10, 180.0
Forward = Callable[[PixtralVisionModel, Tensor, Tensor, Tensor], Tensor]


class TowerLearner(nn.Module):
    """The tower, the projector, and the heads of their losses, which are not part of the model.

    Args:
        config: the configuration of the whole model.
        embeddings: (candidates, decoder's hidden), the decoder's embeddings of the candidates.
        space: number of the candidate that stands for a token where nothing is shown.
    """

    embeddings: Tensor

    def __init__(self, config: Mistral3Config, embeddings: Tensor, space: int) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.space = space
        self.tower = build_tower()
        self.projector = build_projector(config)
        self.fields = nn.Linear(HIDDEN, sum(FIELDS.values()))
        # What each of the MERGE x MERGE patches of a visual token shows.
        self.slots = nn.Parameter(torch.eye(width).repeat(MERGE**2, 1, 1))
        self.blank = nn.Parameter(torch.zeros(width))
        self.register_buffer("embeddings", embeddings, persistent=False)
        # Logits of two different embeddings differ by about 2 at first.
        self.scale = nn.Parameter(1 / embeddings.float().square().sum(-1).mean())

    def piece_logits(self, tokens: Tensor) -> Tensor:
        """(pictures, tokens, MERGE**2, 1 + candidates): what the patches of each token show."""
        seen = torch.einsum("btd,sde->btse", tokens, self.slots) * (2 * self.scale)
        known = torch.cat([self.blank[None], self.embeddings.to(tokens)])
        return seen @ known.mT


@dataclass
class Tower:
    """A tower in training.

    Attributes:
        learner: the weights, in bfloat16 or float32.
        masters: their optimizers, with float32 copies of the weights.
        forward: `layers_forward`, perhaps compiled.
    """

    learner: TowerLearner
    masters: Masters
    forward: Forward

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a batch, and the shares of right answers."""
        learner = self.learner
        weight = learner.fields.weight
        pixels = torch.as_tensor(batch["pixels"]).permute(0, 3, 1, 2).to(weight.dtype)
        pixels = pixels / 127.5 - 1.0
        rows, columns = (side // PATCH_PX for side in pixels.shape[-2:])
        patches = functional.unfold(pixels, PATCH_PX, stride=PATCH_PX).mT.contiguous()
        features = self.forward(learner.tower, patches, *turns(learner.tower, rows, columns))
        normed = functional.rms_norm(features, features.shape[-1:])
        logits = learner.fields(normed).float().split(tuple(FIELDS.values()), dim=-1)
        total = features.new_zeros((), dtype=torch.float32)
        shares: dict[str, float] = {}
        labels = torch.as_tensor(batch["patches"])
        for number, name in enumerate(FIELDS):
            total = total + _balanced(logits[number], labels[..., number], name, shares)
        tokens = projector_forward(learner.projector, features, rows, columns)
        wanted = by_token(torch.as_tensor(batch["pieces"]), rows, columns)
        found = learner.piece_logits(tokens).float()
        total = total + 2.0 * _balanced(found, wanted, "piece", shares)
        # What the border cuts may look like anything; a token where nothing is shown counts less.
        ideal = ideal_tokens(wanted, learner.embeddings, learner.space)
        weight = torch.where((wanted > BLANK).any(-1), 1.0, 0.1) * (wanted != UNKNOWN).all(-1)
        error = (tokens.float() - ideal).square().mean(-1)
        error = (error * weight).sum() / weight.sum().clamp(min=1.0)
        error = error / learner.embeddings.float().square().mean()
        shares["distance"] = error.item()
        total = total + error
        return total, shares

    def step(self, batch: Batch, rate_share: float) -> dict[str, float]:
        """Take a step, and return the loss and the shares of right answers."""
        loss, shares = self.loss(batch)
        loss.backward()
        self.masters.step(rate_share)
        return {"loss": loss.item()} | shares


def _balanced(logits: Tensor, labels: Tensor, name: str, shares: dict[str, float]) -> Tensor:
    """Return the mean loss where something stands plus half of that where nothing does."""
    flat, wanted = logits.flatten(0, -2), labels.flatten()
    each = functional.cross_entropy(flat, wanted, ignore_index=UNKNOWN, reduction="none")
    right = flat.detach().argmax(-1) == wanted
    there, nothing = wanted > BLANK, wanted == BLANK
    total = flat.new_zeros(())
    if there.any():
        total = total + each[there].mean()
        shares[name] = right[there].float().mean().item()
    if nothing.any():
        total = total + 0.5 * each[nothing].mean()
        shares[f"no_{name}"] = right[nothing].float().mean().item()
    return total


def model_config(base: Path) -> Mistral3Config:
    """Make the configuration of the whole model from that of the decoder."""
    text = AutoConfig.from_pretrained(base)
    return Mistral3Config(
        vision_config=vision_config(),
        text_config=text,
        spatial_merge_size=MERGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def candidate_embeddings(base: Path, pieces: Pieces) -> Tensor:
    """(candidates, hidden): the decoder's embeddings of the candidates."""
    with safe_open(base / "model.safetensors", "pt") as file:
        table: Tensor = file.get_tensor("model.embed_tokens.weight")
    return table[torch.tensor(pieces.ids)].float()


def start(base: Path, pieces: Pieces, dtype: torch.dtype, compiled: bool) -> Tower:
    """Make an untrained tower with its optimizers."""
    torch.manual_seed(0)
    known = candidate_embeddings(base, pieces)
    learner = TowerLearner(model_config(base), known, pieces.space)
    cast_parameters(learner, dtype)
    muon = [
        name
        for name, p in learner.named_parameters()
        if p.ndim == 2 and ("layers." in name or name.startswith("projector."))
    ]
    masters = Masters(learner, muon, MUON_RATE, ADAM_RATE)
    forward = torch.compile(layers_forward) if compiled else layers_forward
    return Tower(learner, masters, forward)


def load(path: Path, tower: Tower) -> int:
    """Continue from a checkpoint, and return the number of steps done."""
    with safe_open(path, "pt") as file:
        tower.masters.load({name: file.get_tensor(name) for name in list(file.keys())})
        return int(file.metadata()["step"])


def save(path: Path, tower: Tower, step: int) -> None:
    """Write a checkpoint to a new file and rename it, so that a killed run keeps the old one."""
    partial = path.with_suffix(".partial")
    save_file(tower.masters.tensors(), partial, metadata={"step": str(step)})
    partial.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """Train until the last step, or until the process is stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="folder of the decoder")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--decay", type=int, default=0, help="end after this many falling steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    pieces = pieces_of(options.base)
    tower = start(options.base, pieces, torch.bfloat16, not options.no_compile)
    path = options.work / "tower.safetensors"
    begun = step = load(path, tower) if path.exists() else 0
    stop = begun + options.decay if options.decay else options.steps
    started, cpu, saved = time.monotonic(), time.process_time(), time.monotonic()
    sums: dict[str, list[float]] = {}
    for batch in made_ahead(window_batch, WindowSpec(options.base), step, stop):
        share = min(1.0, (step + 1) / WARM_UP)
        if options.decay:
            share = (stop - step) / options.decay
        for name, value in tower.step(batch, share).items():
            sums.setdefault(name, []).append(value)
        step += 1
        if step % _TALLY_STEPS == 0:
            row: dict[str, float] = {"step": step, "seconds": round(time.monotonic() - started, 1)}
            row["cpu_s"] = round(time.process_time() - cpu, 1)
            row |= {name: round(sum(v) / len(v), 4) for name, v in sums.items()}
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            sums = {}
        if time.monotonic() - saved > _SAVE_S or step == stop:
            save(path, tower, step)
            saved = time.monotonic()


if __name__ == "__main__":
    main()
