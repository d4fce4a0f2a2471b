"""VisPruner, HiPrune, PruneSID and VScan against plain statements: loops over one picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import pi
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import atp_patch
from atp_patch.contract import Tower, TowerTokens
from atp_patch.methods import make_method
from atp_patch.methods.images import Images
from atp_patch.methods.vscan import VScanTower
from atp_patch.seam.tower.reading import numbered_block
from tests.core.test_choices_at_layers import CASES, changed, columns_of
from tests.helpers import inputs as made
from tests.helpers.inputs import batch
from tests.helpers.run import forward
from tests.helpers.selection import highest, units
from tests.helpers.tiny import tiny_model
from tests.helpers.views import SeesDoor, door_view

Array = NDArray[np.float64]


@dataclass
class Picture:
    """One image or video of one sample, token by token in float64.

    Attributes:
        first: the column of its first token in the view.
        features: (n, D).
        attention: block -> (n,), as the method asked for it.
        place: (n, 3), each token's frame, row and column.
        size: rows and columns.
    """

    first: int
    features: Array
    attention: dict[float, Array]
    place: list[tuple[int, int, int]]
    size: tuple[int, int]

    @property
    def alike(self) -> Array:
        """(n, n) cosines, with equal ones truly equal."""
        one = units(self.features)
        return np.round(one @ one.T * 2**20) / 2**20


def pictures(view: atp_patch.DoorView) -> list[list[Picture]]:
    """The pictures of each sample."""
    found = []
    for b, grids in enumerate(view.layout.grids):
        sample, at = [], 0
        for grid in grids:
            part = slice(at, at + grid.length)
            places = torch.stack([view.layout.frame, view.layout.row, view.layout.column], -1)
            sample.append(
                Picture(
                    at,
                    view.features[b, part].double().numpy(),
                    {n: seen.attention[b, part].double().numpy() for n, seen in view.tower.items()},
                    [tuple(one) for one in places[b, part].tolist()],
                    (grid.height, grid.width),
                )
            )
            at += grid.length
        found.append(sample)
    return found


def with_features(view: atp_patch.DoorView, features: str) -> atp_patch.DoorView:
    """The view with other features, and attention that is as degenerate as they are."""
    made, towers = view.features.clone().float(), {}
    for b, valid in enumerate(view.slot_valid):
        if valid.any():
            made[b, valid] = changed(features, made[b, valid])
    for number, seen in view.tower.items():
        attention = seen.attention.clone()
        if features != "as they are":
            for b, valid in enumerate(view.slot_valid):
                if valid.any():
                    attention[b, valid] = changed(features, attention[b, valid][:, None])[:, 0]
        towers[number] = TowerTokens(attention, seen.key, seen.class_token)
    return replace(view, features=made, tower=towers)


def vispruner(one: Picture, count: int) -> set[int]:
    order = highest(one.attention[-1], len(one.features))
    important, left = order[: count // 2], order[count // 2 :]
    step, alike = max(round(len(order) / 72), 1), one.alike
    while len(left) > count - len(important):
        first, second = left[::2], left[1::2]
        nearest = {i: max([alike[i, j] for j in second], default=-2.0) for i in first}
        # Of equal ones the later goes first.
        going = sorted(first, key=lambda i: (nearest[i], first.index(i)), reverse=True)
        number = min(step, len(left) - (count - len(important)), len(first))
        left = [i for i in left if i not in going[:number]]
    return {*important, *left}


def hiprune(one: Picture, count: int, alpha: float = 0.1) -> set[int]:
    middle, last = one.attention[0.375], one.attention[-1]
    chosen = highest(middle, round(alpha * count / 5))
    beside = []
    for i in highest(middle, len(middle)):
        frame, row, column = one.place[i]
        near = [(frame, row + 1, column), (frame, row - 1, column)]
        near += [(frame, row, column + 1), (frame, row, column - 1)]
        if i not in chosen and any(one.place[a] in near for a in chosen):
            beside.append(i)
    chosen = (chosen + beside)[:count]
    rest = [i for i in highest(last, len(last)) if i not in chosen]
    return {*chosen, *rest[: count - len(chosen)]}


def prunesid(one: Picture, count: int) -> set[int]:
    n, size = one.features.shape
    x = 1 / (1 + np.exp(-one.features))
    x = x - x.mean(0)
    number = min(max(count // 4, 1), n, size)
    places = (np.arange(size)[:, None] + 0.5) / size
    basis = np.linalg.qr(x @ np.cos(pi * places * np.arange(1, number + 1)))[0]
    for _ in range(2):
        basis = np.linalg.qr(x @ (x.T @ basis))[0]
    turned, deviation, _ = np.linalg.svd(basis.T @ x, full_matrices=False)
    loading = np.abs(basis @ turned).round(5)
    meant = deviation**2 > max(1e-6 * deviation[0] ** 2, 1e-12 * size * n)
    loading[:, ~meant] = 0
    group, score = loading.argmax(1), loading.max(1)
    alike = one.alike
    mean = np.mean([alike[i, j] for i in range(n) for j in range(i)])
    stays: dict[int, list[int]] = {}
    others = []
    for i in highest(score, n):
        mine = stays.setdefault(group[i], [])
        if any(alike[i, j] > np.float32(18 * count / n * mean) for j in mine):
            others.append(i)
        else:
            mine.append(i)
    order = sorted(
        (at / len(members), -score[i], i)
        for members in stays.values()
        for at, i in enumerate(members)
    )
    return {*[i for _, _, i in order][:count], *others[: max(count - len(order), 0)]}


def vscan(one: Picture, count: int) -> set[int]:
    near, last = one.attention[0.25], one.attention[-1]
    windows: dict[Any, list[int]] = {}
    for i in highest(near, len(near)):
        frame, row, column = one.place[i]
        where = (frame, row * 4 // one.size[0], column * 4 // one.size[1])
        windows.setdefault(where, []).append(i)
    turns = sorted(
        (turn, -near[i], i) for members in windows.values() for turn, i in enumerate(members)
    )
    local = [i for _, _, i in turns][: count // 2]
    rest = [i for i in highest(last, len(last)) if i not in local]
    return {*local, *rest[: count - len(local)]}


METHODS: dict[str, tuple[Callable[[Picture, int], set[int]], tuple[float, ...], str]] = {
    "vispruner": (vispruner, (-1,), "class"),
    "hiprune": (hiprune, (0.375, -1), "all"),
    "prunesid": (prunesid, (), "class"),
    "vscan-tower": (vscan, (0.25, -1), "class"),
}


def shared(sizes: list[int], total: int) -> list[int]:
    """Whole numbers in proportion to sizes: the largest remainders are rounded up."""
    exact = [total * size / sum(sizes) for size in sizes]
    counts = [int(part) for part in exact]
    for number in sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i]):
        counts[number] += int(sum(counts) < total)
    return counts


def expected(name: str, view: atp_patch.DoorView) -> list[set[int]]:
    """The columns that each sample keeps by the plain statement."""
    found: list[set[int]] = []
    assert view.counts is not None
    for sample, total in zip(pictures(view), view.counts, strict=True):
        counts = shared([len(one.features) for one in sample], total) if sample else []
        kept = [
            {one.first + i for i in METHODS[name][0](one, count)}
            for one, count in zip(sample, counts, strict=True)
        ]
        found.append(set().union(*kept))
    return found


@pytest.mark.parametrize(("source", "features"), CASES)
@pytest.mark.parametrize("name", METHODS)
def test_the_choice_is_the_plain_statements(name: str, source: str, features: str) -> None:
    _, blocks, queries = METHODS[name]
    for keep in (0.2,) if source in ("llava", "dynamic") else (0.1, 0.5):
        view = with_features(door_view(source, keep, blocks, queries), features)
        method: Any = make_method(name, {})
        kept = columns_of(method.decide(view).keep, view.slot_valid)
        assert kept == expected(name, view), f"keep={keep}"


@pytest.mark.parametrize("source", ["qwen2_vl", "llava"])
def test_vscan_merges_the_others_into_the_most_alike(source: str) -> None:
    view = door_view(source, 0.25, (0.25, -1))
    method: Any = make_method("vscan-tower", {})
    decision = method.decide(view)
    recycled = decision.recycled
    for b, sample in enumerate(pictures(view)):
        made = {
            int(column): set(recycled.weight[b, slot].nonzero().flatten().tolist())
            for slot, column in enumerate(recycled.column[b])
            if recycled.valid[b, slot]
        }
        wanted: dict[int, set[int]] = {}
        for one in sample:
            alike = one.alike
            kept = [i for i in range(len(one.features)) if decision.keep[b, one.first + i]]
            for i in range(len(one.features)):
                best = max(kept, key=lambda k: (alike[i, k], -k))
                best = i if i in kept else best
                wanted.setdefault(one.first + best, set()).add(one.first + i)
        assert made == wanted
        for slot, members in enumerate(made.values()):
            weights = recycled.weight[b, slot][recycled.weight[b, slot] > 0]
            torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(members)))


def test_prunesid_gives_fuller_images_more() -> None:
    """One image of equal tokens and one of different ones, of equal sizes."""
    view = next_to_each_other()
    for adaptive, even in ((False, True), (True, False)):
        method: Any = make_method("prunesid", {"adaptive": adaptive})
        keep = method.decide(view).keep & view.slot_valid
        assert view.counts is not None
        assert int(keep[0].sum()) == view.counts[0]
        first, second = (int((keep[0] & (view.image[0] == number)).sum()) for number in (0, 1))
        assert (first == second) == even
        assert first <= second


def next_to_each_other() -> atp_patch.DoorView:
    """A view whose first sample holds two images of a size, the first of which is one colour."""
    views: list[atp_patch.DoorView] = []
    model = atp_patch.patch_model(
        tiny_model("llava-llama"), method=SeesDoor(views=views), keep=0.25, min_tokens_per_image=2
    )
    forward(model, batch(model, made.TWO_IMAGES))
    (view,) = views
    features = changed("random", view.features[0]).expand_as(view.features).clone()
    features[0, view.image[0] == 0] = 1.0
    return replace(view, features=features)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vispruner", {"important_share": 1.5}, "important_share=1.5 must be from 0 to 1"),
        ("hiprune", {"alpha": -0.1}, "alpha=-0.1 must be from 0 to 1"),
        ("hiprune", {"object_depth": 1.0}, "object_depth=1.0 must be between 0 and 1"),
        ("vscan", {"local_share": 2.0}, "local_share=2.0 must be from 0 to 1"),
        ("vscan", {"windows": 0}, "windows=0 must be at least 1"),
        ("vscan", {"share": 0.0}, "share=0.0 must be above 0"),
    ],
)
def test_wrong_options_are_named(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(atp_patch.ConfigError, match=message):
        make_method(method, options)


def test_vscan_stands_alone() -> None:
    model = tiny_model("llava-llama")
    for first in ("prumerge", "fastervlm"):
        with pytest.raises(atp_patch.ConfigError, match="a part of its own that prunes before"):
            atp_patch.patch_model(model, [2], [first, "vscan"], keep=0.5)


@pytest.mark.parametrize("queries", ["class", "all"])
def test_whose_attention_counts_in_the_tower(queries: str) -> None:
    blocks = (0.5, -1)  # the first of two blocks, and the one that LLaVA's features come from
    view = door_view("llava-llama", 0.5, blocks, queries)
    model = tiny_model("llava-llama", "eager")
    found: list[torch.Tensor] = []
    layers = model.model.vision_tower.encoder.layers
    hook = layers[0].self_attn.register_forward_hook(
        lambda _, args, output: found.append(output[1])
    )
    forward(model, batch(model, made.MIXED))
    hook.remove()
    heads = found[0].double()  # (images, heads, queries, keys), a class token first
    expected = heads.mean((1, 2))[:, 1:]
    if queries == "class":
        paid = heads[:, :, 0, 1:]
        expected = (paid / paid.sum(-1, keepdim=True)).mean(1)
    assert model.model.config.vision_feature_layer == -2, "both blocks are the first one"
    for block in blocks:
        seen = view.tower[block].attention[view.slot_valid].reshape(expected.shape)
        torch.testing.assert_close(seen.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("tower", "depth", "named", "block"),
    [
        ({"block": 22}, 24, 0.375, 8),  # the ninth of CLIP's 24
        ({"block": 22}, 24, 0.25, 5),
        ({"block": 22}, 24, 0.999, 22),
        ({"block": 3}, 4, 0.01, 0),
        ({"block": 31, "window": 4, "full_blocks": (7, 15, 23, 31)}, 32, 0.5, 15),
        ({"block": 31, "window": 4, "full_blocks": (7, 15, 23, 31)}, 32, 0.375, 15),
        ({"block": 31, "window": 4, "full_blocks": (7, 15, 23, 31)}, 32, 0.25, 7),
        ({"block": 31, "window": 4, "full_blocks": (7, 15, 23, 31)}, 32, 23, 23),
    ],
)
def test_blocks_by_their_depth(tower: dict[str, Any], depth: int, named: float, block: int) -> None:
    about = Tower(modules=("visual",), blocks="blocks", projector="merger", **tower)
    assert numbered_block(named, about, depth) == block


@pytest.mark.parametrize("source", ["qwen2_vl", "llava"])
def test_turns_within_windows_are_those_of_all_pairs(source: str) -> None:
    """Among attention of three values, so that most tokens of a window are equal."""
    view = door_view(source, 0.25, (0.25, -1))
    generator = torch.Generator().manual_seed(3)
    images = Images.of(view)
    attention = torch.randint(0, 3, images.valid.shape, generator=generator).float()
    for sides in (1, 4, 7):
        method = VScanTower(windows=sides)
        turns = method._turn(attention, images, view)
        number = 0
        for sample in pictures(view):
            for one in sample:
                height, width = one.size
                windows = [(f, r * sides // height, c * sides // width) for f, r, c in one.place]
                paid = attention[number, : len(windows)].tolist()
                for i, window in enumerate(windows):
                    before = sum(
                        window == other and (-paid[j], j) < (-paid[i], i)
                        for j, other in enumerate(windows)
                    )
                    assert int(turns[number, i]) == before
                number += 1
