"""Families whose images, or tiles of images, are squares of one size that the config fixes.

Each tile is a grid of its own, because the processors that cut images into tiles do not tell the
model how the tiles lie next to each other. The ids between tiles and rows of tiles are text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from atp_patch.contract import GridQuery, Span, Tower, VisualGrid
from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.families.base import Family, Grids, square_grids
from atp_patch.families.towers import last_block, read_tower, shuffled_tower, siglip_cells


def _number(size: Any) -> int:
    """Return the side of a square, which a config gives as one number or as (height, width)."""
    return int(size if isinstance(size, int) else size[0])


def _patches(config: Any) -> int:
    """Return how many patches lie along a side of the vision tower's picture."""
    vision = config.vision_config
    return _number(vision.image_size) // _number(vision.patch_size)


def _squares(side: Callable[[Any], int]) -> Callable[[GridQuery], Grids]:
    return lambda query: [square_grids(spans, side(query.config)) for spans in query.spans]


def _internvl_side(config: Any) -> int:
    return round(_patches(config) * config.downsample_ratio)


def _idefics3_side(config: Any) -> int:
    return _patches(config) // int(config.scale_factor)


def _llama4_side(config: Any) -> int:
    return round(_patches(config) * config.vision_config.pixel_shuffle_ratio)


def _whole_runs(query: GridQuery) -> Grids:
    """Read each run as one square of a size of its own.

    Granite Docling's tiles go through the connector on a coarse or a fine way; Step 3.7's crops are
    smaller than the whole picture.
    """
    return [
        [grid for span in spans for grid in square_grids([span], math.isqrt(span.length))]
        for spans in query.spans
    ]


def _gemma3_side(config: Any) -> int:
    return math.isqrt(config.mm_tokens_per_image)


def _ovis2_side(config: Any) -> int:
    return math.ceil(_patches(config) / int(config.vision_config.hidden_stride))


def _cohere_side(config: Any) -> int:
    return _patches(config) // int(config.downsample_factor)


def _got_ocr2_side(config: Any) -> int:
    """Return the side of an image, after the two convolutions of stride 2 behind the vision
    tower.
    """
    return _patches(config) // 4


def _aligned_tower(config: Any) -> Tower:
    """Return DeepSeek-VL's and Janus's tower; the hybrid's aligner adds features of a second
    tower.
    """
    return Tower(
        modules=("vision_model",),
        blocks="encoder.layers",
        block=last_block(config),
        projector="aligner",
        tokenwise=config.model_type != "deepseek_vl_hybrid",
        patch=_number(config.vision_config.patch_size),
        square=True,
    )


def _idefics3_tower(config: Any, projector: str = "connector") -> Tower:
    return read_tower(
        config,
        modules=("vision_model",),
        blocks="encoder.layers",
        projector=projector,
        packed=False,
    )


def _granite_docling_tower(config: Any) -> Tower:
    """Return the tower, whose last part is the connector; that ends in a layer that is given each
    tile apart.
    """
    return _idefics3_tower(config, "vision_model.connector.mlp_fc2")


def _ovis2_tower(config: Any) -> Tower:
    """Return the tower, which makes a distribution over visual words for each token."""
    return read_tower(
        config,
        blocks="transformer.encoder.layers",
        attention="attention",
        projector="vision_tower.head_norm",
        packed=False,
    )


def _llama4_tower(config: Any) -> Tower:
    """Return the tower; its class token stands behind the patches, and the adapter joins cells."""
    return read_tower(
        config,
        modules=("vision_model",),
        blocks="model.layers",
        projector="vision_model.vision_adapter",
        class_token=True,
        class_last=True,
        packed=False,
    )


def _fast_vlm_side(config: Any, span: Span) -> int:
    """Return the side of the images in a run of FastVLM's placeholders.

    The config knows how many tokens an image of the usual size has, and nothing of patches. A run
    that is no multiple of that number is one image.
    """
    usual = int(config.image_seq_length)
    return math.isqrt(span.length if span.length % usual else usual)


def _fast_vlm_grids(query: GridQuery) -> Grids:
    return [
        [
            grid
            for span in spans
            for grid in square_grids([span], _fast_vlm_side(query.config, span))
        ]
        for spans in query.spans
    ]


def _perception_lm_side(config: Any) -> int:
    """Return the tokens along a side of PerceptionLM's tiles: the patches of its timm tower,
    pooled.
    """
    patches = (config.vision_config.model_args or {}).get("ref_feat_shape")
    if patches is None:
        raise UnsupportedModelError(
            "the config does not say how many patches the vision tower makes: set "
            "config.vision_config.model_args['ref_feat_shape'] = (rows, columns)."
        )
    return _number(patches) // int(config.projector_pooling_ratio)


def _perception_lm_grids(query: GridQuery) -> Grids:
    """Read each run of image placeholders as tiles, and each run of a video as its frames."""
    config: Any = query.config
    side = _perception_lm_side(config)

    def grids(span: Span) -> list[VisualGrid]:
        tiles = square_grids([span], side)
        if span.token_id != config.video_token_id:
            return tiles
        return [VisualGrid(span.start, len(tiles), side, side)]

    return [[grid for span in spans for grid in grids(span)] for spans in query.spans]


INTERNVL = Family(
    name="internvl",
    model_types=("internvl", "qianfan_ocr"),
    grids=_squares(_internvl_side),
    tower=shuffled_tower,
    resizable=True,
    layout="one square a tile",
)
IDEFICS3 = Family(
    name="idefics3",
    model_types=("idefics3", "smolvlm"),
    grids=_squares(_idefics3_side),
    tower=_idefics3_tower,
    read_only=True,
    layout="one square a tile",
)
PALIGEMMA = Family(
    name="paligemma",
    model_types=("paligemma",),
    grids=_squares(_patches),
    causal=False,
    visual_tokens=lambda config: _patches(config) ** 2,
    tower=lambda config: siglip_cells(config, 1, mergeable=False),
    read_only=True,
    layout="one square an image",
)
GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3", "shieldgemma2"),
    grids=_squares(_gemma3_side),
    causal=False,
    visual_tokens=lambda config: int(config.mm_tokens_per_image),
    tower=lambda config: siglip_cells(
        config, _patches(config) // _gemma3_side(config), mergeable=False
    ),
    read_only=True,
    layout="one square an image",
)
GEMMA3N = Family(
    name="gemma3n",
    model_types=("gemma3n",),
    grids=_squares(lambda config: math.isqrt(config.vision_soft_tokens_per_image)),
    visual_tokens=lambda config: int(config.vision_soft_tokens_per_image),
    told_kinds=True,
    layout="one square an image",
)
OVIS2 = Family(
    name="ovis2",
    model_types=("ovis2",),
    grids=_squares(_ovis2_side),
    tower=_ovis2_tower,
    read_only=True,
    layout="one square a tile",
)
FAST_VLM = Family(
    name="fast_vlm",
    model_types=("fast_vlm",),
    grids=_fast_vlm_grids,
    layout="one square an image",
)
LLAMA4 = Family(
    name="llama4",
    model_types=("llama4",),
    grids=_squares(_llama4_side),
    tower=_llama4_tower,
    read_only=True,
    layout="one square a tile",
)
GRANITE_DOCLING = Family(
    name="granite_docling",
    model_types=("granite_docling",),
    grids=_whole_runs,
    late_layers=lambda config: len(config.vision_config.deepstack_visual_indexes),
    tower=_granite_docling_tower,
    read_only=True,
    layout="one square a tile",
)
AYA_VISION = Family(
    name="aya_vision",
    model_types=("aya_vision", "cohere2_vision"),
    grids=_squares(_cohere_side),
    tower=lambda config: siglip_cells(config, int(config.downsample_factor)),
    layout="one square a tile",
)
GOT_OCR2 = Family(
    name="got_ocr2",
    model_types=("got_ocr2", "pp_chart2table"),
    grids=_squares(_got_ocr2_side),
    layout="one square a crop",
)
DEEPSEEK_VL = Family(
    name="deepseek_vl",
    model_types=("deepseek_vl", "deepseek_vl_hybrid", "janus"),
    grids=_squares(_patches),
    visual_tokens=lambda config: _patches(config) ** 2,
    tower=_aligned_tower,
    layout="one square an image",
)
STEP3P7 = Family(
    name="step3p7",
    model_types=("step3p7",),
    grids=_whole_runs,
    layout="one square a crop, a larger one for the whole",
)
PERCEPTION_LM = Family(
    name="perception_lm",
    model_types=("perception_lm",),
    grids=_perception_lm_grids,
    token_ids=("image_token_id", "video_token_id"),
    layout="one square a tile; videos as frames",
)
