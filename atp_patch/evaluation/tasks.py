"""The registry of tasks: a task is data and a scoring function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from PIL import Image

from atp_patch.contract.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        task: the task's name.
        number: of the image within the split and group; (group, number) names the image, and
            (task, number) the question.
    """

    task: str
    number: int
    question: str
    answer: str


def exact_match(given: str, true: str) -> float:
    """1 if both texts are the same but for blanks around them, else 0."""
    return float(given.strip() == true.strip())


def loose_match(given: str, true: str) -> float:
    """1 if both texts are the same but for case, blanks around them and a full stop, else 0."""
    return exact_match(*(text.strip().rstrip(".").casefold() for text in (given, true)))


@dataclass(frozen=True)
class Task:
    """Questions with true answers, and how an answer is scored.

    Attributes:
        group: tasks of one group share their images; means and retention are taken over a group.
        examples: (split, how many) -> so many questions, each of another image; the first of more
            are the same.
        image: (split, number) -> the picture of an example.
        score: (given answer, true answer) -> 0 (wrong) to 1 (right).
        exact: whether ``score`` asks for the true answer and nothing else, so that it may be found
            without generating (see ``answers``).
        loose: scores models that were not made for the task's words: they may write "Red.".
        stratum: (split, number) -> what results are also told apart by, the number of objects in
            the picture, for example; None where there is nothing.
    """

    name: str
    group: str
    examples: Callable[[str, int], list[Example]]
    image: Callable[[str, int], Image.Image]
    score: Callable[[str, str], float] = exact_match
    exact: bool = True
    loose: Callable[[str, str], float] = loose_match
    stratum: Callable[[str, int], int] | None = None


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
    """Names of all tasks."""
    return list(_TASKS)


def task_groups() -> list[str]:
    """Names of the groups, in the order of their first tasks."""
    return list(dict.fromkeys(task.group for task in _TASKS.values()))


def choose_tasks(names: Iterable[str]) -> list[Task]:
    """Tasks from names of tasks and groups, or "all"; each once, in the registry's order.

    Raises:
        ConfigError: for an unknown name.
    """
    chosen: set[str] = set()
    for name in names:
        found = {t.name for t in _TASKS.values() if name in ("all", t.group, t.name)}
        if not found:
            raise ConfigError(
                f"--tasks: there is no task or group {name!r}; groups are "
                f"{', '.join(task_groups())}, tasks are {', '.join(_TASKS)}."
            )
        chosen |= found
    return [task for task in _TASKS.values() if task.name in chosen]
