"""The conversations that a training learns from: files in LLaVA's format, and the built-in scenes.

A source is a sequence: ``source[i]`` gives a :class:`Conversation`, or raises an
:class:`InputError` that names sample ``i``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from atp_patch.builtin import LLAVA, as_shown, make_scene
from atp_patch.contract.errors import ConfigError, InputError
from atp_patch.tools.files import parse_json
from atp_patch.tools.pictures import read_image

MARK = "<image>"  # stands in a text where an image belongs
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about images.

    Attributes:
        turns: pairs of a role, which alternates between "user" and "assistant", and a text, in
            which each ``<image>`` stands for the next image.
        images: the pictures, in the order in which the texts name them.
    """

    turns: tuple[tuple[str, str], ...]
    images: tuple[Image.Image, ...]

    def messages(self, end: str = "") -> list[dict[str, Any]]:
        """Return the turns in the form that chat templates take.

        Args:
            end: text that is put after each answer.
        """
        return [
            {"role": role, "content": _parts(text + (end if role == "assistant" else ""))}
            for role, text in self.turns
        ]


class Source(Protocol):
    """A sequence of conversations.

    Attributes:
        name: what errors and the card call it.
        problems: for each sample that is known to be bad, what is wrong with it.
    """

    name: str
    problems: dict[int, str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


class Scenes:
    """One question about each scene of the built-in split "train".

    Args:
        samples: how many scenes there are.
        model: the built-in model whose size of pictures is used.
    """

    def __init__(self, samples: int, model: str = LLAVA) -> None:
        self.name, self.samples, self.model = "built-in scenes", samples, model
        self.problems: dict[int, str] = {}

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Conversation:
        """Return one sample. The questions of consecutive samples belong to different tasks."""
        scene = make_scene("train", index)
        question = scene.questions[index % len(scene.questions)]
        turns = (("user", f"{MARK}\n{question.text}"), ("assistant", question.answer))
        return Conversation(turns, (as_shown(scene, self.model).image,))


class LlavaFile:
    """A file in LLaVA's format: samples with "conversations" and "image", as one list in JSON, or
    as one line each where the file's name ends with .jsonl.

    Args:
        file: where the samples are.
        images: the folder that the names of images are relative to.
        samples: take the first so many; None: all.
        text_only: whether samples without an image are taken too.
        max_image_pixels: the most pixels that an image may have.

    Attributes:
        problems: for each bad sample what is wrong with it, as far as that shows without opening
            images.

    Raises:
        ConfigError: where the file cannot be read or holds no samples.
    """

    def __init__(
        self,
        file: Path,
        images: Path,
        *,
        samples: int | None = None,
        text_only: bool = False,
        max_image_pixels: int,
    ) -> None:
        self.name, self.images, self.text_only = file.name, images, text_only
        self.max_image_pixels = max_image_pixels
        self.records = list(islice(_read(file), samples))
        if not self.records:
            raise ConfigError(f"{file} holds no samples.")
        self.problems = {}
        for index, record in enumerate(self.records):
            try:
                self._check(record)
            except InputError as error:
                self.problems[index] = str(error)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Conversation:
        """Return one sample with its images.

        Raises:
            InputError: naming the sample and what is wrong with it.
        """
        try:
            if index in self.problems:
                raise InputError(self.problems[index])
            turns, files = self._check(self.records[index])
            return Conversation(turns, tuple(read_image(f, self.max_image_pixels) for f in files))
        except InputError as error:
            raise InputError(f"sample {index} of {self.name}: {error}") from error

    def _check(self, record: Any) -> tuple[tuple[tuple[str, str], ...], list[Path]]:
        """Return the turns and the image files of a record."""
        if isinstance(record, ValueError):
            raise InputError(f"the line is not JSON ({record}).")
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise InputError('it is no mapping with a list "conversations".')
        turns = tuple(_turn(turn) for turn in record["conversations"])
        roles = [role for role, _ in turns]
        if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
            raise InputError(
                "its turns do not alternate between a human and gpt, who answers last."
            )
        named = record.get("image")
        names = [] if named is None else [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError('"image" is neither a path nor a list of paths.')
        if not names and not self.text_only:
            raise InputError("it has no image; text_only takes conversations without one.")
        found = sum(text.count(MARK) for _, text in turns)
        if found != len(names):
            raise InputError(f"it has {len(names)} images, and {MARK} stands in it {found} times.")
        if any(MARK in text for _, text in turns[1:]):
            raise InputError(f"{MARK} stands after the first question.")
        files = [self.images / name for name in names]
        for file in files:
            try:
                found = file.is_file()
            except OSError as error:  # a name may be longer than the system takes
                raise InputError(f"an image cannot be found ({error}); check the path.") from error
            if not found:
                raise InputError(f"there is no image {file}; check the path and images.")
        return turns, files


def check_source(source: Source, skip_bad: bool) -> None:
    """Refuse a source with samples that cannot be used, unless they are to be skipped.

    Raises:
        InputError: where there are such samples and ``skip_bad`` is false, or all are such. It says
            how many they are, and what is wrong with the first.
    """
    bad = source.problems
    if not bad or (skip_bad and len(bad) < len(source)):
        return
    first = "; ".join(f"sample {index}: {problem}" for index, problem in islice(bad.items(), 3))
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    mend = "Mend the data" if len(bad) == len(source) else "Mend them, or give --skip-bad"
    raise InputError(
        f"{len(bad)} of {len(source)} samples of {source.name} cannot be used: {first}{more}. "
        f"{mend}."
    )


def _turn(turn: Any) -> tuple[str, str]:
    told = turn if isinstance(turn, dict) else {}
    speaker, text = told.get("from"), told.get("value")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None or not isinstance(text, str):
        raise InputError('a turn has no "from" (human or gpt) or no "value".')
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise InputError(f"its text holds {half[0]!a}, a half of a character; mend the file.")
    if not text.replace(MARK, "").strip():
        raise InputError(f"it has an empty {'question' if role == 'user' else 'answer'}.")
    return role, text.strip()


def _parts(text: str) -> list[dict[str, str]]:
    """Return the pieces of a text and the images between them, in their order; the template puts
    the blanks around them.
    """
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(MARK)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _read(file: Path) -> Sequence[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # some programs write a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); check --data.") from error
    if file.suffix == ".jsonl":
        # Not splitlines(): strings may hold line separators that are no line ends in JSON.
        return [_line(line) for line in text.split("\n") if line.strip()]
    try:
        records = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); mend it.") from error
    if not isinstance(records, list):
        raise ConfigError(f"{file} is not a list of samples; for a sample a line, name it .jsonl.")
    return records


def _line(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        return error
