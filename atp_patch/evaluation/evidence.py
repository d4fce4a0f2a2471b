"""How many visual tokens a question needs, and how many of these a pruned model keeps.

The generator of documents knows which parts of a picture answer a question. The visual tokens that
show them are its evidence. Their share of all visual tokens is an oracle budget: no method can
answer from less and be sure. The recall of a method is the share of these tokens that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atp_patch.builtin.documents import KINDS, DocumentQuestion
from atp_patch.contract.errors import ConfigError, InputError
from atp_patch.evaluation.documents import document_image, document_question
from atp_patch.evaluation.prepare import collate
from atp_patch.evaluation.runner import Bench, prepared
from atp_patch.evaluation.settings import Setting, applied
from atp_patch.evaluation.tasks import Example, Task
from atp_patch.patching.api import last_trace
from atp_patch.patching.trace import PruningTrace

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Need:
    """What one question needs.

    Attributes:
        task: name of the task.
        needed: number of visual tokens that show evidence.
        tokens: number of visual tokens of the picture.
    """

    task: str
    needed: int
    tokens: int

    @property
    def share(self) -> float:
        """The oracle budget, a share of the visual tokens."""
        return self.needed / self.tokens


@dataclass(frozen=True)
class Recall:
    """How much of the evidence enters a decoder layer.

    Attributes:
        setting: the method with its options and budget.
        task: name of the task.
        layer: number of the decoder layer.
        tokens: number of visual tokens that enter it, as a share of all.
        recall: share of the evidence tokens among them.
    """

    setting: Setting
    task: str
    layer: int
    tokens: float
    recall: float


def evidence_mask(
    question: DocumentQuestion, size_px: tuple[int, int], rows: int, columns: int
) -> NDArray[np.bool_]:
    """Return (rows, columns) bool, true at the visual tokens that show evidence.

    The grid covers the whole picture evenly, as it does where a model resizes pictures; it does not
    where a model crops or pads them.

    Args:
        question: the question.
        size_px: (width, height) of the picture as the generator drew it.
        rows, columns: size of the grid of visual tokens.
    """
    mask = np.zeros((rows, columns), dtype=bool)
    width, height = size_px
    for box in question.evidence:
        top, left = max(box.top, 0) * rows // height, max(box.left, 0) * columns // width
        bottom, right = -(-box.bottom * rows // height), -(-box.right * columns // width)
        mask[top:bottom, left:right] = True
    return mask


def needs(
    tasks: Sequence[Task],
    split: str,
    questions: int,
    token_px: int,
    advance: Callable[[int], object] = lambda questions: None,
) -> list[Need]:
    """Measure what the first questions of each task need.

    Args:
        tasks: tasks about documents.
        split: split of the documents.
        questions: number of questions of each task.
        token_px: side of the square that one visual token shows.
        advance: is called with the number of questions that were drawn since the call before.

    Raises:
        ConfigError: if a task is not about documents, or has too few questions.
    """
    found = []
    for task in tasks:
        for example in task.examples(split, questions):
            question = _question_of(example, split)
            image = document_image(_kind_of(example), split, example.number)
            rows, columns = (-(-side // token_px) for side in (image.height, image.width))
            needed = question.evidence_tokens(image.width, image.height, token_px)
            found.append(Need(example.task, len(needed), rows * columns))
            advance(1)
    return found


def spread(found: Sequence[Need]) -> dict[str, tuple[float, ...]]:
    """Return the QUANTILES of the oracle budget of each task, and of all questions under "all"."""
    tasks = dict.fromkeys(need.task for need in found)
    shares = {task: [need.share for need in found if need.task == task] for task in tasks}
    shares["all"] = [need.share for need in found]
    return {name: tuple(np.quantile(given, QUANTILES).tolist()) for name, given in shares.items()}


def kept_evidence(
    trace: PruningTrace, masks: Sequence[NDArray[np.bool_]]
) -> dict[int, list[tuple[float, float]]]:
    """Compute for each pruning layer and sample the shares of all tokens and of evidence kept.

    A token that a method merges into another one counts as dropped.

    Args:
        trace: of a forward pass with one image in each sample.
        masks: for each sample, (rows, columns) bool, its evidence.

    Raises:
        InputError: if a sample has not exactly one image, of the mask's size.
    """
    found: dict[int, list[tuple[float, float]]] = {layer: [] for layer in trace.layers}
    for sample, (grids, mask) in enumerate(zip(trace.grids, masks, strict=True)):
        if [(grid.frames, grid.height, grid.width) for grid in grids] != [(1, *mask.shape)]:
            raise InputError(
                f"sample {sample}: evidence is known for one image of {mask.shape[0]} rows and "
                f"{mask.shape[1]} columns, and its images are {list(grids)}."
            )
        position, _, row, column = grids[0].coordinates()
        needed = torch.from_numpy(mask)[row, column]
        for layer, layer_trace in trace.layers.items():
            kept = layer_trace.kept[sample].cpu()[position]
            share = kept[needed].float().mean().item() if needed.any() else 1.0
            found[layer].append((kept.float().mean().item(), share))
    return found


def recalls(
    bench: Bench,
    settings: Iterable[Setting],
    tasks: Sequence[Task],
    split: str,
    questions: int,
    advance: Callable[[int], object] = lambda passes: None,
) -> Iterator[Recall]:
    """Measure the recall of every setting on the first questions of each task.

    Args:
        bench: the model.
        settings: methods with budgets; the references are not among them.
        tasks: tasks about documents.
        split: split of the documents.
        questions: number of questions of each task.
        advance: is called with the number of passes that have ended since the call before.

    Raises:
        ConfigError: if a task is not about documents, or has too few questions.
        InputError: if the model shows a picture as several images.
    """
    chosen = list(settings)
    for task in tasks:
        for example in task.examples(split, questions):
            question, kind = _question_of(example, split), _kind_of(example)
            size_px = document_image(kind, split, example.number).size
            sample = prepared(bench, task, split, example)
            inputs = collate([sample], bench.pad_id, False, bench.flat_positions).inputs
            for setting in chosen:
                with applied(bench.model, setting, sample.visual_tokens):
                    trace = _pass(bench.model, inputs)
                    grid = trace.grids[0][0]
                    mask = evidence_mask(question, size_px, grid.height, grid.width)
                    for layer, ((tokens, recall),) in kept_evidence(trace, [mask]).items():
                        yield Recall(setting, example.task, layer, tokens, recall)
                advance(1)


@torch.inference_mode()
def _pass(model: Any, inputs: dict[str, Any]) -> PruningTrace:
    model(**inputs, use_cache=False)
    return last_trace(model)


def _kind_of(example: Example) -> str:
    return example.task.partition("/")[0]


def _question_of(example: Example, split: str) -> DocumentQuestion:
    kind, _, task = example.task.partition("/")
    question = document_question(kind, task, split, example.number) if kind in KINDS else None
    if question is None:
        raise ConfigError(f"{example.task}: evidence is known for tasks about documents alone.")
    return question
