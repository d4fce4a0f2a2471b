"""Trains the decoder's low-rank additions, and the tower and projector with them:
`python -m workshop.smol.train_decoder --work FOLDER --base FOLDER --tower FILE`.

Without `--tower` the decoder is shown ideal visual tokens, which are made from its own embeddings
of what stands in the picture. So it learns to read a page of them while the tower learns to see.
The learning rate is constant after its warm-up, and a training goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from atp_patch.builtin.scenes import PATCH_PX
from workshop.batches import Batch
from workshop.labels import IGNORE
from workshop.smol.low_rank import add_low_rank
from workshop.smol.masters import Masters, cast_parameters
from workshop.smol.pieces import Pieces, by_token, ideal_tokens
from workshop.smol.rows import RowSpec, image_ids, make_row, packed_mask, task_names
from workshop.smol.tower import (
    MERGE,
    build_projector,
    build_tower,
    projector_forward,
    tower_forward,
)
from workshop.smol.train_tower import model_config
from workshop.smol.windows import made_ahead, pieces_of

ADAM_RATE, MUON_RATE, WARM_UP = 0.001, 0.002, 30
ROWS_A_STEP = 4
_TALLY_STEPS, _SAVE_S = 5, 240.0


class Reader(nn.Module):
    """The decoder with its additions, and the tower and projector, if it has them.

    Args:
        base: folder of the decoder.
        seeing: whether it has a tower.
    """

    def __init__(self, base: Path, seeing: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, attn_implementation="eager"
        ).requires_grad_(False)
        add_low_rank(self.decoder.model)
        if seeing:
            self.tower = build_tower()
            self.projector = build_projector(model_config(base))
        cast_parameters(self, torch.bfloat16)

    def tokens(self, row: Batch, pieces: Pieces) -> Tensor:
        """(1, tokens, hidden): the visual tokens of a row's picture."""
        height, width = row["pixels"].shape[:2]
        rows, columns = height // PATCH_PX, width // PATCH_PX
        if not hasattr(self, "tower"):
            shown = by_token(torch.as_tensor(row["pieces"])[None], rows, columns)
            table = self.decoder.model.embed_tokens.weight[torch.tensor(pieces.ids)]
            return ideal_tokens(shown, table, pieces.space).to(table.dtype)
        pixels = torch.as_tensor(row["pixels"]).permute(2, 0, 1)[None]
        features = tower_forward(
            self.tower, pixels.to(self.tower.patch_conv.weight.dtype) / 127.5 - 1.0
        )
        return projector_forward(self.projector, features, rows, columns)

    def forward(self, row: Batch, pieces: Pieces) -> Tensor:
        """(answer tokens, vocabulary): logits where a row's answers are."""
        height, width = row["pixels"].shape[:2]
        rows, columns = (side // (PATCH_PX * MERGE) for side in (height, width))
        before = torch.tensor(image_ids(pieces.tokenizer, rows, columns))
        ids = torch.cat([before, torch.as_tensor(row["ids"])])
        model = self.decoder.model
        embedded = model.embed_tokens(ids)
        tokens = self.tokens(row, pieces)[0]
        is_visual = ids == pieces.image_pad
        embedded = embedded.index_put((is_visual.nonzero()[:, 0],), tokens.to(embedded.dtype))
        places = torch.cat([torch.arange(len(before)), len(before) + torch.as_tensor(row["place"])])
        sees = packed_mask(len(before), row["question"])
        mask = torch.zeros(sees.shape, dtype=embedded.dtype)
        mask.masked_fill_(~sees, torch.finfo(embedded.dtype).min)
        states = model(
            inputs_embeds=embedded[None],
            attention_mask=mask,
            position_ids=places[None],
            use_cache=False,
        ).last_hidden_state[0, len(before) :]
        logits: Tensor = self.decoder.lm_head(states[torch.as_tensor(row["targets"]) != IGNORE])
        return logits


@dataclass
class Tally:
    """Right answers by task.

    Attributes:
        right, asked: (tasks,) numbers of right answers and of questions.
    """

    right: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    asked: np.ndarray[tuple[int, ...], np.dtype[np.int64]]

    @classmethod
    def empty(cls) -> Tally:
        """Make one without questions."""
        tasks = len(task_names())
        return cls(np.zeros(tasks, dtype=np.int64), np.zeros(tasks, dtype=np.int64))

    def add(self, row: Batch, logits: Tensor) -> None:
        """Add a row; an answer is right if all its tokens are the most likely ones."""
        told = row["targets"] != IGNORE
        hits = logits.argmax(-1).numpy() == row["targets"][told]
        of = row["question"][told]
        for number, task in enumerate(row["task"]):
            self.asked[task] += 1
            self.right[task] += bool(hits[of == number].all())

    def shares(self) -> dict[str, float]:
        """Return the share of right answers by task, and the mean over tasks."""
        shares = {
            name: round(float(self.right[k] / self.asked[k]), 4)
            for k, name in enumerate(task_names())
            if self.asked[k]
        }
        return {"mean": round(sum(shares.values()) / len(shares), 4)} | shares


def row_loss(reader: Reader, row: Batch, pieces: Pieces, tally: Tally) -> Tensor:
    """Return the mean loss of a row's answer tokens."""
    logits = reader(row, pieces)
    tally.add(row, logits.detach())
    targets = torch.as_tensor(row["targets"])
    return functional.cross_entropy(logits.float(), targets[targets != IGNORE])


def start(base: Path, tower: Path | None, seeing: bool) -> tuple[Reader, Masters]:
    """Make a reader and its optimizers.

    Args:
        base: folder of the decoder.
        tower: a checkpoint of the tower's training to start from, or None.
        seeing: whether the reader has a tower.
    """
    reader = Reader(base, seeing)
    matrices = [
        name
        for name, p in reader.named_parameters()
        if p.requires_grad
        and p.ndim == 2
        and name.startswith(("tower.", "projector."))
        and "patch_conv" not in name
    ]
    masters = Masters(reader, matrices, MUON_RATE, ADAM_RATE, {"tower.": 0.5}, clip=1.0)
    if tower is not None:
        with safe_open(tower, "pt") as file:
            names = [n for n in list(file.keys()) if n.startswith(("tower.", "projector."))]
            masters.load({name: file.get_tensor(name) for name in names})
    return reader, masters


@torch.inference_mode()
def examine(reader: Reader, spec: RowSpec, rows: int, pieces: Pieces) -> dict[str, float]:
    """Return the accuracies on the first rows of a split that is not trained on."""
    tally, losses = Tally.empty(), []
    for number in range(rows):
        losses.append(row_loss(reader, make_row(spec, number), pieces, tally).item())
    return {"loss": round(sum(losses) / rows, 4)} | tally.shares()


def _write(row: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> None:
    """Train until the last step, or until the process is stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="folder of the decoder")
    parser.add_argument("--tower", type=Path, help="a checkpoint of the tower's training")
    parser.add_argument("--additions", type=Path, help="a checkpoint whose additions to start from")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--decay", type=int, default=0, help="end after this many falling steps")
    parser.add_argument("--examine", type=int, default=0, help="only measure, on so many rows")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    pieces = pieces_of(options.base)
    reader, masters = start(options.base, options.tower, options.tower is not None)
    path, step = options.work / "reader.safetensors", 0
    for source in (options.additions, path):
        if source is not None and source.exists():
            with safe_open(source, "pt") as file:
                masters.load({name: file.get_tensor(name) for name in list(file.keys())})
                step = int(file.metadata()["step"]) if source == path else 0
    spec = RowSpec(options.base)
    if options.examine:
        held = replace(spec, split="development", offset=0)
        _write({"step": step, **examine(reader, held, options.examine, pieces)})
        return
    stop = step + options.decay if options.decay else options.steps
    started = saved = time.monotonic()
    cpu, tally, losses = time.process_time(), Tally.empty(), list[float]()
    rows: Iterator[Batch] = made_ahead(make_row, spec, step * ROWS_A_STEP, stop * ROWS_A_STEP)
    while step < stop:
        for _ in range(ROWS_A_STEP):
            loss = row_loss(reader, next(rows), pieces, tally)
            (loss / ROWS_A_STEP).backward()
            losses.append(loss.item())
        share = (stop - step) / options.decay if options.decay else 1.0
        masters.step(min(share, (step + 1) / WARM_UP))
        step += 1
        if step % _TALLY_STEPS == 0:
            row: dict[str, object] = {"step": step, "seconds": round(time.monotonic() - started, 1)}
            row |= {"cpu_s": round(time.process_time() - cpu, 1)}
            row |= {"loss": round(sum(losses) / len(losses), 4)} | tally.shares()
            _write(row)
            tally, losses = Tally.empty(), []
        if time.monotonic() - saved > _SAVE_S or step == stop:
            partial = path.with_suffix(".partial")
            save_file(masters.tensors(), partial, metadata={"step": str(step)})
            partial.replace(path)
            saved = time.monotonic()


if __name__ == "__main__":
    main()
