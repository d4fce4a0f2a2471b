"""Grids on what real processors make of pictures of odd sizes: tall, wide, 1 x 1, huge; several in
a prompt; none.

A processor is built from its class, with small sizes and a tokenizer that is a list of words. Where
a class also wants a video processor, which needs torchvision, the real image processor makes the
pixels and their grids, and the test writes the placeholders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

import atp_patch
from tests.families.anyres import PINPOINTS, _unpadded
from tests.families.kinds import Batch, Drawn, Kind, Paint, Picture, Place, Words, make, sample
from tests.families.tables import EVERY
from tests.families.test_every_family import check_grids, patched
from tests.helpers import tiny

BY_NAME = {kind.name: kind for kind in EVERY}
TALL, WIDE, DOT, HUGE, SQUARE = (300, 7), (7, 300), (1, 1), (900, 1300), (64, 64)
FEW = ((WIDE,), (DOT, TALL), ())
MANY = ((HUGE,), (TALL, WIDE, DOT), (SQUARE, HUGE), (), (DOT,))

Size = tuple[int, int]  # height, width in pixels
Cells = Iterator[Place | None]


def picture(size: Size) -> Image.Image:
    """Random colours, the same for the same size."""
    colours = np.random.RandomState(sum(size)).randint(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(colours)


def tokenizer(special: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... and special tokens with ids of their own."""
    vocabulary = {"<pad>": tiny.PAD, "<s>": tiny.BOS, "</s>": tiny.EOS, **special}
    free = [at for at in range(tiny.VOCAB) if at not in vocabulary.values()]
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


# -- whole processors ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A processor that can be built, and what its placeholders stand for.

    Attributes:
        kind: the row of the families' table whose tiny model takes what it makes.
        build: makes the processor.
        cells: (processor, size of the picture) -> in the order of placeholders the place of each in
            its picture's grids, None for marks.
        text: how a prompt names a picture.
        least: the smallest picture that the processor itself takes.
        config: makes the tiny model's config, where its pictures must have another size.
        torchvision: whether the image processor needs torchvision.
    """

    kind: str
    build: Callable[[], Any]
    cells: Callable[[Any, Size], Cells]
    text: str = "<image>"
    least: Size = DOT
    config: Callable[[], Any] | None = None
    torchvision: bool = False


def rows(height: int, width: int, grid: int = 0, marks: int = 0) -> Cells:
    """The cells of a grid row by row, and ``marks`` behind each row."""
    for row in range(height):
        yield from ((grid, 0, row, column) for column in range(width))
        yield from (None for _ in range(marks))


def squares(side: int, count: Callable[[Any, Size], int]) -> Callable[[Any, Size], Cells]:
    """Tiles of one size, as many as ``count`` says."""

    def cells(processor: Any, size: Size) -> Cells:
        for tile in range(count(processor, size)):
            yield from rows(side, side, tile)

    return cells


def one(processor: Any, size: Size) -> int:
    return 1


def crops(processor: Any, size: Size) -> int:
    """What the image processor itself says of a picture's crops."""
    return int(processor.image_processor.get_number_of_image_patches(*size, {}))


def idefics3_tiles(processor: Any, size: Size) -> int:
    made = processor.image_processor([[picture(size)]], return_tensors="pt")
    return int(made["pixel_values"].shape[1])


def of_pixels(side: int) -> Callable[[Any, Size], Cells]:
    """Rows and columns from the size that the image processor gives a picture."""

    def cells(processor: Any, size: Size) -> Cells:
        made = processor.image_processor([picture(size)], return_tensors="pt")
        height, width = (
            made["image_sizes"].tolist()[0]
            if hasattr(made["image_sizes"], "tolist")
            else made["image_sizes"][0]
        )
        yield from rows(height // side, width // side)

    return cells


def of_thw(processor: Any, size: Size, marks: int = 0, around: int = 0) -> Cells:
    made = processor.image_processor([picture(size)], return_tensors="pt")
    ((_, height, width),) = made["image_grid_thw"].tolist()
    yield from (None for _ in range(around))
    yield from rows(height // 2, width // 2, marks=marks)
    yield from (None for _ in range(around))


def whole_and_unpadded(processor: Any, size: Size) -> Cells:
    """LLaVA-NeXT: a view, then the rows and columns that the picture takes up, each with a mark."""
    yield from rows(6, 6)
    yield from rows(*_unpadded(size), 1, marks=1)


def clip() -> Any:
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )


def tiles_of(side: int, **more: Any) -> Any:
    size = {"height": side, "width": side}
    return transformers.GotOcr2ImageProcessor(size=size, max_patches=6, **more)


IMAGE = {"<image>": tiny.IMAGE}
AROUND = {"<open>": 6, "<close>": 7}
PIXELS = {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 40}  # of pictures cut into cells


def crops_and_whole(processor: Any, size: Size) -> Cells:
    """Step 3.7: the crops, 4 x 4 tokens each, and then the whole picture."""
    number = crops(processor, size)
    for crop in range(number):
        yield from rows(4, 4, crop)
    yield from rows(6, 6, number)


def aria() -> Any:
    """Aria's processor knows two sizes of pictures, and takes this one where it is not told."""
    config = BY_NAME["aria"].config()
    config.vision_config.image_size, config.vision_config.patch_size = 980, 140
    config.projector_patch_to_query_dict = {49: 30}
    return config


WHOLE = (
    Whole(
        "llava",
        lambda: transformers.LlavaProcessor(
            clip(),
            tokenizer(IMAGE),
            patch_size=8,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
        ),
        squares(6, one),
    ),
    Whole(
        "llava_next",
        lambda: transformers.LlavaNextProcessor(
            transformers.LlavaNextImageProcessor(
                size={"shortest_edge": 48},
                crop_size={"height": 48, "width": 48},
                image_grid_pinpoints=PINPOINTS,
            ),
            tokenizer(IMAGE),
            patch_size=8,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
        ),
        whole_and_unpadded,
    ),
    Whole(
        "granite4_vision",
        lambda: transformers.Granite4VisionProcessor(
            transformers.LlavaNextImageProcessor(
                size={"shortest_edge": 48},
                crop_size={"height": 48, "width": 48},
                image_grid_pinpoints=PINPOINTS,
            ),
            tokenizer(IMAGE, image_token="<image>"),
            patch_size=4,
            vision_feature_select_strategy="full",
            image_token="<image>",
            downsample_rate="2/4",
        ),
        whole_and_unpadded,
    ),
    Whole(
        "paligemma",
        lambda: transformers.PaliGemmaProcessor(
            transformers.SiglipImageProcessor(
                size={"height": 48, "width": 48}, image_seq_length=36
            ),
            tokenizer(IMAGE, image_token="<image>"),
        ),
        squares(6, one),
    ),
    Whole(
        "gemma3",
        lambda: transformers.Gemma3Processor(
            transformers.Gemma3ImageProcessor(size={"height": 48, "width": 48}),
            tokenizer(
                {**IMAGE, **AROUND}, image_token="<image>", boi_token="<open>", eoi_token="<close>"
            ),
            image_seq_length=36,
        ),
        squares(6, one),
        text="<open>",
    ),
    Whole(
        "idefics3",
        lambda: transformers.Idefics3Processor(
            transformers.Idefics3ImageProcessor(
                size={"longest_edge": 96}, max_image_size={"longest_edge": 48}
            ),
            tokenizer({**IMAGE, "<fake_token_around_image>": 6, "<end_of_utterance>": 9}),
            image_seq_len=36,
        ),
        squares(6, idefics3_tiles),
    ),
    Whole(
        "qianfan_ocr",
        lambda: transformers.QianfanOCRProcessor(
            tiles_of(48, crop_to_patches=True),
            tokenizer(
                {**IMAGE, **AROUND},
                start_image_token="<open>",
                end_image_token="<close>",
                context_image_token="<image>",
                image_token="<image>",
            ),
            image_seq_length=36,
        ),
        squares(6, crops),
    ),
    Whole(
        "aya_vision",
        lambda: transformers.AyaVisionProcessor(
            tiles_of(48, crop_to_patches=True),
            tokenizer({"<|IMG_PATCH|>": tiny.IMAGE, "<image>": 9}),
            patch_size=8,
            img_size=48,
            image_token="<image>",
        ),
        squares(6, crops),
    ),
    Whole(
        "deepseek_vl",
        lambda: transformers.DeepseekVLProcessor(
            transformers.DeepseekVLImageProcessor(size={"height": 48, "width": 48}, min_size=4),
            tokenizer(IMAGE, image_token="<image>"),
            num_image_tokens=36,
        ),
        squares(6, one),
    ),
    Whole(
        "deepseek_vl_hybrid",
        lambda: transformers.DeepseekVLHybridProcessor(
            transformers.DeepseekVLHybridImageProcessor(
                size={"height": 48, "width": 48},
                high_res_size={"height": 96, "width": 96},
                min_size=4,
            ),
            tokenizer(IMAGE, image_token="<image>"),
            num_image_tokens=36,
        ),
        squares(6, one),
    ),
    Whole(
        "idefics2",
        lambda: transformers.Idefics2Processor(
            transformers.Idefics2ImageProcessor(
                size={"shortest_edge": 24, "longest_edge": 48}, do_image_splitting=True
            ),
            tokenizer({**IMAGE, "<fake_token_around_image>": 6}),
            image_seq_len=30,
        ),
        lambda processor, size: (cell for tile in range(5) for cell in rows(1, 30, tile)),
        least=(8, 8),
    ),
    Whole(
        "aria",
        lambda: transformers.AriaProcessor(
            transformers.AriaImageProcessor(),
            tokenizer(IMAGE, image_token="<image>"),
            size_conversion={980: 30},
        ),
        lambda processor, size: rows(1, 30),
        config=aria,
    ),
    Whole(
        "step3p7",
        lambda: transformers.Step3p7Processor(
            transformers.Step3p7ImageProcessor(
                size={"height": 96, "width": 96},
                patch_size=64,
                vision_patch_size=4,
                max_image_size=256,
            ),
            tokenizer(
                {
                    "<im_patch>": tiny.IMAGE,
                    "<patch_start>": 3,
                    "<patch_end>": 4,
                    "<patch_newline>": 9,
                    "<im_start>": 6,
                    "<im_end>": 7,
                }
            ),
        ),
        crops_and_whole,
        text="<im_patch>",
        torchvision=True,
    ),
    Whole(
        "lighton_ocr",
        lambda: transformers.LightOnOcrProcessor(
            transformers.PixtralImageProcessor(
                size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}
            ),
            tokenizer(
                {**IMAGE, **AROUND},
                image_token="<image>",
                image_break_token="<open>",
                image_end_token="<close>",
            ),
            patch_size=4,
            spatial_merge_size=2,
        ),
        of_pixels(8),
    ),
    Whole(
        "paddleocr_vl",
        lambda: transformers.PaddleOCRVLProcessor(
            transformers.PaddleOCRVLImageProcessor(
                patch_size=4, temporal_patch_size=1, merge_size=2, size=PIXELS
            ),
            tokenizer(IMAGE, image_token="<image>"),
        ),
        of_thw,
    ),
    Whole(
        "hunyuan_vl",
        lambda: transformers.HunYuanVLProcessor(
            transformers.HunYuanVLImageProcessor(
                patch_size=4, temporal_patch_size=1, merge_size=2, size=PIXELS
            ),
            tokenizer(
                {**IMAGE, **AROUND},
                image_token="<image>",
                image_start_token="<open>",
                image_end_token="<close>",
            ),
        ),
        partial(of_thw, marks=1, around=1),
        text="<open><image><close>",
    ),
)


def row_of(case: Whole | Pixels) -> Kind:
    """The row of the families' table, with a config that the processor's pictures fit."""
    kind = BY_NAME[case.kind]
    config = case.config if isinstance(case, Whole) else None
    return kind if config is None else replace(kind, config=config)


@cache
def built(case: Whole) -> Any:
    return case.build()


def processed(case: Whole, samples: Sequence[Sequence[Size]]) -> Batch:
    """What the processor makes of these pictures, and the place of each of its ids."""
    processor, kind = built(case), row_of(case)
    sizes = [[max(size, case.least) for size in one] for one in samples]
    texts = [
        "<s> w1 " + " w2 ".join(case.text for _ in one) + " w3" * (3 + 2 * number)
        for number, one in enumerate(sizes)
    ]
    images: Any = [[picture(size) for size in one] for one in sizes]
    if case.kind not in ("idefics2", "idefics3", "gemma3"):  # these want a list for each prompt
        images = [image for one in images for image in one]
    made = processor(
        text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False
    )
    config = kind.config()
    places: list[list[Place | None]] = []
    for ids, one in zip(made["input_ids"].tolist(), sizes, strict=True):
        cells = (
            cell if cell is None else (cell[0] + first, *cell[1:])
            for first, cell in _numbered(processor, case, one)
        )
        places.append([next(cells) if token == config.image_token_id else None for token in ids])
        assert next(cells, "none") == "none", "the processor wrote too few placeholders"
    return Batch(dict(made), places)


def _numbered(processor: Any, case: Whole, sizes: Sequence[Size]) -> Iterator[Any]:
    """Each cell with the number of grids of the pictures before its own."""
    first = 0
    for size in sizes:
        cells = list(case.cells(processor, size))
        yield from ((first, cell) for cell in cells)
        first += 1 + max(cell[0] for cell in cells if cell is not None)


# -- image processors alone ------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """An image processor whose processor needs torchvision.

    Attributes:
        kind: the row of the families' table whose tiny model takes what it makes.
        build: makes the image processor.
        ids: in front of and behind the placeholders of a picture.
        merge: how many patches along a side become one token.
    """

    kind: str
    build: Callable[[], Any]
    ids: tuple[int, int] = (tiny.VISION_START, tiny.VISION_END)
    merge: int = 2


def _qwen(make: Any = None, **more: Any) -> Any:
    make = make or transformers.Qwen2VLImageProcessor
    return make(
        **{"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": PIXELS, **more}
    )


ALONE = (
    Pixels("qwen2_vl", _qwen),
    Pixels("qwen2_5_vl", _qwen),
    Pixels("qwen3_vl", _qwen),
    Pixels("exaone4_5", _qwen),
    Pixels("hyperclovax_vision_v2", _qwen),
    Pixels(
        "glm4v",
        lambda: _qwen(
            transformers.Glm4vImageProcessor, size={"shortest_edge": 512, "longest_edge": 5120}
        ),
    ),
    Pixels(
        "ernie4_5_vl_moe",
        lambda: _qwen(transformers.Ernie4_5_VLMoeImageProcessor, temporal_patch_size=1),
    ),
    Pixels(
        "cosmos3_edge", lambda: _qwen(transformers.Cosmos3EdgeImageProcessor, temporal_patch_size=1)
    ),
    Pixels(
        "video_llama_3",
        lambda: transformers.VideoLlama3ImageProcessor(
            patch_size=4, merge_size=1, min_pixels=4 * 4 * 8, max_pixels=4 * 4 * 60
        ),
        merge=1,
    ),
)


def drawn_by(case: Pixels, sizes: Sequence[Size]) -> Kind:
    """The row of the table, with pictures by the real image processor: number n is of sizes[n]."""
    processor = case.build()

    def draw(config: Any, which: int, paint: Paint, count: int) -> Drawn:
        made = processor([picture(sizes[which])], return_tensors="pt")
        ((_, height, width),) = made["image_grid_thw"].tolist()
        drawn = Drawn(tensors=dict(made))
        drawn.mark(case.ids[0])
        drawn.square(tiny.IMAGE, 0, height // case.merge, width // case.merge)
        drawn.mark(case.ids[1])
        return drawn

    return replace(BY_NAME[case.kind], draw=draw)


def by_pixels(case: Pixels, samples: Sequence[Sequence[Size]]) -> Batch:
    sizes = [size for one in samples for size in one]
    numbers, pieces = iter(range(len(sizes))), []
    for number, one in enumerate(samples):
        within: list[Words | Picture] = [Words(2)]
        for _ in one:
            within += [Picture(next(numbers)), Words(2)]
        pieces.append(sample(*within, Words(3 + number), seed=number))
    return make(drawn_by(case, sizes), pieces)


# -- tests -----------------------------------------------------------------------------------------


def _needs(real: Whole | Pixels) -> Any:
    """The mark of a row whose image processor may not be there."""
    missing = isinstance(real, Whole) and real.torchvision and not is_torchvision_available()
    return pytest.mark.skipif(missing, reason="its image processor needs torchvision")


every = pytest.mark.parametrize(
    ("kind", "real"),
    [
        pytest.param(row_of(real), real, id=real.kind, marks=_needs(real))
        for real in (*WHOLE, *ALONE)
        if real.kind in BY_NAME  # absent from early versions of transformers
    ],
)


def check(kind: Kind, real: Whole | Pixels, samples: Sequence[Sequence[Size]]) -> None:
    made = processed(real, samples) if isinstance(real, Whole) else by_pixels(real, samples)
    model = patched(kind, method="uniform")
    check_grids(model, made)
    found = atp_patch.last_trace(model).layout.grids
    assert [bool(grids) for grids in found] == [bool(sizes) for sizes in samples]


@every
def test_grids_of_what_the_processor_makes(kind: Kind, real: Whole | Pixels) -> None:
    check(kind, real, FEW)


@pytest.mark.slow
@every
def test_grids_of_huge_pictures_and_of_several(kind: Kind, real: Whole | Pixels) -> None:
    check(kind, real, MANY)
