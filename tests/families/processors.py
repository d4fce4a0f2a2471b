"""Real processors, built from their classes with small sizes and a made-up tokenizer, and the
places of what they write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import transformers
from packaging.version import Version
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from tests.families.hosts import HOST, NEWEST
from tests.families.kinds import Batch, Kind, Place
from tests.families.tables import EVERY
from tests.helpers import tiny

BY_NAME = {kind.name: kind for kind in EVERY}
TORCHVISION = is_torchvision_available()
DOT = (1, 1)
EVEN = 4  # frames of videos of which all must have as many

Size = tuple[int, int]  # height, width in pixels
Cells = Iterator[Place | None]


@dataclass(frozen=True)
class Clip:
    """A video: its frames are of one size."""

    frames: int
    size: Size


def picture(size: Size) -> Image.Image:
    """Random colours, the same for the same size."""
    colours = np.random.RandomState(sum(size)).randint(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(colours)


def film(clip: Clip) -> np.ndarray:
    """(frames, height, width, 3) random colours, the same for the same clip."""
    shape = (clip.frames, *clip.size, 3)
    return np.random.RandomState(sum(shape)).randint(0, 255, shape, dtype=np.uint8)


def tokenizer(special: Mapping[str, int], **named: str) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... and special tokens with ids of their own."""
    vocabulary = {"<pad>": tiny.PAD, "<s>": tiny.BOS, "</s>": tiny.EOS, **special}
    free = [at for at in range(tiny.FIRST_WORD, tiny.VOCAB) if at not in vocabulary.values()]
    words = {f"w{number}": at for number, at in enumerate(free)}
    inner = Tokenizer(WordLevel({**vocabulary, **words}, unk_token=f"w{len(free) - 1}"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in vocabulary])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=named,
    )


def films(name: str, **sizes: Any) -> Any:
    """The video processor of this name. Where torchvision, which it needs, is not installed, its
    settings alone take its place: a processor asks for no more while no prompt has videos.
    """
    if not TORCHVISION:
        return SimpleNamespace(**sizes)
    return getattr(transformers, name)(do_sample_frames=False, **sizes)


class ImagesAlone:
    """A processor that cannot be imported without torchvision, whose image processor can: it makes
    the pixels, and ``expand`` writes the placeholders.

    Args:
        image_processor: the real one.
        words: the tokenizer.
        expand: (what the image processor made, number of a picture) -> its placeholders.
    """

    def __init__(self, image_processor: Any, words: Any, expand: Callable[[Any, int], str]) -> None:
        self.image_processor, self.tokenizer, self.expand = image_processor, words, expand

    def __call__(self, text: list[str], images: list[Any], **options: Any) -> dict[str, Any]:
        """Ids and pixels; ``<image>`` stands for a picture."""
        made = self.image_processor(images, return_tensors="pt")
        numbers = iter(range(len(images)))
        parts = [one.split("<image>") for one in text]
        written = [
            first + "".join(self.expand(made, next(numbers)) + part for part in rest)
            for first, *rest in parts
        ]
        return {**self.tokenizer(written, **options), **made}


@dataclass(frozen=True)
class Real:
    """A processor that can be built, and what its placeholders stand for.

    Attributes:
        kind: the row of the families' table whose tiny model takes what it makes.
        build: makes the processor.
        cells: (processor, size of the picture) -> in the order of placeholders the place of each in
            its picture's grids, None for marks.
        several: the same in a prompt of several pictures, where that is otherwise.
        frames: the same of a video, where the processor takes videos.
        text: how a prompt names a picture.
        video: how a prompt names a video.
        ids: of the placeholders.
        least: the smallest picture that the processor itself takes.
        most: the largest number of pictures that it takes in a prompt.
        one_film: whether a prompt may have no more than one video.
        even: whether the videos of a call must have as many frames.
        batches: whether a call takes several prompts with pictures.
        nested: whether it wants a list of pictures for each prompt.
        options: further arguments of its call.
        config: makes the tiny model's config, where its pictures must have another size.
        since: the first version of transformers whose processor is known to be as here.
        torchvision: whether it needs torchvision for pictures too.
        package: another package that it needs.
        package: another package that it needs.
        often: whether an ordinary run builds it; others are like a row that it builds.
        fit: changes what it makes into what the model takes.
    """

    kind: str
    build: Callable[[], Any]
    cells: Callable[[Any, Size], Cells]
    several: Callable[[Any, Size], Cells] | None = None
    frames: Callable[[Any, Clip], Cells] | None = None
    text: str = "<image>"
    video: str = "<video>"
    ids: tuple[int, ...] = (tiny.IMAGE, tiny.VIDEO)
    least: Size = DOT
    most: int = 9
    nested: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    config: Callable[[], Any] | None = None
    one_film: bool = False
    even: bool = False
    batches: bool = True
    since: str = "0"
    torchvision: bool = False
    package: str | None = None
    often: bool = True
    fit: Callable[[dict[str, Any]], dict[str, Any]] = dict


def row_of(real: Real) -> Kind:
    """The row of the families' table, with a config that the processor's pictures fit."""
    kind = BY_NAME[real.kind]
    return kind if real.config is None else replace(kind, config=real.config)


@cache
def built(real: Real) -> Any:
    """The processor; an early version of transformers may not have its classes."""
    try:
        if TORCHVISION:
            return real.build()
        # Without torchvision, transformers has no class that it could ask a video processor for.
        with mock.patch.object(transformers.ProcessorMixin, "check_argument_for_proper_class"):
            return real.build()
    except (AttributeError, ImportError) as missing:
        if HOST >= NEWEST:
            raise
        return missing


Prompt = Sequence[Size | Clip]


def processed(real: Real, prompts: Sequence[Prompt]) -> Batch:
    """What the processor makes of these pictures and videos, and the place of each of its ids."""
    if Version(real.since) > HOST:
        pytest.skip(f"its processor is otherwise before transformers {real.since}")
    processor = built(real)
    if isinstance(processor, Exception):
        if "Torchvision" in str(processor):
            pytest.skip("its processor needs torchvision")
        why = str(processor).split(".")[0]
        pytest.skip(f"this version of transformers has no such processor: {why}")
    prompts = [[_taken(real, one) for one in prompt[: real.most]] for prompt in prompts]
    texts = [
        "<s> w1 "
        + " w2 ".join(real.text if isinstance(one, tuple) else real.video for one in prompt)
        + " w3" * (3 + 2 * number)
        for number, prompt in enumerate(prompts)
    ]
    shown = [[picture(one) for one in prompt if isinstance(one, tuple)] for prompt in prompts]
    clips = [one for prompt in prompts for one in prompt if isinstance(one, Clip)]
    images: Any = shown if real.nested else [image for one in shown for image in one]
    options = dict(real.options)
    if any(shown):
        options["images"] = images
    if clips:
        seen = [
            {
                "fps": 2.0,
                "total_num_frames": clip.frames,
                "frames_indices": list(range(clip.frames)),
            }
            for clip in clips
        ]
        options["videos"] = [film(clip) for clip in clips]
        options["videos_kwargs"] = {"video_metadata": seen, **options.get("videos_kwargs", {})}
    made = processor(text=texts, padding=True, return_tensors="pt", **options)
    places: list[list[Place | None]] = []
    for ids, prompt in zip(made["input_ids"].tolist(), prompts, strict=True):
        cells = (
            cell if cell is None else (cell[0] + first, *cell[1:])
            for first, cell in _numbered(processor, real, prompt)
        )
        places.append([next(cells) if token in real.ids else None for token in ids])
        assert next(cells, "none") == "none", "the processor wrote too few placeholders"
    return Batch(real.fit(dict(made)), places)


def _taken(real: Real, one: Size | Clip) -> Size | Clip:
    """The picture or video, changed to one that the processor itself takes."""
    if isinstance(one, Clip):
        return Clip(EVEN, one.size) if real.even else one
    return max(one[0], real.least[0]), max(one[1], real.least[1])


def _numbered(processor: Any, real: Real, prompt: Prompt) -> Iterator[Any]:
    """Each cell with the number of grids of the pictures before its own."""
    pictures = sum(isinstance(one, tuple) for one in prompt)
    cells_of = real.several if real.several is not None and pictures > 1 else real.cells
    first = 0
    for one in prompt:
        if isinstance(one, Clip):
            assert real.frames is not None
            cells = list(real.frames(processor, one))
        else:
            cells = list(cells_of(processor, one))
        yield from ((first, cell) for cell in cells)
        first += 1 + max(cell[0] for cell in cells if cell is not None)
