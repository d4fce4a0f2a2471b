"""The tasks about generated documents: pages, tables, charts, maps and icons.

They need a model that reads ordinary words. The groups are the kinds of documents, and the tasks
are called ``kind/task``, such as ``page/title``.
"""

from __future__ import annotations

from functools import lru_cache, partial

from PIL import Image

from atp_patch.builtin import SPLITS
from atp_patch.builtin.documents import KINDS, Document, DocumentQuestion, make_document
from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation import scenes  # noqa: F401  (its tasks come first, whoever imports this)
from atp_patch.evaluation.tasks import (
    Example,
    Task,
    exact_match,
    loose_match,
    register_task,
    words_match,
)

_DOCUMENTS_TO_TRY = 60  # documents that are looked at for each question that is wanted


@lru_cache(maxsize=64)
def _document(kind: str, split: str, number: int) -> Document:
    return make_document(kind, split, number)


def document_image(kind: str, split: str, number: int) -> Image.Image:
    """Return the picture of a document."""
    return _document(kind, split, number).image


def document_question(kind: str, task: str, split: str, number: int) -> DocumentQuestion | None:
    """Return the question of a task about a document, with its evidence, or None if there is
    none.
    """
    asked = (q for q in _document(kind, split, number).questions if q.task == task)
    return next(asked, None)


def document_examples(kind: str, task: str, split: str, count: int) -> list[Example]:
    """Return the first ``count`` questions of a task, in the order of their documents.

    Raises:
        ConfigError: where too few documents have such questions, or the split is unknown.
    """
    if split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}; there are {', '.join(SPLITS)}.")
    found: list[Example] = []
    for number in range(_DOCUMENTS_TO_TRY * count):
        if len(found) == count:
            break
        question = document_question(kind, task, split, number)
        if question is not None:
            found.append(Example(f"{kind}/{task}", number, question.text, question.answer))
    if len(found) < count:
        raise ConfigError(f"the generator asks too few questions of {kind}/{task}: {len(found)}.")
    return found


OPEN: tuple[str, ...] = (
    "page/read_line",
    "page/read_page",
    "table/read_row",
    "table/read_table",
    "chart/all_values",
    "icons/name_row",
    "icons/name_all",
)
"""Tasks with answers of several words, whose score is the share of right words in their order."""
_OPEN_TOKENS = 160


for _kind, _made in KINDS.items():
    for _task in _made.tasks:
        _is_open = f"{_kind}/{_task}" in OPEN
        register_task(
            Task(
                name=f"{_kind}/{_task}",
                group=_kind,
                examples=partial(document_examples, _kind, _task),
                image=partial(document_image, _kind),
                score=words_match if _is_open else exact_match,
                loose=words_match if _is_open else loose_match,
                exact=not _is_open,
                reads=True,
                new_tokens=_OPEN_TOKENS if _is_open else 16,
            )
        )
