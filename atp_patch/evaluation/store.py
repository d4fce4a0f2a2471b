"""Results on disk, from which a killed run is continued: a file for each run, and in it a line for
each chunk of questions.

A file's name ends with the hash of everything that decides an answer (model, method, settings,
split, code, versions, dtype), so answers of different kinds never mix. Where a kill leaves a part
of a last line, that part is cut off.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation.identity import short_hash
from atp_patch.tools.files import parse_json


@dataclass(frozen=True)
class Answer:
    """The result of one question.

    Attributes:
        score: from 0 (wrong) to 1 (right).
        entering: how many visual tokens entered layer 0 and each pruning layer.
    """

    score: float
    entering: tuple[int, ...]


@dataclass
class RunFile:
    """The file of one run.

    Attributes:
        path: the path of the file.
        header: the object in the first line; its entry "identity" decides the file's name.
        answers: the results by task, and by number of the question's image.
    """

    path: Path
    header: dict[str, Any]
    answers: dict[str, dict[int, Answer]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: Path, name: str, identity: dict[str, Any], facts: dict[str, Any]
    ) -> RunFile:
        """Open a run's file with what it holds already, or begin one.

        Args:
            folder: the folder of the file; it is made where it is not there.
            name: readable first part of the file's name.
            identity: everything that decides an answer, as plain data.
            facts: further entries of a new file's header.

        Raises:
            ConfigError: where the folder cannot be written, or the file is damaged.
        """
        fingerprint = short_hash([json.dumps(identity, sort_keys=True).encode()])
        stem = re.sub(r"[^A-Za-z0-9.+-]+", "-", name).strip("-")
        run = cls(folder / f"{stem}-{fingerprint}.jsonl", {"identity": identity, **facts})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not run._read():
                run.path.write_text(_line(run.header), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out: {error}; give a folder that can be written.") from error
        return run

    def has(self, task: str, number: int) -> bool:
        """Return whether a question is answered already."""
        return number in self.answers.get(task, {})

    def add(self, chunk: int, results: dict[str, dict[int, Answer]]) -> None:
        """Append the results of a chunk as one line.

        Args:
            chunk: number of the chunk.
            results: by task, and by number of the question's image.
        """
        tasks = {task: _packed(answers) for task, answers in results.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"chunk": chunk, "tasks": tasks}))
        self._take(results)

    def _take(self, results: dict[str, dict[int, Answer]]) -> None:
        """Add results, except for questions that have one already: nothing counts twice."""
        for task, answers in results.items():
            known = self.answers.setdefault(task, {})
            for number, answer in answers.items():
                known.setdefault(number, answer)

    def _read(self) -> bool:
        """Read the file, and say whether anything is in it."""
        if not self.path.exists():
            return False
        found = self.path.read_bytes()
        whole = found[: found.rfind(b"\n") + 1]
        if whole != found:
            os.truncate(self.path, len(whole))  # which needs no room, even on a full disk
        try:
            rows = [parse_json(line) for line in whole.decode("utf-8").splitlines()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no JSON object")
            for row in rows[1:]:
                self._take({task: _unpacked(packed) for task, packed in row["tasks"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.path} is damaged ({error}); remove it.") from error
        if rows:
            self.header = rows[0]
        return bool(rows)


def _line(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n"


def _packed(answers: dict[int, Answer]) -> dict[str, list[Any]]:
    """Return answers as columns; the token counts stand there once where they are the same for
    all.
    """
    rows = [list(answer.entering) for answer in answers.values()]
    same = all(row == rows[0] for row in rows)
    scores = [int(a.score) if a.score in (0, 1) else a.score for a in answers.values()]
    return {"numbers": list(answers), "scores": scores, "entering": rows[:1] if same else rows}


def _unpacked(packed: dict[str, list[Any]]) -> dict[int, Answer]:
    rows = packed["entering"]
    if len(rows) == 1:
        rows = rows * len(packed["numbers"])
    columns = zip(packed["numbers"], packed["scores"], rows, strict=True)
    return {number: Answer(float(score), tuple(row)) for number, score, row in columns}
