"""Shrunk pictures: what the plain tower makes of them, in the placeholders under their centres."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import atp_patch
from tests.helpers import inputs as made
from tests.helpers import tiny
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.inputs import Inputs, real_mask, visual_mask
from tests.helpers.merging import replaced
from tests.helpers.oracle import masked_logits
from tests.helpers.run import forward, generate, kept_of
from tests.seam.vision_cases import CASES, KINDS, Case

ABLE = [c for c in CASES if "next" not in c.name and "onevision" not in c.name]
every_case = pytest.mark.parametrize("case", ABLE, ids=lambda case: case.name)
SHARE = 0.45
PATCH, CELL, FRAMES = tiny.QWEN_PATCH, tiny.QWEN_MERGE, tiny.QWEN_FRAMES


def patched(case: Case, **options: Any) -> Any:
    options = options or {"keep": SHARE}
    return atp_patch.patch_model(case.build(), method="downsample", **options)


def under_centres(grid: tuple[int, int], small: tuple[int, int]) -> list[int]:
    """The place in the grid that holds the centre of each part of the smaller one."""
    places = []
    for row in range(small[0]):
        for column in range(small[1]):
            y, x = (row + 0.5) / small[0] * grid[0], (column + 0.5) / small[1] * grid[1]
            places.append(int(y) * grid[1] + int(x))
    return places


def picture_of(patches: Tensor, grid: list[int]) -> Tensor:
    """(t * FRAMES, 3, height, width) pixels of Qwen2-VL's rows of patches, patch by patch."""
    t, h, w = grid
    picture = torch.zeros(t, FRAMES, 3, h * PATCH, w * PATCH)
    rows = iter(patches.reshape(-1, 3, FRAMES, PATCH, PATCH))
    for place in order(grid):
        frame, y, x = place
        top, left = y * PATCH, x * PATCH
        block = next(rows).transpose(0, 1)
        picture[frame, :, :, top : top + PATCH, left : left + PATCH] = block
    return picture.flatten(0, 1)


def patches_of(picture: Tensor, grid: list[int]) -> Tensor:
    """The way back."""
    picture = picture.unflatten(0, (-1, FRAMES))
    rows = []
    for frame, y, x in order(grid):
        top, left = y * PATCH, x * PATCH
        block = picture[frame, :, :, top : top + PATCH, left : left + PATCH]
        rows.append(block.transpose(0, 1).flatten())
    return torch.stack(rows)


def order(grid: list[int]) -> list[tuple[int, int, int]]:
    """Frame, row and column of each patch: cell by cell."""
    t, h, w = grid
    return [
        (frame, top + y, left + x)
        for frame in range(t)
        for top in range(0, h, CELL)
        for left in range(0, w, CELL)
        for y in range(CELL)
        for x in range(CELL)
    ]


def packed_reference(plain: Any, inputs: Inputs, share: float) -> tuple[Tensor, Tensor]:
    """Kept mask and logits of a plain Qwen2-VL whose tower was given smaller pictures."""
    twin = copy.deepcopy(plain)
    wide, flags = [], {}
    pairs = (
        ("pixel_values", "image_grid_thw", tiny.IMAGE),
        ("pixel_values_videos", "video_grid_thw", tiny.VIDEO),
    )
    for pixels, grids, token in pairs:
        if grids not in inputs:
            continue
        parts, flag = [], []
        start = 0
        for t, h, w in inputs[grids].tolist():
            patches = inputs[pixels][start : start + t * h * w]
            start += t * h * w
            tall, broad = h // CELL, w // CELL
            rows = max(1, round(tall * (round(share * t * tall * broad) / t / tall / broad) ** 0.5))
            columns = round(round(round(share * t * tall * broad) / t) / rows)
            grid = [t, rows * CELL, columns * CELL]
            size = (grid[1] * PATCH, grid[2] * PATCH)
            small = interpolate(
                picture_of(patches, [t, h, w]), size, mode="bilinear", antialias=True
            )
            with torch.no_grad():
                out = plain.model.visual(patches_of(small, grid), torch.tensor([grid]))
            for frame in out.pooler_output.unflatten(0, (t, -1)):
                table = torch.zeros(tall * broad, frame.shape[1])
                places = under_centres((tall, broad), (rows, columns))
                table[places] = frame
                parts.append(table)
                flag += [i in places for i in range(tall * broad)]
        wide.append(torch.cat(parts))
        flags[token] = torch.tensor(flag)
    turn = iter(wide)

    def put(_: Any, args: Any, output: Any) -> Any:
        output.pooler_output = next(turn)
        return output

    twin.model.visual.register_forward_hook(put)
    kept = real_mask(inputs).clone()
    for token, flag in flags.items():
        kept[inputs["input_ids"] == token] = flag
    return kept, masked_logits(twin, inputs, {0: kept})


@pytest.mark.parametrize(("share", "side"), [(0.45, 4), (0.7, 5), (0.1, 2)])
def test_llava_gets_the_towers_view_of_a_smaller_picture(share: float, side: int) -> None:
    plain = tiny.tiny_model("llava-llama")
    model = atp_patch.patch_model(tiny.tiny_model("llava-llama"), method="downsample", keep=share)
    inputs = made.batch(plain, made.MIXED)
    pixels = side * tiny.CLIP_PATCH
    small = interpolate(inputs["pixel_values"], (pixels, pixels), mode="bilinear", antialias=True)
    with torch.no_grad():
        out = plain.model.vision_tower(
            small, interpolate_pos_encoding=True, output_hidden_states=True
        )
        features = plain.model.multi_modal_projector(out.hidden_states[-2][:, 1:])
    grid = (tiny.CLIP_SIDE, tiny.CLIP_SIDE)
    places = under_centres(grid, (side, side))
    assert len(set(places)) == side**2
    wide = torch.zeros(len(features), grid[0] * grid[1], features.shape[2])
    wide[:, places] = features
    flag = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    flag[places] = True
    kept = real_mask(inputs).clone()
    kept[visual_mask(inputs)] = flag.repeat(len(features))
    with replaced(plain, "multi_modal_projector", [wide], inputs=False) as twin:
        reference = masked_logits(twin, inputs, {0: kept})
    logits = forward(model, inputs).logits
    assert torch.equal(kept_of(model)[0], kept)
    assert_close(logits, reference, kept)


@pytest.mark.parametrize("kind", tiny.QWEN)
def test_qwen_gets_the_towers_view_of_a_smaller_picture(kind: str) -> None:
    plain = tiny.tiny_model(kind)
    model = atp_patch.patch_model(tiny.tiny_model(kind), method="downsample", keep=SHARE)
    inputs = made.batch(plain, made.VIDEO)
    kept, reference = packed_reference(plain, inputs, SHARE)
    logits = forward(model, inputs).logits
    assert torch.equal(kept_of(model)[0], kept)
    assert_close(logits, reference, kept)


@every_case
def test_keeping_all_is_plain_bit_for_bit(case: Case) -> None:
    plain, model = case.build(), patched(case, keep=1.0)
    inputs = case.feed(plain, "left")
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)


@every_case
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_batch_is_its_samples_alone(case: Case, padding: str) -> None:
    model = patched(case)
    inputs = case.feed(model, padding)
    together = forward(model, inputs).logits
    kept = kept_of(model)[0]
    for b in range(case.count):
        real, single = real_mask(inputs)[b], case.alone(model, b)
        alone = forward(model, single).logits
        if not kept[b][real].all():
            assert torch.equal(kept[b, real], kept_of(model)[0][0])
        assert_close(together[b, real][None], alone, kept[b, real][None])


@every_case
def test_the_cache_changes_no_answer(case: Case) -> None:
    model = patched(case)
    inputs = case.feed(model, "left")
    cached, uncached = (generate(model, inputs, 5, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    if case.beams:
        assert torch.equal(generate(model, inputs, 5, num_beams=2)[:, :3], cached[:, :3])


@every_case
def test_unpatching_leaves_nothing(case: Case) -> None:
    model = case.build()
    inputs = case.feed(model, "left")
    plain, before = forward(model, inputs).logits, snapshot(model)
    atp_patch.patch_model(model, method="downsample", keep=SHARE)
    forward(model, inputs)
    generate(model, inputs, 2)
    atp_patch.unpatch_model(model)
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, plain)


def test_the_budget_is_met_as_nearly_as_a_grid_can() -> None:
    for kind in ("llava-llama", "qwen2_vl"):
        for target in (4, 9, 20):
            model = atp_patch.patch_model(
                tiny.tiny_model(kind), method="downsample", target_tokens=target
            )
            forward(model, made.batch(model, made.SAME_SIZE))
            counts = atp_patch.last_trace(model).tokens_per_layer.flatten().tolist()
            assert all(abs(count - target) <= 1 for count in counts)


def test_a_fixed_tower_takes_one_size_at_a_time() -> None:
    model = atp_patch.patch_model(
        tiny.tiny_model("llava-llama"), method="downsample", target_tokens=9
    )
    with pytest.raises(atp_patch.InputError, match="give keep="):
        forward(model, made.batch(model, made.MIXED))


def test_models_that_cannot_are_refused_by_name() -> None:
    able = "llava, video_llava, qwen2_vl, qwen3_vl, qwen3_5, internvl"
    for name in ("llava_next", "gemma3"):
        with pytest.raises(atp_patch.UnsupportedModelError, match=able):
            atp_patch.patch_model(KINDS[name].build(), method="downsample")


def test_the_default_budget_is_a_quarter() -> None:
    model = atp_patch.patch_model(tiny.tiny_model("llava-llama"), method="downsample")
    forward(model, made.batch(model, made.SINGLE))
    assert atp_patch.last_trace(model).average_tokens == 9
