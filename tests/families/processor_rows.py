"""The real processors of the families: how each is built, and what its placeholders stand for.

A processor that is like another but for its name is made by the same function. Classes that an
early version of transformers lacks are asked for when a row is built, and not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import transformers

from tests.families.anyres import PINPOINTS, _unpadded
from tests.families.processors import (
    BY_NAME,
    TORCHVISION,
    Cells,
    Clip,
    ImagesAlone,
    Real,
    Size,
    film,
    films,
    picture,
    tokenizer,
)
from tests.families.sized import _cells
from tests.helpers import tiny

IMAGE = {"<image>": tiny.IMAGE}
BOTH = {**IMAGE, "<video>": tiny.VIDEO}
AROUND = {"<open>": 6, "<close>": 7}
UNSEEN = 110  # the first of the ids of tokens that a processor puts others in place of
CUT = {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 40}  # of pictures cut into cells
# ERNIE, Cosmos, ... measure a picture; Qwen, GLM, ... measure a video with all of its frames.
CUT_FILM = {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 160}
SQUARE = {"height": 48, "width": 48}


# -- cells -----------------------------------------------------------------------------------------


def rows(height: int, width: int, grid: int = 0, marks: int = 0, frame: int = 0) -> Cells:
    """The cells of a grid row by row, and ``marks`` behind each row."""
    for row in range(height):
        yield from ((grid, frame, row, column) for column in range(width))
        yield from (None for _ in range(marks))


def squares(side: int, count: Callable[[Any, Any], int]) -> Callable[[Any, Any], Cells]:
    """Tiles of one size, as many as ``count`` says."""

    def cells(processor: Any, size: Any) -> Cells:
        for tile in range(count(processor, size)):
            yield from rows(side, side, tile)

    return cells


def frames_in_one(side: int, marks: int = 0, ends: int = 0) -> Callable[[Any, Clip], Cells]:
    """A video of square frames, ``marks`` before each of them and ``ends`` behind the last."""

    def cells(processor: Any, clip: Clip) -> Cells:
        for frame in range(clip.frames):
            yield from (None for _ in range(marks))
            yield from rows(side, side, frame=frame)
        yield from (None for _ in range(ends))

    return cells


def one(processor: Any, size: Size) -> int:
    return 1


def as_many_frames(processor: Any, clip: Clip) -> int:
    return clip.frames


def crops(processor: Any, size: Size) -> int:
    """What the image processor itself says of a picture's crops."""
    return int(processor.image_processor.get_number_of_image_patches(*size, {}))


def tiles_made(processor: Any, size: Size) -> int:
    """Along the second dimension of the pixels."""
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
    merge = processor.image_processor.merge_size
    ((_, height, width),) = made["image_grid_thw"].tolist()
    yield from (None for _ in range(around))
    yield from rows(height // merge, width // merge, marks=marks)
    yield from (None for _ in range(around))


def _film_thw(processor: Any, clip: Clip) -> list[int]:
    made = processor.video_processor([film(clip)], return_tensors="pt")
    (thw,) = made["video_grid_thw"].tolist()
    return list(thw)


def together(processor: Any, clip: Clip, joined: int = 1) -> Cells:
    """A video whose frames follow each other; ``joined`` frames make one."""
    frames, height, width = _film_thw(processor, clip)
    for frame in range(frames // joined):
        yield from rows(height // 2, width // 2, frame=frame)


def apart(processor: Any, clip: Clip) -> Cells:
    """A video with time stamps between its frames, each of which is a grid."""
    frames, height, width = _film_thw(processor, clip)
    for frame in range(frames):
        yield from rows(height // 2, width // 2, grid=frame)


def thinned(processor: Any, clip: Clip) -> Cells:
    """VideoLLaMA 3: a frame of which tokens were left out is a row."""
    made = processor.video_processor([film(clip)], return_tensors="pt")
    ((frames, height, width),) = made["video_grid_thw"].tolist()
    for frame, kept in enumerate(made["video_compression_mask"].view(frames, -1).sum(1).tolist()):
        whole = kept == height // 2 * (width // 2)
        yield from rows(height // 2 if whole else 1, width // 2 if whole else kept, grid=frame)


def whole_and_unpadded(processor: Any, size: Size) -> Cells:
    """LLaVA-NeXT: a view, then the rows and columns that the picture takes up, each with a mark."""
    yield from rows(6, 6)
    yield from rows(*_unpadded(size), 1, marks=1)


def whole_and_shrunk(processor: Any, size: Size) -> Cells:
    """LLaVA-OneVision: what is more than one tile's worth is scaled down."""
    height, width = _unpadded(size)
    shrink = (height * width / 36) ** 0.5
    if shrink > 1.1:
        height, width = int(height // shrink), int(width // shrink)
    yield from rows(6, 6)
    yield from rows(height, width, 1, marks=1)


def tile_and_mark(processor: Any, size: Size) -> Cells:
    return chain(rows(6, 6), [None])


def crops_and_whole(processor: Any, size: Size) -> Cells:
    """Step 3.7: the crops, 4 x 4 tokens each, and then the whole picture."""
    number = crops(processor, size)
    for crop in range(number):
        yield from rows(4, 4, crop)
    yield from rows(6, 6, number)


def with_a_view(processor: Any, size: Size) -> int:
    """Ovis 2: the whole picture, and its tiles if there are several."""
    made = processor.image_processor([picture(size)], return_tensors="pt")
    ((across, down),) = made["grids"].tolist()
    return int(1 + across * down * (across * down > 1))


def of_positions(processor: Any, size: Size, cell: int = 3) -> Cells:
    """Gemma 4: the columns and rows of patches, of which cells are joined."""
    made = processor.image_processor([picture(size)], return_tensors="pt")
    columns, height = ((made["image_position_ids"][0].amax(0) + 1) // cell).tolist()
    yield from rows(height, columns)


def films_of_positions(processor: Any, clip: Clip, cell: int = 3) -> Cells:
    made = processor.video_processor([film(clip)], return_tensors="pt")
    for frame, places in enumerate(made["video_position_ids"].flatten(0, -3)):
        columns, height = ((places.amax(0) + 1) // cell).tolist()
        yield from rows(height, columns, grid=frame)


def of_targets(processor: Any, size: Size) -> Cells:
    """MiniCPM-V: the whole picture and its slices, in patches of which 4 x 4 are joined."""
    made = processor.image_processor([picture(size)], return_tensors="pt")
    cell = 2 if processor.image_processor.downsample_mode == "4x" else 4
    for grid, (height, width) in enumerate(made["target_sizes"].tolist()):
        yield from rows(height // cell, width // cell, grid)


def films_of_targets(processor: Any, clip: Clip) -> Cells:
    made = processor.video_processor([film(clip)], return_tensors="pt")
    cell = 2 if processor.video_processor.downsample_mode == "4x" else 4
    for grid, (height, width) in enumerate(made["target_sizes_videos"].tolist()):
        yield from rows(height // cell, width // cell, grid)


def lines_of_patches(processor: Any, size: Size) -> Cells:
    """Fuyu: a picture is shrunk to fit, and its patches of 4 x 4 pixels are tokens."""
    scale = min(1, 48 / size[0], 48 / size[1])
    yield from rows(*(-(-int(side * scale) // 4) for side in size))


# -- image processors ------------------------------------------------------------------------------


def clip() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=SQUARE)


def next_images() -> Any:
    return transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 48}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )


def tiles_of(side: int, **more: Any) -> Any:
    size = {"height": side, "width": side}
    return transformers.GotOcr2ImageProcessor(size=size, max_patches=6, **more)


def pixtral(patch: int, longest: int) -> Any:
    size = {"height": patch, "width": patch}
    return transformers.PixtralImageProcessor(size={"longest_edge": longest}, patch_size=size)


def cut(name: str = "Qwen2VL", **more: Any) -> Any:
    """An image processor that cuts pictures into cells of patches."""
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": CUT, **more}
    return getattr(transformers, f"{name}ImageProcessor")(**sizes)


def cut_films(name: str = "Qwen2VL", **more: Any) -> Any:
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": CUT_FILM, **more}
    return films(f"{name}VideoProcessor", **sizes)


# -- Qwen and those like it ------------------------------------------------------------------------

PADS = {"<|image_pad|>": tiny.IMAGE, "<|video_pad|>": tiny.VIDEO}
VISION = {"<|vision_start|>": tiny.VISION_START, "<|vision_end|>": tiny.VISION_END}


def qwen(
    kind: str,
    name: str,
    images: Any = cut,
    videos: Any = cut_films,
    frames: Any = together,
    write: Callable[[str], str] = str,
    **more: Any,
) -> Real:
    def build() -> Any:
        make = getattr(transformers, f"{name}Processor")
        return make(
            image_processor=images(),
            tokenizer=tokenizer({write(word): at for word, at in {**PADS, **VISION}.items()}),
            video_processor=videos(),
        )

    return Real(
        kind,
        build,
        of_thw,
        frames=frames,
        text=write("<|vision_start|><|image_pad|><|vision_end|>"),
        video=write("<|vision_start|><|video_pad|><|vision_end|>"),
        **more,
    )


def glm(kind: str, name: str, **more: Any) -> Real:
    def build() -> Any:
        size = {"shortest_edge": 512, "longest_edge": 5120}
        words = {
            "<|image|>": tiny.IMAGE,
            "<|video|>": tiny.VIDEO,
            "<|begin_of_image|>": tiny.VISION_START,
            "<|end_of_image|>": tiny.VISION_END,
            "<|begin_of_video|>": 3,
            "<|end_of_video|>": 4,
        }
        return getattr(transformers, f"{name}Processor")(
            image_processor=cut(name, size=size),
            tokenizer=tokenizer(words),
            video_processor=cut_films(name),
        )

    return Real(
        kind,
        build,
        of_thw,
        frames=apart,
        text="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>",
        **more,
    )


def omni(kind: str, name: str, **more: Any) -> Real:
    """The thinkers hear too; no prompt here has sound."""

    def build() -> Any:
        words = {**PADS, **VISION, "<|audio|>": 9, "<|audio_bos|>": 3, "<|audio_eos|>": 4}
        return getattr(transformers, f"{name}Processor")(
            image_processor=cut(),
            video_processor=cut_films(),
            feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16),
            tokenizer=tokenizer(
                words,
                image_token="<|image_pad|>",
                video_token="<|video_pad|>",
                audio_token="<|audio|>",
                vision_bos_token="<|vision_start|>",
                vision_eos_token="<|vision_end|>",
                audio_bos_token="<|audio_bos|>",
                audio_eos_token="<|audio_eos|>",
            ),
        )

    return Real(
        kind,
        build,
        of_thw,
        frames=together,
        text="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        options={"videos_kwargs": {"size": CUT_FILM}},
        **more,
    )


def ernie() -> Any:
    words = {
        **BOTH,
        **VISION,
        "<video_start>": 3,
        "<video_end>": 4,
    }
    return transformers.Ernie4_5_VLMoeProcessor(
        image_processor=cut("Ernie4_5_VLMoe", temporal_patch_size=1),
        tokenizer=tokenizer(
            words,
            image_token="<image>",
            video_token="<video>",
            image_start_token="<|vision_start|>",
            image_end_token="<|vision_end|>",
            video_start_token="<video_start>",
            video_end_token="<video_end>",
        ),
        video_processor=cut_films("Ernie4_5_VLMoe", draw_on_frames=False),
    )


PACKED = (
    qwen("qwen2_vl", "Qwen2VL"),
    qwen("qwen2_5_vl", "Qwen2_5_VL", often=False),
    qwen("exaone4_5", "Exaone4_5_"),
    qwen("hyperclovax_vision_v2", "HyperCLOVAXVisionV2", often=False),
    *(
        qwen(kind, "Qwen3VL", videos=partial(cut_films, "Qwen3VL"), frames=apart, often=often)
        for kind, often in (
            ("qwen3_vl", True),
            ("qwen3_vl-flat", False),
            ("qwen3_vl_moe", False),
            ("cosmos3_omni", False),
            ("qwen3_5", True),
            ("qwen3_5_moe", False),
        )
    ),
    qwen("lfm3_vl", "Lfm3Vl", videos=partial(cut_films, "Qwen3VL"), frames=apart),
    qwen(
        "cosmos3_edge",
        "Cosmos3Edge",
        partial(cut, "Cosmos3Edge", temporal_patch_size=1),
        partial(cut_films, "Cosmos3Edge", temporal_patch_size=1),
        apart,
        options={"return_mm_token_type_ids": True, "videos_kwargs": {"return_metadata": True}},
    ),
    qwen(
        "video_llama_3",
        "VideoLlama3",
        lambda: transformers.VideoLlama3ImageProcessor(
            patch_size=4, merge_size=1, min_pixels=4 * 4 * 8, max_pixels=4 * 4 * 60
        ),
        partial(cut_films, "VideoLlama3", temporal_patch_size=1),
        thinned,
    ),
    qwen(
        "cohere_compass",
        "CohereCompass",
        partial(cut, "CohereCompass"),
        partial(cut_films, "CohereCompass"),
        apart,
        str.upper,
    ),
    glm("glm4v", "Glm4v"),
    glm("glm4v_moe", "Glm4v", often=False),
    glm("glm46v", "Glm46V", often=False),
    glm("glm_ocr", "Glm46V", often=False),
    omni("qwen2_5_omni", "Qwen2_5Omni"),
    omni("qwen3_omni_moe", "Qwen3OmniMoe"),
    Real(
        "ernie4_5_vl_moe",
        ernie,
        of_thw,
        frames=partial(together, joined=2),
        text="<|vision_start|><image><|vision_end|>",
        video="<video_start><video><video_end>",
    ),
)


# -- others ---------------------------------------------------------------------------------------


def aria() -> Any:
    """Aria's processor knows two sizes of pictures, and takes this one where it is not told."""
    config = BY_NAME["aria"].config()
    config.vision_config.image_size, config.vision_config.patch_size = 980, 140
    config.projector_patch_to_query_dict = {49: 30}
    return config


FIRST = (
    Real(
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
    Real(
        "llava_next",
        lambda: transformers.LlavaNextProcessor(
            next_images(),
            tokenizer(IMAGE),
            patch_size=8,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
        ),
        whole_and_unpadded,
    ),
    Real(
        "granite4_vision",
        lambda: transformers.Granite4VisionProcessor(
            next_images(),
            tokenizer(IMAGE, image_token="<image>"),
            patch_size=4,
            vision_feature_select_strategy="full",
            image_token="<image>",
            downsample_rate="2/4",
        ),
        whole_and_unpadded,
    ),
    Real(
        "paligemma",
        lambda: transformers.PaliGemmaProcessor(
            transformers.SiglipImageProcessor(size=SQUARE, image_seq_length=36),
            tokenizer(IMAGE, image_token="<image>"),
        ),
        squares(6, one),
    ),
    Real(
        "gemma3",
        lambda: transformers.Gemma3Processor(
            transformers.Gemma3ImageProcessor(size=SQUARE),
            tokenizer(
                {**IMAGE, **AROUND}, image_token="<image>", boi_token="<open>", eoi_token="<close>"
            ),
            image_seq_length=36,
        ),
        squares(6, one),
        text="<open>",
        nested=True,
    ),
    Real(
        "idefics3",
        lambda: transformers.Idefics3Processor(
            transformers.Idefics3ImageProcessor(
                size={"longest_edge": 96}, max_image_size={"longest_edge": 48}
            ),
            tokenizer({**IMAGE, "<fake_token_around_image>": 6, "<end_of_utterance>": 9}),
            image_seq_len=36,
        ),
        squares(6, tiles_made),
        nested=True,
    ),
    Real(
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
    Real(
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
    Real(
        "deepseek_vl",
        lambda: transformers.DeepseekVLProcessor(
            transformers.DeepseekVLImageProcessor(size=SQUARE, min_size=4),
            tokenizer(IMAGE, image_token="<image>"),
            num_image_tokens=36,
        ),
        squares(6, one),
    ),
    Real(
        "deepseek_vl_hybrid",
        lambda: transformers.DeepseekVLHybridProcessor(
            transformers.DeepseekVLHybridImageProcessor(
                size=SQUARE,
                high_res_size={"height": 96, "width": 96},
                min_size=4,
            ),
            tokenizer(IMAGE, image_token="<image>"),
            num_image_tokens=36,
        ),
        squares(6, one),
    ),
    Real(
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
        nested=True,
    ),
    Real(
        "aria",
        lambda: transformers.AriaProcessor(
            transformers.AriaImageProcessor(),
            tokenizer(IMAGE, image_token="<image>"),
            size_conversion={980: 30},
        ),
        lambda processor, size: rows(1, 30),
        config=aria,
    ),
    Real(
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
    Real(
        "lighton_ocr",
        lambda: transformers.LightOnOcrProcessor(
            pixtral(8, 64),
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
    Real(
        "paddleocr_vl",
        lambda: transformers.PaddleOCRVLProcessor(
            cut("PaddleOCRVL", temporal_patch_size=1),
            tokenizer(IMAGE, image_token="<image>"),
        ),
        of_thw,
    ),
    Real(
        "hunyuan_vl",
        lambda: transformers.HunYuanVLProcessor(
            cut("HunYuanVL", temporal_patch_size=1),
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


# -- those that came later -------------------------------------------------------------------------


def llava(kind: str, **more: Any) -> Real:
    return Real(
        kind,
        lambda: transformers.LlavaProcessor(
            clip(),
            tokenizer(IMAGE),
            patch_size=8,
            image_token="<image>",
            **{
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
                **more,
            },
        ),
        squares(6, one),
        often=False,
    )


def internvl() -> Any:
    return transformers.InternVLProcessor(
        tiles_of(48, crop_to_patches=True),
        tokenizer(
            {**BOTH, **AROUND},
            start_image_token="<open>",
            end_image_token="<close>",
            context_image_token="<image>",
            video_token="<video>",
        ),
        films("InternVLVideoProcessor", size=SQUARE),
        image_seq_length=36,
    )


def onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer(BOTH),
        films("LlavaOnevisionVideoProcessor", size=SQUARE),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
    )


def next_video() -> Any:
    return transformers.LlavaNextVideoProcessor(
        films("LlavaNextVideoVideoProcessor", size={"shortest_edge": 48}, crop_size=SQUARE),
        next_images(),
        tokenizer(BOTH),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def video_llava() -> Any:
    return transformers.VideoLlavaProcessor(
        transformers.VideoLlavaImageProcessor(size={"shortest_edge": 48}, crop_size=SQUARE),
        films("VideoLlavaVideoProcessor", size={"shortest_edge": 48}, crop_size=SQUARE),
        tokenizer(BOTH),
        patch_size=8,
    )


def breaks(merge: int) -> Callable[[], Any]:
    """Pixtral's processor; where it cannot be imported, its image processor and what it writes."""

    def build() -> Any:
        images, words = pixtral(4 * merge, 64), tokenizer({**IMAGE, **AROUND})
        if TORCHVISION:
            return transformers.PixtralProcessor(
                images,
                words,
                patch_size=4,
                spatial_merge_size=merge,
                image_token="<image>",
                image_break_token="<open>",
                image_end_token="<close>",
            )

        def lines(made: Any, number: int) -> str:
            height, width = (side // (4 * merge) for side in made["image_sizes"][number])
            return "<open>".join(["<image>" * width] * height) + "<close>"

        return ImagesAlone(images, words, lines)

    return build


def ovis2() -> Any:
    words = {"<IMG_START>": 3, "<IMG_GRID>": 4, "<IMG_COL>": 6, "<IMG_ROW>": 7, "<IMG_END>": 9}
    return transformers.Ovis2Processor(
        transformers.Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=6),
        tokenizer({**words, "<IMG_ATOM>": tiny.IMAGE, "<image>": UNSEEN}),
        image_seq_length=36,
    )


def perception_lm() -> Any:
    return transformers.PerceptionLMProcessor(
        films("PerceptionLMVideoProcessor", size=SQUARE),
        transformers.PerceptionLMImageProcessor(size=SQUARE, tile_size=48, max_num_tiles=6),
        tokenizer(BOTH, image_token="<image>", video_token="<video>"),
        patch_size=4,
        pooling_ratio=2,
    )


def cohere2_vision() -> Any:
    return transformers.Cohere2VisionProcessor(
        transformers.Cohere2VisionImageProcessor(size=SQUARE, patch_size=6, max_patches=6),
        tokenizer(
            {**IMAGE, **AROUND, "<break>": 9},
            image_token="<image>",
            boi_token="<open>",
            eoi_token="<close>",
            img_line_break_token="<break>",
        ),
    )


def got_ocr2() -> Any:
    return transformers.GotOcr2Processor(
        tiles_of(96, crop_to_patches=True), tokenizer({"<imgpad>": tiny.IMAGE})
    )


def janus() -> Any:
    return transformers.JanusProcessor(
        transformers.JanusImageProcessor(size=SQUARE, min_size=4),
        tokenizer(
            {**IMAGE, **AROUND}, image_token="<image>", boi_token="<open>", eoi_token="<close>"
        ),
        num_image_tokens=36,
    )


def fuyu() -> Any:
    """Its processor drops the first id of a prompt, which the published tokenizer writes itself."""

    def lines(made: Any, number: int) -> str:
        height, width = _fuyu_sizes(made)[number]
        return ("<image>" * (width // 4) + "<newline>") * (height // 4)

    return ImagesAlone(
        transformers.FuyuImageProcessor(size=SQUARE, patch_size={"height": 4, "width": 4}),
        tokenizer({**IMAGE, "<newline>": 9}),
        lines,
    )


def _fuyu_sizes(made: Any) -> list[list[int]]:
    """Height and width of the patches that hold a part of each picture, in pixels."""
    sides = zip(made["image_unpadded_heights"], made["image_unpadded_widths"], strict=True)
    return [[4 * math.ceil(int(side) / 4) for (side,) in both] for both in sides]


def one_row_of_patches(made: dict[str, Any]) -> dict[str, Any]:
    """The patches that the model takes, of pictures with borders."""
    sizes = zip(made["images"], _fuyu_sizes(made), strict=True)
    patches = [
        _cells(torch.as_tensor(shown)[:, :height, :width], 1) for (shown,), (height, width) in sizes
    ]
    names = ("input_ids", "attention_mask")
    return {**{name: made[name] for name in names}, "pixel_values": torch.cat(patches)[None]}


SOUND = {"<audio>": 9, "<boa>": 3, "<eoa>": 4}
GEMMA = {
    "image_token": "<image>",
    "boi_token": "<open>",
    "eoi_token": "<close>",
    "audio_token": "<audio>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
}


def gemma3n() -> Any:
    return transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(),
        transformers.SiglipImageProcessor(size=SQUARE),
        tokenizer({**IMAGE, **AROUND, **SOUND}, **GEMMA),
        image_seq_length=36,
    )


def gemma4(name: str) -> Any:
    sizes = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    words = {**IMAGE, **AROUND, **SOUND, "<|video|>": tiny.VIDEO}
    return getattr(transformers, f"{name}Processor")(
        getattr(transformers, f"{name}AudioFeatureExtractor")(),
        getattr(transformers, f"{name}ImageProcessor")(**sizes),
        tokenizer(words, **GEMMA),
        films(f"{name}VideoProcessor", **sizes),
    )


def further_positions(kind: str) -> Callable[[], Any]:
    """The model of a row whose pictures may be longer."""

    def config() -> Any:
        made = BY_NAME[kind].config()
        made.vision_config.position_embedding_size = made.vision_config.mm_posemb_size = 512
        return made

    return config


def lfm2_vl() -> Any:
    words = {"<|image_start|>": 6, "<|image_end|>": 7, "<|img_thumbnail|>": 9}
    return transformers.Lfm2VlProcessor(
        transformers.Lfm2VlImageProcessor(
            tile_size=32,
            encoder_patch_size=4,
            min_image_tokens=4,
            max_image_tokens=30,
            max_tiles=6,
        ),
        tokenizer({**IMAGE, **words}),
    )


def tiles_and_thumbnail(processor: Any, size: Size) -> Cells:
    made = processor.image_processor([picture(size)], return_tensors="pt")
    for tile, (height, width) in enumerate(made["spatial_shapes"].tolist()):
        yield from rows(height // 2, width // 2, tile)


def minicpm(kind: str, name: str, images: str, mode: str = "16x", **more: Any) -> Real:
    def build() -> Any:
        sizes = {"scale_resolution": 64, "patch_size": 4, "max_slice_nums": 4}
        words = {
            **IMAGE,
            **AROUND,
            "<video>": 3,
            "<slice>": 8,
            "</slice>": 9,
            "<id>": UNSEEN,
            "</id>": UNSEEN + 1,
        }
        return getattr(transformers, f"{name}Processor")(
            getattr(transformers, f"{images}ImageProcessor")(**sizes),
            films(f"{images}VideoProcessor", **sizes, slice_mode=True, downsample_mode=mode),
            tokenizer(
                words,
                image_token="<image>",
                video_token="<video>",
                image_start_token="<open>",
                image_end_token="<close>",
                slice_start_token="<slice>",
                slice_end_token="</slice>",
                image_id_start_token="<id>",
                image_id_end_token="</id>",
            ),
        )

    return Real(kind, build, of_targets, frames=films_of_targets, ids=(tiny.IMAGE, 3), **more)


def in_float32(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "pixel_values": made["pixel_values"].float()}


def tiles_and_whole(processor: Any, size: Size) -> int:
    made = processor.image_processor([picture(size)], return_tensors="pt")
    ((down, across),) = made["aspect_ratios"].tolist()
    return int(down * across + (down * across > 1))


def llama4() -> Any:
    words = {
        "<|image_start|>": 3,
        "<|image|>": 4,
        "<|patch|>": tiny.IMAGE,
        "<|tile_x_separator|>": 6,
        "<|tile_y_separator|>": 7,
        "<|image_end|>": 9,
    }
    return transformers.Llama4Processor(
        transformers.Llama4ImageProcessor(size=SQUARE, max_patches=6),
        tokenizer(words),
        patch_size=4,
    )


def kimi() -> Any:
    """transformers 5.23 itself cannot pool the frames of a video to fewer features."""
    sizes = {"patch_size": 4, "merge_size": 2, "max_patches": 200}
    sizes["size"] = {"max_height": 64, "max_width": 64}
    words = {"<|media_begin|>": 6, "<|media_end|>": 7, "<|media_content|>": 9}
    words |= {"<|media_pad|>": tiny.IMAGE, "<|kimi_k25_video_placeholder|>": tiny.VIDEO}
    return transformers.Kimi_K25Processor(
        transformers.Kimi_K25ImageProcessor(**sizes),
        tokenizer(words),
        films("Kimi_K25VideoProcessor", **sizes),
    )


def muse(name: str) -> Any:
    words = {
        "<|patch|>": tiny.IMAGE,
        "<|video|>": tiny.VIDEO,
        "<|image_start|>": tiny.VISION_START,
        "<|image_end|>": tiny.VISION_END,
        "<|vid_start|>": 3,
        "<|vid_end|>": 4,
        "<|vid_frame_separator|>": 9,
        "<|audio|>": UNSEEN,
        "<|soft_audio_start|>": UNSEEN + 1,
        "<|soft_audio_end|>": UNSEEN + 2,
    }
    sizes = {"patch_size": 4, "temporal_patch_size": 1, "merge_size": 2}
    sound = {}
    if name == "MuseSpark":
        sound["feature_extractor"] = transformers.MuseSparkFeatureExtractor()
    return getattr(transformers, f"{name}Processor")(
        image_processor=transformers.MuseGlimmerImageProcessor(**sizes, max_image_tokens=40),
        video_processor=films("MuseGlimmerVideoProcessor", **sizes, max_video_frame_tokens=20),
        tokenizer=tokenizer(words),
        **sound,
    )


def molmo2() -> Any:
    words = {
        "<im_patch>": tiny.IMAGE,
        "<im_col>": 9,
        "<im_start>": 6,
        "<low_res_im_start>": 3,
        "<im_end>": 7,
        "<frame_start>": 4,
        "<frame_end>": 8,
        "<im_low>": UNSEEN,
        "<|image|>": UNSEEN + 1,
        "<|video|>": UNSEEN + 2,
    }
    sizes = {"size": {"height": 32, "width": 32}, "patch_size": 4, "pooling_size": [2, 2]}
    return transformers.Molmo2Processor(
        transformers.Molmo2ImageProcessor(**sizes, max_crops=4, overlap_margins=[1, 1]),
        films("Molmo2VideoProcessor", **sizes),
        tokenizer(words),
    )


def view_and_rows(processor: Any, size: Size) -> Cells:
    made = processor.image_processor([picture(size)], return_tensors="pt")
    ((low, wide, height, width),) = made["image_grids"].tolist()
    yield from rows(low, wide)
    yield from rows(height, width, 1)


def square_frames(processor: Any, clip: Clip) -> Cells:
    made = processor.video_processor([film(clip)], return_tensors="pt")
    ((frames, height, width),) = made["video_grids"].tolist()
    for frame in range(frames):
        yield from rows(height, width, frame)


def phi4_config() -> Any:
    """Its processor writes 16 rows and 16 columns for the whole picture."""
    config = BY_NAME["phi4_multimodal"].config()
    vision = config.vision_config
    vision.image_size = vision.crop_size = 64
    vision.patch_size = 2
    return config


def phi4() -> Any:
    size = {"height": 64, "width": 64}
    return transformers.Phi4MultimodalProcessor(
        transformers.Phi4MultimodalImageProcessor(size=size, patch_size=2, dynamic_hd=4),
        transformers.Phi4MultimodalFeatureExtractor(),
        tokenizer({**IMAGE, "<audio>": 9}, image_token="<image>", audio_token="<audio>"),
    )


def unpadded_and_whole(processor: Any, size: Size) -> Cells:
    made = processor.image_processor([picture(size)], return_tensors="pt")
    down, across = (made["image_sizes"][0] // 64).tolist()
    masks = made["image_attention_mask"][0, 1 : 1 + down * across, ::2, ::2]
    height = int(masks.unflatten(0, (down, across))[:, 0, :, 0].sum())
    width = int(masks.unflatten(0, (down, across))[0, :, 0].sum())
    yield from rows(height, width, marks=1)
    yield None
    yield from rows(16, 16, 1, marks=1)


def granite_docling() -> Any:
    return transformers.GraniteDoclingProcessor(
        transformers.GraniteDoclingImageProcessor(size=SQUARE, max_patches=6),
        tokenizer({**IMAGE, "<fake_token_around_image>": 6, "<global-img>": 9}),
        image_seq_len=36,
    )


def smolvlm() -> Any:
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(
            size={"longest_edge": 96}, max_image_size={"longest_edge": 48}
        ),
        tokenizer({**IMAGE, "<fake_token_around_image>": 6, "<end_of_utterance>": 9}),
        films("SmolVLMVideoProcessor"),
        image_seq_len=36,
    )


MORE = (
    llava("vipllava"),
    llava("fast_vlm", vision_feature_select_strategy="full", num_additional_image_tokens=0),
    Real("internvl", internvl, squares(6, crops), frames=squares(6, as_many_frames), even=True),
    Real(
        "llava_onevision",
        onevision,
        whole_and_shrunk,
        tile_and_mark,
        frames_in_one(3, ends=1),
        nested=True,
        even=True,
    ),
    Real(
        "llava_next_video",
        next_video,
        whole_and_unpadded,
        frames=frames_in_one(3),
        often=False,
        even=True,
    ),
    Real(
        "video_llava",
        video_llava,
        squares(6, one),
        frames=frames_in_one(6, marks=1),
        least=(4, 4),
        even=True,
    ),
    Real("mistral3", breaks(2), of_pixels(8)),
    Real("llava-pixtral", breaks(1), of_pixels(4)),
    Real("ovis2", ovis2, squares(6, with_a_view)),
    Real(
        "perception_lm",
        perception_lm,
        squares(6, tiles_made),
        frames=frames_in_one(6),
        most=1,
        batches=False,
        torchvision=True,
    ),
    Real("cohere2_vision", cohere2_vision, squares(6, crops), torchvision=True),
    Real(
        "got_ocr2",
        got_ocr2,
        squares(6, crops),
        text="<imgpad>",
        options={"crop_to_patches": True, "max_patches": 6, "num_image_tokens": 36},
        since="5.23",
    ),
    Real("janus", janus, squares(6, one)),
    Real(
        "fuyu",
        fuyu,
        lines_of_patches,
        least=(4, 4),
        fit=one_row_of_patches,
    ),
    Real("gemma3n", gemma3n, squares(6, one), nested=True),
    Real(
        "gemma4",
        partial(gemma4, "Gemma4"),
        partial(of_positions, cell=2),
        frames=partial(films_of_positions, cell=2),
        video="<|video|>",
        config=further_positions("gemma4"),
        nested=True,
    ),
    Real(
        "gemma4-shared",
        partial(gemma4, "Gemma4"),
        partial(of_positions, cell=2),
        frames=partial(films_of_positions, cell=2),
        video="<|video|>",
        config=further_positions("gemma4-shared"),
        nested=True,
        often=False,
    ),
    Real(
        "gemma4_unified",
        partial(gemma4, "Gemma4Unified"),
        partial(of_positions, cell=1),
        frames=partial(films_of_positions, cell=1),
        video="<|video|>",
        config=further_positions("gemma4_unified"),
        nested=True,
        torchvision=True,
    ),
    Real(
        "lfm2_vl",
        lfm2_vl,
        tiles_and_thumbnail,
        least=(24, 24),
        nested=True,
        torchvision=True,
    ),
    minicpm("minicpmv4_6", "MiniCPMV4_6", "MiniCPMV4_6"),
    minicpm("minicpmv4_7", "MiniCPMV4_7", "MiniCPMV4_6"),
    minicpm("minicpm_ocr", "MiniCPMOcr", "MiniCPMOcr", "4x", torchvision=True),
    Real(
        "llama4",
        llama4,
        squares(6, tiles_and_whole),
        text="<|image|>",
        torchvision=True,
        fit=in_float32,
    ),
    Real(
        "kimi_k25",
        kimi,
        of_thw,
        text="<|media_pad|>",
        torchvision=True,
    ),
    Real(
        "muse_glimmer",
        partial(muse, "MuseGlimmer"),
        of_thw,
        frames=apart,
        text="<|patch|>",
        options={"videos_kwargs": {"return_metadata": True}},
        video="<|video|>",
        torchvision=True,
    ),
    Real(
        "muse_spark",
        partial(muse, "MuseSpark"),
        of_thw,
        frames=apart,
        text="<|patch|>",
        options={"videos_kwargs": {"return_metadata": True}},
        video="<|video|>",
        torchvision=True,
        often=False,
    ),
    Real(
        "molmo2",
        molmo2,
        view_and_rows,
        frames=square_frames,
        text="<|image|>",
        video="<|video|>",
        ids=(tiny.IMAGE,),
        one_film=True,
        torchvision=True,
    ),
    Real(
        "phi4_multimodal",
        phi4,
        unpadded_and_whole,
        config=phi4_config,
        least=(64, 64),
        ids=(tiny.IMAGE,),
        torchvision=True,
    ),
    Real("granite_docling", granite_docling, squares(6, tiles_made), nested=True),
    Real("smolvlm", smolvlm, squares(6, tiles_made), nested=True, often=False, package="num2words"),
)
_PALIGEMMA = next(real for real in FIRST if real.kind == "paligemma")
REAL = tuple(
    real
    for real in (*PACKED, *FIRST, *MORE, replace(_PALIGEMMA, kind="paligemma2", often=False))
    if real.kind in BY_NAME
)
