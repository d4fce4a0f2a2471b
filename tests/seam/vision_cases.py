"""The plain model made to use PruMerge's tokens, family by family, without the package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.families import anyres, hybrids, more_mrope, more_square, mrope, sized, square, towers
from tests.families.hosts import can_be_built
from tests.families.kinds import VIDEO, Kind, Picture, Sample, Words, make, sample
from tests.helpers import inputs as made
from tests.helpers import tiny
from tests.helpers.inputs import Inputs, real_mask
from tests.helpers.merging import (
    Group,
    attention_of,
    chosen,
    merged,
    replaced,
    rows_in_sequence,
)
from tests.helpers.oracle import masked_logits

TABLES = (square, anyres, towers, mrope, more_square, more_mrope, sized, hybrids)
KINDS = {kind.name: kind for table in TABLES for kind in table.KINDS if can_be_built(kind)}
NEIGHBOURS = 5
TILED = (
    sample(Words(3), Picture(0), Words(9), seed=1),
    sample(Words(2), Picture(1), Words(4), Picture(0), Words(5), seed=6),
    sample(Words(13), seed=7),
)
SMALL = (TILED[0], TILED[2], sample(Words(5), Picture(0), Words(3), seed=8))
PAIRS = (  # LLaVA-OneVision leaves each of several pictures one tile
    sample(Words(3), Picture(0), Words(2), Picture(1), Words(9), seed=1),
    TILED[2],
    sample(Words(5), Picture(1), Picture(0), Words(1), Picture(1), Words(3), seed=8),
)
FILMS = (TILED[0], sample(Words(2), Picture(0), Words(2), Picture(VIDEO), Words(6), seed=12))


def part_of(model: Any, name: str) -> Any:
    """The module within the base model (or within the model, if it has none) that has a name.

    In early versions of transformers some towers are models around the one with the blocks.
    """
    names = (name, name.replace(".", ".vision_model.", 1))
    modules = dict(getattr(model, "model", model).named_modules())
    return next(modules[name] for name in names if name in modules)


@dataclass(frozen=True)
class Case:
    """One family: how to build and feed its tiny model, and where its tower is.

    Attributes:
        attentions: names of the attention modules whose q and k count, one a tower.
        query, key: names of the modules within that put out q and k; packed towers have one.
        inputs_merged: the projector's inputs are merged, not its outputs.
        beams: whether the plain model can search with beams: transformers trips over the features
            of deepstack where there are none.
        sizes: the argument that says how high and wide each picture is, where a tower takes
            pictures of any size and their patches lie row by row.
    """

    name: str
    build: Callable[[], Any]
    feed: Callable[[Any, str], Inputs]
    count: int
    attentions: tuple[str, ...]
    query: str = "q_proj"
    key: str = "k_proj"
    projector: str = "multi_modal_projector"
    inputs_merged: bool = True
    class_token: bool = True
    packed: bool = False
    beams: bool = True
    sizes: str = ""

    def alone(self, model: Any, number: int) -> Inputs:
        """One sample of ``feed``."""
        return self.feed(model, f"left {number}")


def _tiny(kind: str, prompts: tuple[Any, ...], **facts: Any) -> Case:
    def feed(model: Any, how: str) -> Inputs:
        padding, _, number = how.partition(" ")
        chosen = [prompts[int(number)]] if number else prompts
        return made.batch(model, chosen, padding)

    return Case(kind, lambda: tiny.tiny_model(kind), feed, len(prompts), **facts)


def _family(name: str, samples: tuple[Sample, ...], **facts: Any) -> Case:
    kind: Kind = KINDS[name]

    def feed(model: Any, how: str) -> Inputs:
        padding, _, number = how.partition(" ")
        return make(kind, [samples[int(number)]] if number else samples, padding).inputs

    return Case(name, kind.build, feed, len(samples), **facts)


_CLIP = "vision_tower.encoder.layers.{}.self_attn"
QWEN = {
    "query": "qkv",
    "projector": "visual.merger",
    "inputs_merged": False,
    "class_token": False,
    "packed": True,
}
CASES = (
    _tiny("llava-llama", made.MIXED, attentions=(_CLIP.format(0),)),
    _tiny("qwen2_vl", made.VIDEO, attentions=("visual.blocks.1.attn",), **QWEN),
    _tiny("qwen2_5_vl", made.MIXED, attentions=("visual.blocks.1.attn",), **QWEN),
    _family("vipllava", SMALL, attentions=(_CLIP.format(1),)),
    _family("qwen3_vl-flat", FILMS, attentions=("visual.blocks.1.attn",), beams=False, **QWEN),
    _family(
        "video_llava",
        FILMS,
        attentions=tuple(f"{t}_tower.encoder.layers.0.self_attn" for t in ("image", "video")),
    ),
    _family("llava_next", TILED, attentions=(_CLIP.format(0),)),
    _family("llava_next_video", FILMS, attentions=(_CLIP.format(0),)),
    _family("llava_onevision", PAIRS, attentions=(_CLIP.format(1),), class_token=False),
    _family(
        "internvl",
        TILED,
        attentions=("vision_tower.encoder.layer.1.attention",),
        query="q_norm",
        key="k_norm",
        inputs_merged=False,
    ),
)

_CELLS: dict[str, Any] = {
    "attentions": ("vision_tower.encoder.layers.1.self_attn",),
    "inputs_merged": False,
    "class_token": False,
}
_ALIGNED: dict[str, Any] = {
    "attentions": ("vision_model.encoder.layers.1.self_attn",),
    "projector": "aligner",
    "class_token": False,
}
_PIXTRAL: dict[str, Any] = {
    "attentions": ("vision_tower.transformer.layers.1.attention",),
    "inputs_merged": False,
    "class_token": False,
    "packed": True,
    "sizes": "image_sizes",
}
_FACTS: dict[str, dict[str, Any]] = {
    "llava-pixtral": _PIXTRAL,
    "mistral3": _PIXTRAL,
    "lighton_ocr": {
        **_PIXTRAL,
        "attentions": ("vision_encoder.transformer.layers.1.attention",),
        "projector": "vision_projection",
    },
    "lfm2_vl": {**_CELLS, "sizes": "spatial_shapes"},
    "aya_vision": _CELLS,
    "cohere2_vision": _CELLS,
    "gemma3": _CELLS,
    "deepseek_vl": _ALIGNED,
    "deepseek_vl_hybrid": {**_ALIGNED, "inputs_merged": False},
    "janus": _ALIGNED,
    "qwen3_vl": {"attentions": ("visual.blocks.1.attn",), **QWEN},
    **{
        name: {"attentions": ("visual.blocks.1.attn",), **QWEN}
        for name in ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    },
    "exaone4_5": {"attentions": ("visual.blocks.1.attn",), **QWEN},
    "qianfan_ocr": {
        "attentions": ("vision_tower.layers.1.attention",),
        "query": "q_norm",
        "key": "k_norm",
        "inputs_merged": False,
    },
}
# Towers of later families, which methods at the door read; an early version may lack some.
MORE = tuple(
    _family(name, FILMS if name in ("qwen3_vl", "exaone4_5") else TILED, **facts)
    for name, facts in _FACTS.items()
    if name in KINDS
)


@dataclass
class Read:
    """One call of the tower and the projector: (G, H, S, d) q and k, or their frames; features."""

    query: list[Tensor]
    key: list[Tensor]
    features: Tensor
    frames: list[list[tuple[int, int]]] | None


def read(case: Case, plain: Any, inputs: Inputs) -> list[Read]:
    """What tower and projector compute for these inputs."""
    twin = copy.deepcopy(plain)
    found: dict[str, list[Any]] = {"q": [], "k": [], "tables": [], "features": []}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, output: found[name].append(output)

    for name in case.attentions:
        attention = part_of(twin, name)
        attention.get_submodule(case.query).register_forward_hook(note("q"))
        if case.packed:
            attention.register_forward_pre_hook(
                lambda _, args, kwargs: found["tables"].append(kwargs["position_embeddings"]),
                with_kwargs=True,
            )
        if case.sizes or not case.packed:
            attention.get_submodule(case.key).register_forward_hook(note("k"))
    projector = twin.model.get_submodule(case.projector)
    if case.inputs_merged:
        projector.register_forward_pre_hook(lambda _, args: found["features"].append(args[0]))
    else:
        projector.register_forward_hook(note("features"))
    with torch.no_grad():
        twin(**inputs)
    if case.sizes:
        return _row_by_row(case, plain.config, found, inputs[case.sizes])
    if case.packed:
        grids = [inputs[n] for n in ("image_grid_thw", "video_grid_thw") if n in inputs]
        return [_packed(case, plain, found, at, grid) for at, grid in enumerate(grids)]
    heads = plain.config.vision_config.num_attention_heads
    split = [
        [list(t.unflatten(-1, (heads, -1)).transpose(1, 2)) for t in found[name]] for name in "qk"
    ]
    return [
        Read(q, k, features, None) for q, k, features in zip(*split, found["features"], strict=True)
    ]


def _row_by_row(case: Case, config: Any, found: dict[str, list[Any]], sizes: Tensor) -> list[Read]:
    """Of pictures that all stand in one row, or each in one of its own; patch by patch in order."""
    vision = config.vision_config
    cell = getattr(config, "downsample_factor", getattr(config, "spatial_merge_size", 1))
    step = 1 if case.sizes == "spatial_shapes" else vision.patch_size
    pictures: list[tuple[Tensor, Tensor, list[tuple[int, int]]]] = []
    start = 0
    for number, (height, width) in enumerate((sizes // step).tolist()):
        high, wide = height // cell, width // cell
        order = [
            start + (row * cell + a) * width + column * cell + b
            for row in range(high)
            for column in range(wide)
            for a in range(cell)
            for b in range(cell)
        ]
        one = []
        for name in "qk":
            heads = found[name][0][0 if case.packed else number].unflatten(
                -1, (vision.num_attention_heads, -1)
            )
            if case.packed:
                cos, sin = (table.unsqueeze(1) for table in found["tables"][0])
                first, second = heads.chunk(2, -1)
                heads = heads * cos + torch.cat([-second, first], -1) * sin
            one.append(heads[order].transpose(0, 1))
        start += height * width if case.packed else 0
        pictures.append((*one, [(r, c) for r in range(high) for c in range(wide)]))
    if case.packed:
        queries, keys, places = (list(part) for part in zip(*pictures, strict=True))
        return [Read(queries, keys, found["features"][0], places)]
    return [  # the projector takes one picture after the other
        Read([query], [key], features, [places])
        for (query, key, places), features in zip(pictures, found["features"], strict=True)
    ]


def _packed(case: Case, plain: Any, found: dict[str, list[Any]], at: int, grid: Tensor) -> Read:
    vision = plain.config.vision_config
    heads = vision.num_heads
    width = vision.hidden_size if hasattr(vision, "out_hidden_size") else vision.embed_dim
    made, groups = found["q"][at], getattr(vision, "num_key_value_heads", heads)
    size = width // heads
    query, key, _ = (
        part.unflatten(-1, (-1, size))
        for part in made.split([heads * size, groups * size, groups * size], -1)
    )
    attention = part_of(plain, case.attentions[0])
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query).detach(), attention.k_norm(key).detach()
    cos, sin = (table.unsqueeze(1) for table in found["tables"][at])

    def rotated(states: Tensor) -> Tensor:
        first, second = states.chunk(2, -1)
        return states * cos + torch.cat([-second, first], -1) * sin

    cell = vision.spatial_merge_size
    frames = [(h // cell, w // cell) for t, h, w in grid.tolist() for _ in range(t)]
    places = [[(i // w, i % w) for i in range(h * w)] for h, w in frames]
    if hasattr(vision, "window_size"):
        # Window by window from the top left, and row by row within a window.
        side = vision.window_size // cell // vision.patch_size
        places = [
            sorted(frame, key=lambda place: (place[0] // side, place[1] // side, place))
            for frame in places
        ]
    patches = [len(frame) * cell**2 for frame in places]
    split = [[part.transpose(0, 1) for part in rotated(t).split(patches)] for t in (query, key)]
    return Read(*split, found["features"][at], places)


def groups(case: Case, one: Read) -> tuple[list[Group], list[list[int]]]:
    """The groups of one call, and the rows of the features at which their tokens stand."""
    found, rows = [], []
    start = 0
    for number, (query, key) in enumerate(zip(one.query, one.key, strict=True)):
        attention, keys = attention_of(query, key, case.class_token)
        if one.frames is not None:
            places = one.frames[number]
            per = len(attention) // len(places)
            members = [list(range(i * per, (i + 1) * per)) for i in range(len(places))]
            rows.append(list(range(start, start + len(places))))
            start += len(places)
        else:
            size = one.features.shape[1:-1].numel()
            extra = int(case.class_token and size == query.shape[1])
            wide, small = (round(n**0.5) for n in (len(attention), size - extra))
            places = [(i // small, i % small) for i in range(small**2)]
            cell = wide // small
            members = [
                [(r * cell + a) * wide + c * cell + b for a in range(cell) for b in range(cell)]
                for r, c in places
            ]
            rows.append([number * size + extra + i for i in range(small**2)])
        found.append(
            Group(
                np.array([attention[m].sum() for m in members]),
                np.stack([keys[m].mean(0) for m in members]),
                places,
            )
        )
    return found, rows


def merged_features(
    case: Case, plain: Any, inputs: Inputs, plus: bool, share: float | None
) -> tuple[Tensor, list[Tensor]]:
    """(B, L) bool what is kept, and for each call of the projector its features, merged."""
    kept = real_mask(inputs).clone()
    features = []
    traced = rows_in_sequence(plain, case.projector, inputs)
    for one, where in zip(read(case, plain, inputs), traced, strict=True):
        flat = one.features.flatten(0, -2).double().numpy()
        new, gone = flat.copy(), set()
        for group, rows in zip(*groups(case, one), strict=True):
            count = None if share is None else max(1, round(share * len(rows)))
            stays = chosen(group, plus, count)
            for i, feature in merged(group, flat[rows], stays, NEIGHBOURS).items():
                new[rows[i]] = feature
            gone |= {row for i, row in enumerate(rows) if i not in stays}
        features.append(torch.from_numpy(new).to(one.features).reshape(one.features.shape))
        kept &= ~torch.isin(where, torch.tensor(sorted(gone)))
    return kept, features


def expected(
    case: Case, plain: Any, inputs: Inputs, plus: bool, share: float | None
) -> tuple[Tensor, Tensor]:
    """(B, L) bool what is kept, and the masked plain model's logits with merged features."""
    kept, features = merged_features(case, plain, inputs, plus, share)
    with replaced(plain, case.projector, features, inputs=case.inputs_merged) as twin:
        return kept, masked_logits(twin, inputs, {0: kept})
