"""What one row of the families' table holds, and how its tiny model and its batches are made.

A sample is a list of pieces: words and pictures. A row says what ids, places and pixels a picture
becomes, written out one token at a time as the family's own processor would expand it; the grids
that the package finds are compared with those places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.helpers import tiny
from tests.helpers.copies import Template
from tests.helpers.inputs import Inputs

Place = tuple[int, int, int, int]  # number of the grid within the picture, frame, row, column
Paint = Callable[[int, int], Tensor]  # height, width in pixels -> (3, height, width)

TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": tiny.HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": tiny.HEADS,
    "num_key_value_heads": tiny.KV_HEADS,
    "head_dim": tiny.HEAD_DIM,
    "max_position_embeddings": 2048,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": tiny.PAD,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VIDEO = 2  # the number of the picture that is a video, in rows that have one


@dataclass(frozen=True)
class Words:
    """``count`` random words."""

    count: int


@dataclass(frozen=True)
class Picture:
    """The row's picture number ``which``; a row has at least two, of different size if it can."""

    which: int


@dataclass(frozen=True)
class Sample:
    """The pieces of one sample; its content hangs on ``seed`` alone."""

    pieces: tuple[Words | Picture, ...]
    seed: int


def sample(*pieces: Words | Picture, seed: int) -> Sample:
    """Shorthand."""
    return Sample(pieces, seed)


SINGLE = (sample(Words(3), Picture(0), Words(9), seed=1),)
TWO = (sample(Words(3), Picture(0), Words(4), Picture(1), Words(7), seed=2),)
MIXED = (
    sample(Words(3), Picture(0), Words(9), seed=1),
    sample(Words(2), Picture(0), Words(4), Picture(1), Words(5), seed=6),
    sample(Words(13), seed=7),
    sample(Words(5), Picture(1), Words(3), seed=8),
)
ALIKE = (
    sample(Words(3), Picture(0), Words(9), seed=1),
    sample(Words(2), Picture(0), Words(4), seed=9),
)
VIDEOS_ALONE = (
    sample(Words(3), Picture(VIDEO), Words(8), seed=11),
    sample(Words(2), Picture(VIDEO), Words(13), seed=13),
)
VIDEOS = (
    sample(Words(3), Picture(VIDEO), Words(8), seed=11),
    sample(Words(2), Picture(0), Words(2), Picture(VIDEO), Words(6), seed=12),
)


@dataclass
class Drawn:
    """One picture as the processor hands it on: ids in the text, and tensors for the model.

    Attributes:
        ids: every id that stands for the picture, text markers included.
        places: of each id its place in a grid, or None where it has none.
        tensors: what the row's ``collate`` puts together.
    """

    ids: list[int] = field(default_factory=list)
    places: list[Place | None] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)

    def mark(self, *ids: int) -> None:
        """Append ids that belong to no grid."""
        self.ids += ids
        self.places += [None] * len(ids)

    def put(self, token_id: int, grid: int, frame: int, row: int, column: int) -> None:
        """Append one visual token."""
        self.ids.append(token_id)
        self.places.append((grid, frame, row, column))

    def square(self, token_id: int, grid: int, height: int, width: int, frame: int = 0) -> None:
        """Append a grid row by row."""
        for row in range(height):
            for column in range(width):
                self.put(token_id, grid, frame, row, column)


def _no_blocks(inputs: Inputs) -> Tensor | None:
    return None


@dataclass(frozen=True)
class Kind:
    """One row of the table.

    Attributes:
        name: of the test.
        model: the transformers class; ``config``: makes its tiny config.
        draw: (config, which picture, paint, images in the sample) -> what the processor makes.
        collate: (pictures of each sample, text inputs) -> the model's further inputs.
        pictures_first: the processor moves pictures in front of the text.
        blocks: (B, L) numbers of the blocks within which tokens see each other both ways, -1 for
            none; or None where all is causal.
        blocks_slide: only sliding layers let the tokens of a block see each other both ways.
        window_over_blocks: sliding windows bound what is seen within a block too.
        adjust: changes the random weights.
        layers: where the tests prune.
        last_layer: the last layer before which tokens may go, where it is not the decoder's last.
        default_layers: where a method prunes that is told no layers.
        videos: picture number ``VIDEO`` is a video.
        mixes: one call of the model may hold both images and videos.
        attention: the implementation that the tests run by default.
        placed: each visual token shows one place of its picture, once the tower looks at each patch
            alone.
    """

    name: str
    model: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]
    draw: Callable[[Any, int, Paint, int], Drawn]
    collate: Callable[[list[list[Drawn]], Inputs], Inputs]
    pictures_first: bool = False
    blocks: Callable[[Inputs], Tensor | None] = _no_blocks
    blocks_slide: bool = False
    window_over_blocks: bool = False
    adjust: Callable[[PreTrainedModel], None] | None = None
    layers: tuple[int, ...] = (2, 4, 6)
    last_layer: int = tiny.LAYERS - 1
    default_layers: tuple[int, ...] = (1, 4, 6)
    videos: bool = False
    mixes: bool = True
    attention: str = "sdpa"
    placed: bool = True

    def seen(self, inputs: Inputs) -> dict[str, Any]:
        """What tokens see besides causality, as options of :func:`~tests.helpers.oracle.masked`."""
        return {
            "blocks": self.blocks(inputs),
            "blocks_slide": self.blocks_slide,
            "window_over_blocks": self.window_over_blocks,
        }

    @property
    def video_samples(self) -> tuple[Sample, ...]:
        """Samples with videos, and with images beside them where the model takes both."""
        return VIDEOS if self.mixes else VIDEOS_ALONE

    def build(self) -> PreTrainedModel:
        """A fresh copy of the tiny model; equal weights in every call."""
        return _built(self).copy()


@cache
def _built(kind: Kind) -> Template:
    torch.manual_seed(0)
    config = kind.config()
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False  # a head of its own makes logits of ordinary size
    model = kind.model._from_config(config, attn_implementation=kind.attention)
    tiny._scale_weights(model)
    if kind.adjust is not None:
        with torch.no_grad():
            kind.adjust(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tiny.PAD
    model.generation_config.suppress_tokens = list(range(tiny.FIRST_WORD))
    return Template(model.float().eval())


@cache
def _config(kind: Kind) -> PreTrainedConfig:
    """For reading alone: the batches of a row share it."""
    return kind.config()


@dataclass
class Batch:
    """Inputs of the model and, of every sample, the expected place of each id."""

    inputs: Inputs
    places: list[list[Place | None]]


def noise(seed: int) -> Paint:
    """Random pictures, the same for the same seed."""
    generator = torch.Generator().manual_seed(3000 + seed)
    return lambda height, width: torch.randn(3, height, width, generator=generator)


def rows_ramp(height: int, width: int) -> Tensor:
    """A picture whose every pixel row has one colour.

    The colours are no straight line, since a model that normalises each patch sees no more than
    its shape.
    """
    ramp = torch.linspace(-1, 1, height)
    return (ramp + ramp**2 / 4)[None, :, None].expand(3, height, width).contiguous()


def columns_ramp(height: int, width: int) -> Tensor:
    """A picture whose every pixel column has one colour."""
    return rows_ramp(width, height).transpose(1, 2).contiguous()


def make(
    kind: Kind, samples: Sequence[Sample], padding: str = "left", paint: Paint | None = None
) -> Batch:
    """The samples as the family's processor would give them to the model."""
    config = _config(kind)
    drawn = [_draw(kind, config, one, paint) for one in samples]
    length = max(len(ids) for ids, _, _ in drawn)
    ids, mask, places = [], [], []
    for sample_ids, sample_places, _ in drawn:
        gap = length - len(sample_ids)
        before, after = (gap, 0) if padding == "left" else (0, gap)
        ids.append([tiny.PAD] * before + sample_ids + [tiny.PAD] * after)
        mask.append([0] * before + [1] * len(sample_ids) + [0] * after)
        places.append([None] * before + sample_places + [None] * after)
    inputs: Inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    pictures = [pictures for _, _, pictures in drawn]
    inputs.update(kind.collate(pictures, inputs))
    return Batch(inputs, places)


def _draw(
    kind: Kind, config: Any, source: Sample, paint: Paint | None
) -> tuple[list[int], list[Place | None], list[Drawn]]:
    """Ids, places (grids numbered through the sample) and pictures of one sample."""
    generator = torch.Generator().manual_seed(1000 + source.seed)
    pieces = list(source.pieces)
    if kind.pictures_first:
        pieces.sort(key=lambda piece: isinstance(piece, Words))
    ids: list[int] = [] if kind.pictures_first else [tiny.BOS]
    places: list[Place | None] = [None] * len(ids)
    pictures: list[Drawn] = []
    count = sum(isinstance(piece, Picture) and piece.which < VIDEO for piece in pieces)
    grids = 0
    for piece in pieces:
        if isinstance(piece, Words):
            drawn = torch.randint(tiny.FIRST_WORD, tiny.VOCAB, (piece.count,), generator=generator)
            ids += drawn.tolist()
            places += [None] * piece.count
            continue
        colour = paint or noise(source.seed * 10 + len(pictures))
        picture = kind.draw(config, piece.which, colour, count)
        ids += picture.ids
        places += [
            None if place is None else (place[0] + grids, *place[1:]) for place in picture.places
        ]
        grids += 1 + max(place[0] for place in picture.places if place is not None)
        pictures.append(picture)
    return ids, places, pictures


def installed(table: dict[str, tuple[Any, ...]]) -> tuple[Kind, ...]:
    """The rows whose model the installed version of transformers has.

    Args:
        table: from the beginning of a model's class name to its row: the first arguments of
            :class:`Kind` without the class, and then a dict of the others.
    """
    kinds = []
    for prefix, (name, config, draw, collate, more) in table.items():
        model = getattr(transformers, f"{prefix}ForConditionalGeneration", None)
        if model is not None:
            kinds.append(Kind(name, model, config, draw, collate, **more))
    return tuple(kinds)


def stacked(name: str) -> Callable[[list[list[Drawn]], Inputs], Inputs]:
    """Collate: all pictures' tensors of this name, one after the other."""

    def collate(pictures: list[list[Drawn]], inputs: Inputs) -> Inputs:
        tensors = [picture.tensors[name] for sample in pictures for picture in sample]
        return {name: torch.cat(tensors)} if tensors else {}

    return collate
