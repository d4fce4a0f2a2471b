"""What methods read of the towers of many families, against an oracle that counts patch by patch.

A row says in what order the patches of a picture stand and how many make one token. The attention
function of the plain model notes queries and keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import atp_patch
from tests.families import sized
from tests.families.hosts import skip_where_samples_share_places
from tests.families.kinds import (
    MIXED,
    SINGLE,
    VIDEO,
    Kind,
    Picture,
    Sample,
    Words,
    make,
    sample,
)
from tests.families.tables import EVERY
from tests.helpers.compare import assert_close
from tests.helpers.doors import TowerReader, view_of_the_tower
from tests.helpers.inputs import Inputs, real_mask
from tests.helpers.run import forward, kept_of
from tests.seam.vision_cases import part_of

KINDS = {kind.name: kind for kind in EVERY}
SPY = "tests_spy"
VIDEOS = (
    sample(Words(3), Picture(1), Words(2), Picture(0), Words(4), seed=21),
    sample(Words(5), seed=22),
    sample(Words(2), Picture(0), Words(2), Picture(VIDEO), Words(6), seed=23),
)


@dataclass(frozen=True)
class Row:
    """How one family's tower is built.

    Attributes:
        attention: the name of the attention module whose queries and keys count.
        cell: how many patches along a side make one token; of videos ``film_cell``, if it is given.
        order: "rows" or "cells", how the patches of a picture lie.
        windows: whether they do so within windows of 8 x 8 patches.
        joined: how many frames of a video make one frame of tokens.
        apart: whether each picture stands in a row of its own, and not all in one.
        class_last: whether a class token stands behind the patches.
        samples: what is asked of the model.
    """

    attention: str
    cell: int = 2
    film_cell: int = 0
    order: str = "cells"
    windows: bool = False
    joined: int = 1
    apart: bool = False
    class_last: bool = False
    samples: tuple[Sample, ...] = VIDEOS


SQUARE: dict[str, Any] = {"order": "rows", "apart": True, "samples": MIXED}
ROWS = {
    "paligemma": Row("vision_tower.encoder.layers.1.self_attn", cell=1, **SQUARE),
    "idefics3": Row("vision_model.encoder.layers.1.self_attn", **SQUARE),
    "smolvlm": Row("vision_model.encoder.layers.1.self_attn", **SQUARE),
    "ovis2": Row("vision_tower.transformer.encoder.layers.1.attention", **SQUARE),
    "granite_docling": Row("vision_model.encoder.layers.1.self_attn", **SQUARE),
    "llama4": Row("vision_model.model.layers.1.self_attn", class_last=True, **SQUARE),
    "gemma4": Row("vision_tower.encoder.layers.1.self_attn", order="rows", apart=True),
    "cosmos3_edge": Row("visual.encoder.layers.1.self_attn"),
    "ernie4_5_vl_moe": Row("vision_tower.blocks.1.attn", joined=2),
    "paddleocr_vl": Row(
        "visual.vision_model.encoder.layers.1.self_attn", order="rows", samples=MIXED
    ),
    "hunyuan_vl": Row("vision_tower.layers.1.self_attn", order="rows", samples=MIXED),
    "muse_glimmer": Row("vision_tower.layers.1.attn", order="rows", windows=True),
    "muse_spark": Row("vision_tower.layers.1.attn", order="rows", windows=True),
    "kimi_k25": Row("vision_tower.layers.1.attn", order="rows", samples=MIXED),
    "video_llama_3": Row("vision_model.encoder.layers.1.self_attn", cell=1, film_cell=2),
    "lfm3_vl": Row("vision_tower.layers.1.self_attn"),
    "hyperclovax_vision_v2": Row("vision_model.blocks.1.attn", windows=True),
}
# These go ways of their own; what others do is among them.
ORDINARY = (
    "idefics3",
    "llama4",
    "gemma4",
    "ernie4_5_vl_moe",
    "muse_glimmer",
    "lfm3_vl",
)
by_row = pytest.mark.parametrize(
    "name",
    [
        name if name in ORDINARY else pytest.param(name, marks=pytest.mark.slow)
        for name in ROWS
        if name in KINDS  # an early version may lack some
    ],
)


@dataclass(frozen=True)
class Seen:
    """One call of the attention: (H, n, d) queries and (Hk, n, d) keys of what sees each other."""

    query: Tensor
    key: Tensor
    scaling: float


def seen_by_the_host(row: Row, plain: Any, inputs: Inputs) -> list[Seen]:
    """Every call of the attention in the plain model, pictures apart where they stand apart."""
    noted: list[Seen] = []

    def spy(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        noted.extend(Seen(q, k, scaling) for q, k in zip(query, key, strict=True))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **kwargs)

    AttentionInterface.register(SPY, spy)
    twin = copy.deepcopy(plain)
    attention = part_of(twin, row.attention)
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = SPY
    forward(twin, inputs)
    return noted


def patch_places(row: Row, height: int, width: int, cell: int) -> list[list[int]]:
    """Of each token in reading order, where its patches stand in their frame."""
    rows, columns = height * cell, width * cell

    def key(place: tuple[int, int]) -> tuple[int, ...]:
        r, c = place
        window = (r // 8, c // 8) if row.windows else ()
        within = (r // cell, c // cell) if row.order == "cells" else ()
        return (*window, *within, r, c)

    stand = sorted(((r, c) for r in range(rows) for c in range(columns)), key=key)
    where = {place: number for number, place in enumerate(stand)}
    return [
        [where[r * cell + a, c * cell + b] for a in range(cell) for b in range(cell)]
        for r in range(height)
        for c in range(width)
    ]


def paid(row: Row, one: Seen) -> tuple[Tensor, Tensor]:
    """(n,) attention of each patch, and (n, d) all heads' keys of it."""
    share = len(one.query) // len(one.key)
    patches = one.key.shape[1] - int(row.class_last)
    asking = one.query[:, patches:] if row.class_last else one.query
    got = []
    for head, queries in enumerate(asking.double()):
        keys = one.key[head // share, :patches].double()
        got.append((queries @ keys.T * one.scaling).softmax(-1).mean(0))
    return torch.stack(got).mean(0), one.key[:, :patches].transpose(0, 1).flatten(1)


def tokens(
    row: Row, calls: Iterator[Seen], grid: Any, film: bool
) -> Iterator[tuple[float, Tensor]]:
    """Attention and key of each token of a grid, frame by frame in reading order."""
    cell = (film and row.film_cell) or row.cell
    places = patch_places(row, grid.height, grid.width, cell)
    per_frame = grid.height * grid.width * cell**2
    for _ in range(grid.frames):
        parts = []  # of each frame that becomes part of this one: attention and keys of its patches
        for _ in range(row.joined if film else 1):
            one = next(calls)
            if row.apart:  # padding stands behind the picture
                end = per_frame + int(row.class_last)
                one = Seen(one.query[:, :end], one.key[:, :end], one.scaling)
            parts.append(paid(row, one))
        for members in places:
            yield (
                sum(float(got[members].sum()) for got, _ in parts),
                torch.stack([keys[members] for _, keys in parts]).mean((0, 1)),
            )


def kind_of(name: str) -> Kind:
    """The row of the families' table; the test is skipped where transformers has no such model."""
    if name not in KINDS:
        pytest.skip(f"this version of transformers has no {name}")
    return KINDS[name]


def view_of(kind: Kind, inputs: Inputs) -> atp_patch.DoorView:
    """What a method that reads the tower sees."""
    return view_of_the_tower(kind.build(), inputs, keep=0.5)


@by_row
def test_attention_and_keys_are_those_of_each_tokens_patches(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, kind = ROWS[name], KINDS[name]
    monkeypatch.setattr(sized, "LEFT", (24, 24, 24))  # no token of a frame is dropped
    inputs = make(kind, row.samples).inputs
    plain = kind.build()
    view = view_of(kind, inputs)
    seen = seen_by_the_host(row, plain, inputs)
    ids = inputs["input_ids"]
    video = getattr(plain.config, "video_token_id", None)
    films = [
        [int(ids[b, grid.start]) == video for grid in grids]
        for b, grids in enumerate(view.layout.grids)
    ]
    # Images run through the tower first, and then videos.
    order = [
        (b, n, film)
        for film in (False, True)
        for b, own in enumerate(films)
        for n, one in enumerate(own)
        if one == film
    ]
    calls, checked = iter(seen), 0
    for b, n, film in order:
        start = sum(grid.length for grid in view.layout.grids[b][:n])
        made = tokens(row, calls, view.layout.grids[b][n], film)
        for column, (attention, key) in enumerate(made, start):
            assert float(view.tower[-1].attention[b, column]) == pytest.approx(attention, abs=1e-5)
            torch.testing.assert_close(view.tower[-1].key[b, column], key, rtol=1e-4, atol=1e-4)
            checked += 1
    assert next(calls, None) is None
    assert checked == int(view.slot_valid.sum()) > 0
    assert (view.tower[-1].class_token is not None) == row.class_last


def test_the_class_token_behind_the_patches_is_that_of_the_tokens_own_tile() -> None:
    kind = kind_of("llama4")
    inputs, plain, noted = make(kind, MIXED).inputs, kind.build(), []
    block = plain.get_submodule("vision_model.model.layers.1")
    block.register_forward_hook(lambda *given: noted.append(given[-1]))
    forward(plain, inputs)
    states = noted[0][0] if isinstance(noted[0], tuple) else noted[0]
    view = view_of(kind, inputs)
    made, tile = view.tower[-1].class_token, 0
    assert made is not None
    for b, grids in enumerate(view.layout.grids):
        for number in range(len(grids)):
            mine = view.slot_valid[b] & (view.image[b] == number)
            assert torch.equal(made[b, mine], states[tile, -1].expand(int(mine.sum()), -1))
            tile += 1
    assert tile == len(states)


@by_row
@pytest.mark.slow
def test_a_method_that_reads_is_the_same_in_any_batch(name: str) -> None:
    kind = KINDS[name]
    skip_where_samples_share_places(kind.build())
    model = atp_patch.patch_model(kind.build(), method=TowerReader(), keep=0.5)
    inputs = make(kind, MIXED).inputs
    together, kept = forward(model, inputs).logits, kept_of(model)[0]
    real = real_mask(inputs)
    for b, one in enumerate(MIXED):
        alone = make(kind, (one,)).inputs
        assert_close(
            together[b, real[b]][None], forward(model, alone).logits, kept[b, real[b]][None]
        )


def test_padding_within_a_tile_pays_and_gets_nothing() -> None:
    row, kind = ROWS["idefics3"], KINDS["idefics3"]
    inputs = make(kind, SINGLE).inputs
    mask = torch.ones_like(inputs["pixel_values"][:, :, 0])
    mask[..., mask.shape[-1] // 2 :] = 0
    inputs["pixel_attention_mask"] = mask.bool()
    attention = view_of(kind, inputs).tower[-1].attention[0].view(6, 6)
    (one,) = seen_by_the_host(row, kind.build(), inputs)
    left = [n for n in range(12 * 12) if n % 12 < 6]  # the patches of the left half
    got, _ = paid(row, Seen(one.query[:, left], one.key[:, left], one.scaling))
    wanted = got.view(6, 2, 3, 2).sum((1, 3))
    torch.testing.assert_close(attention[:, :3], wanted.float(), rtol=1e-4, atol=1e-6)
    assert not attention[:, 3:].any()


@pytest.mark.slow
def test_frames_from_which_tokens_were_dropped_are_refused() -> None:
    kind = kind_of("video_llama_3")
    with pytest.raises(atp_patch.InputError, match="dropped tokens"):
        view_of(kind, make(kind, VIDEOS).inputs)


def test_a_block_of_another_kind_is_refused() -> None:
    class First(TowerReader):
        name = "first"

        @property
        def tower_blocks(self) -> tuple[int, ...]:
            return (0,)

    kind = kind_of("lfm3_vl")
    with pytest.raises(atp_patch.UnsupportedModelError, match=r"or not at all.* among \[1\]"):
        atp_patch.patch_model(kind.build(), method=First())
