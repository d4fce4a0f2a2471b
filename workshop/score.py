"""A built-in model's accuracy by task: `python -m workshop.score --split test --questions 500`.

A question is answered correctly if each token of the correct answer and the closing `</s>` is the
likeliest one after the correct tokens before it. This is exactly the case if greedy generation
gives the answer. One pass answers all questions about an image.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from atp_patch.builtin.dynamic.sizes import TOKEN_PX, at_size, scene_size
from atp_patch.builtin.scenes import GRID, SceneConfig, make_scene
from atp_patch.builtin.silent import shallow
from atp_patch.builtin.vocabulary import TASKS
from workshop.batches import BatchSpec, make_batch
from workshop.dynamic import forward as dynamic
from workshop.forward import decoder_forward, to_pixel_values, tower_forward
from workshop.labels import IGNORE
from workshop.losses import answered

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import Qwen3VLForConditionalGeneration


@dataclass(frozen=True)
class TaskScore:
    """The number of right answers among `asked` questions of a task."""

    task: str
    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0-1."""
        return self.right / self.asked

    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of the accuracy."""
        z, n, p = 1.96, self.asked, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return middle - half, middle + half


@torch.no_grad()
def score(
    model: LlavaForConditionalGeneration | Qwen3VLForConditionalGeneration,
    split: str,
    questions: int,
    first_scene: int = 0,
    images_per_batch: int = 8,
    second_turn: bool = False,
) -> list[TaskScore]:
    """Return the accuracy by task on the first scenes of a split.

    Scenes are read until every task has `questions` questions; further ones are left out. Each
    scene has at most one question of each task.

    Args:
        model: a built-in model.
        split: "train", "development" or "test".
        questions: number of questions of each task.
        first_scene: index of the first scene.
        images_per_batch: number of images in a batch.
        second_turn: whether to score questions that follow another one and its correct answer.

    Raises:
        ValueError: if `questions` is not positive.
    """
    if questions < 1:
        raise ValueError(f"need at least one question a task, got {questions}")
    spec = BatchSpec(
        images_per_batch,
        tasks=TASKS,
        split=split,
        offset=first_scene,
        pair_share=1.0 if second_turn else 0.0,
        first_counts=False,
    )
    right = dict.fromkeys(TASKS, 0)
    asked = dict.fromkeys(TASKS, 0)
    number = 0
    while min(asked.values()) < questions:
        batch = make_batch(spec, number)
        first = first_scene + number * images_per_batch
        number += 1
        ids, targets, task = (
            torch.tensor(batch[name], device=model.device) for name in ("ids", "targets", "task")
        )
        with shallow(model):
            logits = _logits(model, batch["pixels"], ids, split, first)
        hits = answered(logits, targets)
        for k, name in enumerate(TASKS):
            alone = (targets == IGNORE).all(-1)  # there was no second question
            of_task = hits[(task == k) & ~alone][: questions - asked[name]]
            right[name] += int(of_task.sum())
            asked[name] += of_task.numel()
    return [TaskScore(name, right[name], asked[name]) for name in TASKS]


def _logits(
    model: LlavaForConditionalGeneration | Qwen3VLForConditionalGeneration,
    pixels: NDArray[np.generic],
    ids: Tensor,
    split: str,
    first: int,
) -> Tensor:
    """Compute the logits of all questions about the scenes from `first` on.

    Args:
        model: a built-in model.
        pixels: (images, 192, 192, 3) pixels of the scenes.
        ids: (images, questions, length) token ids.
        split: the split of the scenes.
        first: index of the first scene.
    """
    if isinstance(model, LlavaForConditionalGeneration):
        features = tower_forward(model, to_pixel_values(pixels, model.device))
        places = torch.arange(GRID * GRID, device=model.device)
        return decoder_forward(model, features, places, ids)
    found = []
    for row in range(len(pixels)):
        scene = make_scene(split, first + row, tasks=())
        shown = at_size(scene, scene_size(split, first + row), SceneConfig().noise).image
        values = to_pixel_values(np.asarray(shown)[None], model.device)
        rows, columns = shown.height // TOKEN_PX, shown.width // TOKEN_PX
        visual = dynamic.merged(model, dynamic.tower_forward(model, values), rows, columns)
        found.append(dynamic.decoder_forward(model, visual, rows, columns, ids[row : row + 1]))
    return torch.cat(found)


def table(scores: list[TaskScore]) -> str:
    """Return a Markdown table of the tasks' accuracies, with the mean over tasks at the end."""
    lines = ["| task | accuracy | 95 % interval | questions |", "|---|---|---|---|"]
    for s in scores:
        low, high = s.interval()
        lines.append(f"| {s.task} | {s.accuracy:.3f} | {low:.3f}-{high:.3f} | {s.asked} |")
    mean = sum(s.accuracy for s in scores) / len(scores)
    lines.append(f"| **mean over tasks** | **{mean:.3f}** | | {sum(s.asked for s in scores)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table or JSON."""
    from atp_patch.builtin import NAMES, load_builtin

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", default="test", choices=["train", "development", "test"])
    parser.add_argument("--questions", type=int, default=500, help="a task")
    parser.add_argument("--model", default="builtin", choices=list(NAMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--second-turn", action="store_true", help="questions that follow another one"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    model, _ = load_builtin(NAMES[options.model], device=options.device)
    scores = score(
        model,
        options.split,
        options.questions,
        second_turn=options.second_turn,
    )
    if options.json:
        shown = json.dumps({s.task: {"right": s.right, "asked": s.asked} for s in scores})
    else:
        shown = table(scores)
    sys.stdout.write(shown + "\n")


if __name__ == "__main__":
    main()
