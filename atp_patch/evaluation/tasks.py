"""The registry of tasks. A task has questions with true answers, pictures and a score."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from PIL import Image

from atp_patch.contract.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        task: the task's name.
        number: number of the image within the split and group. (group, number) names the image,
            and (task, number) the question.
        question: its text.
        answer: the true answer.
    """

    task: str
    number: int
    question: str
    answer: str


def exact_match(given: str, true: str) -> float:
    """Return 1 if both texts are the same apart from blanks around them, else 0."""
    return float(given.strip() == true.strip())


def loose_match(given: str, true: str) -> float:
    """Return 1 if both texts are the same apart from case, blanks around them and a full stop at
    the end, else 0.
    """
    return exact_match(*(text.strip().rstrip(".").casefold() for text in (given, true)))


def words_match(given: str, true: str) -> float:
    """Return the share of words that both texts have in the same order, apart from case and commas.

    It is twice the number of matching words, divided by the number of words of both texts.
    """
    one, other = (text.casefold().replace(",", " ").rstrip(" .").split() for text in (given, true))
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


@dataclass(frozen=True)
class Task:
    """Questions with true answers, and how an answer is scored.

    Attributes:
        name: under which ``--tasks`` takes it.
        group: tasks of one group share their images, and means are taken over a group.
        examples: takes a split and a number, and gives so many questions, each about another image.
            A larger number gives the same questions and further ones.
        image: takes a split and an example's number, and gives its picture.
        score: takes a given and a true answer, and gives a score from 0 (wrong) to 1 (right).
        exact: whether ``score`` is 1 for the true answer alone, so that an answer need not be
            generated (see the module ``answers``).
        loose: the score for models that were not made for the task's words and may write "Red.".
        stratum: takes a split and an example's number, and gives the kind of picture by which
            results are also grouped, such as the number of objects in it; None: they are not.
        reads: whether the task needs a model that reads ordinary words, which the built-in models
            do not; the name "all" leaves such tasks out.
        new_tokens: the most tokens that an answer may need.
    """

    name: str
    group: str
    examples: Callable[[str, int], list[Example]]
    image: Callable[[str, int], Image.Image]
    score: Callable[[str, str], float] = exact_match
    exact: bool = True
    loose: Callable[[str, str], float] = loose_match
    stratum: Callable[[str, int], int] | None = None
    reads: bool = False
    new_tokens: int = 16


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Add a task to those that ``--tasks`` takes.

    Raises:
        ConfigError: where the name is taken, by a task or by a group.
    """
    if task.name in _TASKS or task.name in task_groups() or task.name == "all":
        raise ConfigError(f"there is a task or a group {task.name!r} already.")
    _TASKS[task.name] = task
    return task


def available_tasks() -> list[str]:
    """Return the names of all tasks."""
    return list(_TASKS)


def task_groups() -> list[str]:
    """Return the names of the groups, in the order of their first tasks."""
    return list(dict.fromkeys(task.group for task in _TASKS.values()))


def choose_tasks(names: Iterable[str]) -> list[Task]:
    """Choose tasks by names of tasks and groups, or "all". Each comes once, in registry order.

    "all" stands for all tasks but those that need a model which reads.

    Raises:
        ConfigError: for an unknown name.
    """
    chosen: set[str] = set()
    for name in names:
        found = {
            t.name
            for t in _TASKS.values()
            if name in (t.group, t.name) or (name == "all" and not t.reads)
        }
        if not found:
            raise ConfigError(
                f"--tasks: there is no task or group {name!r}; groups are "
                f"{', '.join(task_groups())}, tasks are {', '.join(_TASKS)}."
            )
        chosen |= found
    return [task for task in _TASKS.values() if task.name in chosen]
