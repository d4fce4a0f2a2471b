"""Pictures whose grids the call's own arguments tell, in the order of their placeholders.

These are EXAONE 4.5, HyperCLOVA X SEED, Muse and VideoLLaMA 3, whose positions count tokens;
LightOnOCR, whose rows have no marks between them; HunyuanOCR; and Qwen-VL and GLM where the caller
gives position ids that show no grids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from atp_patch.contract import GridQuery, Span, Tower, VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.families.base import Family, Grids
from atp_patch.families.towers import mixed_tower, packed_tower, pixtral_tower, read_tower

IMAGES, VIDEOS, PIXELS = "image_grid_thw", "video_grid_thw", "image_sizes"
Films = deque[tuple[int, int, int]]  # frames, rows and columns of tokens
Place = Callable[[Span, str, Films], list[VisualGrid]]


def by_grid_thw(query: GridQuery) -> Grids:
    """Return the grids that ``image_grid_thw`` and ``video_grid_thw`` tell."""
    if not query.grid_thw:
        raise InputError(
            "the position ids of this call do not show the grids of its visual tokens; pass "
            f"{IMAGES} (and {VIDEOS} for videos) of the model's processor with it."
        )
    config: Any = query.config
    vision = config.vision_config
    side = int(getattr(vision, "spatial_merge_size", None) or vision.merge_size)
    joined = int(getattr(vision, "temporal_merge_size", 1))  # frames that make one
    films = {
        IMAGES: deque((t, h // side, w // side) for t, h, w in rows_of(query, IMAGES)),
        VIDEOS: deque((t // joined, h // side, w // side) for t, h, w in rows_of(query, VIDEOS)),
    }
    return in_order(query, films, partial(_kind, query), whole)


def rows_of(query: GridQuery, name: str) -> list[list[int]]:
    """Return the frames, rows and columns of patches that an argument tells; empty if it did not
    come.
    """
    given = query.grid_thw.get(name)
    rows: list[list[int]] = [] if given is None else given.tolist()
    return rows


def in_order(
    query: GridQuery,
    films: Mapping[str, Films],
    kind: Callable[[int, Span], str],
    place: Place,
) -> Grids:
    """Place the grids of the pictures that the call brought where placeholders stand, in order.

    Args:
        query: what is known of the call.
        films: for each argument, its pictures; they are used up.
        kind: from the number of a sample and a run of placeholders to the argument that holds the
            run's pictures.
        place: from a run, the name of the argument and the pictures left in it to the run's grids.

    Raises:
        InputError: where the arguments tell more pictures than have placeholders.
    """
    found: Grids = []
    for b, spans in enumerate(query.spans):
        if b % query.repeats:
            found.append(found[-1])
            continue
        kinds = [kind(b, span) for span in spans]
        runs = [place(span, name, films[name]) for span, name in zip(spans, kinds, strict=True)]
        found.append([grid for run in runs for grid in run])
    for name, rest in films.items():
        if rest:
            raise InputError(
                f"{name} has {len(rest)} pictures more than the prompts have placeholders for; "
                "pass the grids of these prompts alone."
            )
    return found


def _kind(query: GridQuery, sample: int, span: Span) -> str:
    """Tell which argument holds the grid of a run of placeholders."""
    config: Any = query.config
    if query.ids is None:
        if len(query.grid_thw) > 1:
            raise InputError(
                f"inputs_embeds do not tell images from videos, and both {IMAGES} and {VIDEOS} "
                "came: pass input_ids in place of inputs_embeds, or multimodal position_ids (3, "
                "batch, sequence) as model.model.get_rope_index makes them."
            )
        return next(iter(query.grid_thw))
    before = query.ids[sample, : span.start]
    opened, closed = (
        int((before == getattr(config, f"video_{side}_token_id", -1)).sum())
        for side in ("start", "end")
    )
    return VIDEOS if span.token_id == config.video_token_id or opened > closed else IMAGES


def whole(span: Span, name: str, films: Films) -> list[VisualGrid]:
    """Read a run of placeholders as the pictures that come next; frames may stand in several
    runs.
    """
    grids = []
    at = span.start
    while at < span.stop:
        frames, height, width = films.popleft() if films else (0, 1, 1)
        there = min(frames, (span.stop - at) // (height * width))
        if not there:
            raise mismatch(span, name)
        if frames > there:
            films.appendleft((frames - there, height, width))
        grids.append(VisualGrid(at, there, height, width))
        at += there * height * width
    return grids


def mismatch(span: Span, name: str) -> InputError:
    """Return the error for a run that is not what the argument says."""
    return InputError(
        f"{span.length} visual tokens from position {span.start} on are not the pictures "
        f"that {name} says come there; let the model's own processor make both."
    )


def _pixels(query: GridQuery) -> Grids:
    """Return LightOnOCR's grids, from the sizes of its images in pixels."""
    config: Any = query.config
    if PIXELS not in query.sizes_given:
        raise InputError(
            f"nothing stands between the rows of this model's images: pass {PIXELS} of the "
            "model's processor with the call, to generate too."
        )
    side = int(config.vision_config.patch_size) * int(config.spatial_merge_size)
    sizes = query.sizes_given[PIXELS].tolist()
    films = {PIXELS: deque((1, height // side, width // side) for height, width in sizes)}
    return in_order(query, films, lambda _, span: PIXELS, whole)


def _merged_each(query: GridQuery) -> Grids:
    """Return VideoLLaMA 3's grids; an argument says how many patches of each picture become one
    token.

    Each frame of a video is a run of its own. Frames from which the processor dropped tokens that
    hardly changed are no grids any more; what is left of one is a single row.
    """
    config: Any = query.config
    films: dict[str, Films] = {}
    for name, merged in ((IMAGES, "image_merge_sizes"), (VIDEOS, "video_merge_sizes")):
        rows = rows_of(query, name)
        if rows and merged not in query.sizes_given:
            raise InputError(f"{name} came without {merged}; pass both to the call.")
        sides = query.sizes_given[merged].tolist() if rows else []
        each = [(t, h // side, w // side) for (t, h, w), side in zip(rows, sides, strict=True)]
        films[name] = deque((1, h, w) for t, h, w in each for _ in range(t))

    def place(span: Span, name: str, left: Films) -> list[VisualGrid]:
        if name == IMAGES:
            return whole(span, name, left)
        _, height, width = left.popleft() if left else (0, 0, 0)
        if span.length > height * width:
            raise mismatch(span, name)
        if span.length == height * width:
            return [VisualGrid(span.start, 1, height, width)]
        return [VisualGrid(span.start, 1, 1, span.length)]

    video = config.video_token_id
    return in_order(
        query, films, lambda _, span: VIDEOS if span.token_id == video else IMAGES, place
    )


def _between_marks(query: GridQuery) -> Grids:
    """Return HunyuanOCR's grids: a newline ends each row, and the processor may put marks around
    them all.

    Newlines and marks have the id of the image.
    """
    config: Any = query.config
    side = int(config.vision_config.spatial_merge_size)
    films = {IMAGES: deque((1, h // side, w // side) for _, h, w in rows_of(query, IMAGES))}

    def place(span: Span, name: str, left: Films) -> list[VisualGrid]:
        _, height, width = left.popleft() if left else (0, 0, 0)
        marks, odd = divmod(span.length - height * (width + 1), 2)
        if not height or odd or marks not in (0, 1):
            raise mismatch(span, name)
        return [VisualGrid(span.start + marks, 1, height, width, row_stride=width + 1)]

    return in_order(query, films, lambda _, span: IMAGES, place)


def _pooled(query: GridQuery) -> Grids:
    """Return Kimi K2.5's grids: the frames of one chunk of a video are pooled to one picture."""
    if not query.grid_thw:
        raise InputError(
            f"nothing else tells the grids of this model's images: pass {IMAGES} (and {VIDEOS} for "
            "videos) of its processor with the call, to generate too."
        )
    config: Any = query.config
    rows, columns = (int(side) for side in config.vision_config.merge_kernel_size)
    films: dict[str, Films] = {
        name: deque(
            (1, height // rows, width // columns) for _, height, width in rows_of(query, name)
        )
        for name in (IMAGES, VIDEOS)
    }
    return in_order(query, films, partial(_kind, query), whole)


def _exaone_tower(config: Any) -> Tower | None:
    """Return the tower of Qwen2.5-VL; HyperCLOVA X SEED has a further layer behind its merger."""
    if config.model_type == "exaone4_5":
        return packed_tower(config)
    if not str(config.vision_config.model_type).startswith("qwen2_5_vl"):
        return None
    tower = packed_tower(config, mergeable=False)
    return replace(tower, modules=("vision_model",), projector="projector")


def _muse_tower(config: Any) -> Tower | None:
    vision = config.vision_config
    return mixed_tower(
        config,
        attention="attn",
        projector="vision_projection",
        by_rows=True,
        cell=int(vision.merge_size),
        window=int(vision.pos_emb_height),
    )


def _video_llama_3_tower(config: Any) -> Tower:
    return read_tower(
        config,
        modules=("vision_model",),
        blocks="encoder.layers",
        projector="projector",
        cells="merge_sizes",
    )


def _hunyuan_tower(config: Any) -> Tower:
    return read_tower(
        config,
        projector="vision_tower.patch_merger",
        by_rows=True,
        cell=int(config.vision_config.spatial_merge_size),
    )


def _kimi_tower(config: Any) -> Tower | None:
    rows, columns = (int(side) for side in config.vision_config.merge_kernel_size)
    if rows != columns:
        return None
    return read_tower(config, attention="attn", projector="mm_projector", by_rows=True, cell=rows)


LIGHTON_OCR = Family(
    name="lighton_ocr",
    model_types=("lighton_ocr",),
    grids=_pixels,
    tower=lambda config: pixtral_tower(
        config, module="vision_encoder", projector="vision_projection"
    ),
    read_only=True,
    layout="rows x columns",
)


EXAONE4_5 = Family(
    name="exaone4_5",
    model_types=("exaone4_5", "hyperclovax_vision_v2"),
    grids=by_grid_thw,
    token_ids=("image_token_id", "video_token_id"),
    tower=_exaone_tower,
    layout="frames x rows x columns",
)
MUSE = Family(
    name="muse",
    model_types=("muse_glimmer", "muse_spark"),
    grids=by_grid_thw,
    token_ids=("image_token_id", "video_token_id"),
    tower=_muse_tower,
    read_only=True,
    layout="rows x columns, each frame for itself",
)
VIDEO_LLAMA_3 = Family(
    name="video_llama_3",
    model_types=("video_llama_3",),
    grids=_merged_each,
    token_ids=("image_token_id", "video_token_id"),
    tower=_video_llama_3_tower,
    read_only=True,
    layout="rows x columns, each frame for itself; a frame that was thinned out is one row",
)
HUNYUAN_VL = Family(
    name="hunyuan_vl",
    model_types=("hunyuan_vl",),
    grids=_between_marks,
    tower=_hunyuan_tower,
    read_only=True,
    layout="rows x columns, a newline behind each row",
)
KIMI_K25 = Family(
    name="kimi_k25",
    model_types=("kimi_k25",),
    grids=_pooled,
    token_ids=("image_token_id", "video_token_id"),
    tower=_kimi_tower,
    read_only=True,
    layout="rows x columns, each chunk of frames for itself",
)
