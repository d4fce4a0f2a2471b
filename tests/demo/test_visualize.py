"""Overlays: the right patches are dimmed, whatever the grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import atp_patch
from atp_patch.contract import VisualGrid
from atp_patch.tools.visualize import GAP, TITLE, as_seen, overlay, survivors
from tests.helpers.inputs import RAGGED, VIDEO, Prompt, batch
from tests.helpers.tiny import tiny_model

LAYERS = [2, 5]


def traced(kind: str, prompts: tuple[Prompt, ...]) -> atp_patch.PruningTrace:
    """The trace of a forward pass."""
    model = atp_patch.patch_model(tiny_model(kind), layers=LAYERS, method="random", keep=0.5)
    with torch.inference_mode():
        model(**batch(model, prompts))
    return atp_patch.last_trace(model)


@pytest.mark.parametrize(
    ("kind", "prompts"), [("llava-llama", RAGGED), ("qwen2_vl", RAGGED), ("qwen2_5_vl", VIDEO)]
)
def test_survivors_lie_where_the_trace_says(kind: str, prompts: tuple[Prompt, ...]) -> None:
    trace = traced(kind, prompts)
    for sample, grids in enumerate(trace.grids):
        for layer in LAYERS:
            kept = [survivors(trace, grid, layer, sample) for grid in grids]
            total = sum(int(mask.sum()) for mask in kept)
            assert total == int(trace.tokens_per_layer[sample, layer])
            for grid, mask in zip(grids, kept, strict=True):
                assert mask.shape == (grid.frames, grid.height, grid.width)
                last = grid.start + grid.length - 1
                assert mask[-1, -1, -1] == trace.layers[layer].kept[sample, last]


@pytest.mark.parametrize("sample", [0, 1])
def test_pruned_patches_are_dimmed_and_the_others_are_not(sample: int) -> None:
    trace = traced("qwen2_vl", RAGGED)
    (grid,) = trace.grids[sample]
    cell = 10
    picture = Image.new("RGB", (64, 48), (10, 60, 200))
    sheet = np.asarray(overlay(picture, trace, sample, panel=cell * grid.width))
    width = cell * grid.width + GAP
    for column, layer in enumerate(LAYERS, start=1):
        left, top = GAP + column * width, GAP + TITLE
        panel = sheet[top : top + cell * grid.height, left : left + cell * grid.width]
        patches = panel.reshape(grid.height, cell, grid.width, cell, 3).transpose(0, 2, 1, 3, 4)
        bright = (patches == (10, 60, 200)).all((2, 3, 4))
        dimmed = (patches != (10, 60, 200)).all((2, 3, 4))
        kept = survivors(trace, grid, layer, sample)[0].numpy()
        assert (bright == kept).all()
        assert (dimmed == ~kept).all()


class Processor:
    """As far as ``as_seen`` looks."""

    def __init__(self, **settings: object) -> None:
        self.image_processor = CLIPImageProcessorPil(**settings)


@dataclass
class Trace:
    """As far as ``as_seen`` looks."""

    grids: list[list[VisualGrid]]


CROP = {"height": 64, "width": 64}
PAINTED = Image.fromarray(
    np.stack(np.broadcast_arrays(np.arange(160), np.arange(70)[:, None] * 3, 99), -1).astype(
        "uint8"
    )
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": {"shortest_edge": 64}, "crop_size": CROP}, ImageOps.fit(PAINTED, (64, 64))),
        ({"size": CROP, "crop_size": CROP}, PAINTED.resize((64, 64))),
        ({"size": CROP, "crop_size": CROP, "do_normalize": False}, PAINTED.resize((64, 64))),
    ],
    ids=["cropped", "stretched", "not normalised"],
)
def test_a_picture_shows_what_the_processor_passed_on(
    settings: dict[str, object], expected: Image.Image
) -> None:
    processor = Processor(**settings)
    inputs = processor.image_processor(PAINTED, return_tensors="pt")
    (shown,) = as_seen(PAINTED, inputs, processor, Trace([[VisualGrid(3, 1, 8, 8)]]))
    difference = np.asarray(shown, np.float32) - np.asarray(expected, np.float32)
    assert np.abs(difference).mean() < 3


def test_every_tile_gets_its_own_picture() -> None:
    processor = Processor(do_normalize=False)
    shades = torch.tensor([0.0, 0.4, 1.0]).view(1, 3, 1, 1, 1)  # three tiles of sample 0
    inputs = {"pixel_values": shades.expand(1, 3, 3, 16, 16)}
    trace = Trace([[VisualGrid(start, 1, 4, 4) for start in (2, 20, 40)]])
    pictures = as_seen(PAINTED, inputs, processor, trace)
    assert [picture.getpixel((5, 5)) for picture in pictures] == [(n,) * 3 for n in (0, 102, 255)]


@pytest.mark.parametrize(
    ("pixels", "grids"),
    [
        (torch.zeros(48, 12), [VisualGrid(1, 1, 4, 12)]),  # patches in a row
        (torch.zeros(1, 5, 3, 16, 16), [VisualGrid(1, 1, 4, 4), VisualGrid(17, 1, 6, 8)]),
        (torch.zeros(1, 2, 3, 16, 16), [VisualGrid(1, 1, 4, 4), VisualGrid(17, 1, 3, 4)]),
    ],
)
def test_the_whole_image_stands_where_pixels_do_not_match_the_grids(
    pixels: torch.Tensor, grids: list[VisualGrid]
) -> None:
    pictures = as_seen(PAINTED, {"pixel_values": pixels}, Processor(), Trace([grids]))
    assert len(pictures) == len(grids)
    assert all(picture is PAINTED for picture in pictures)


def test_a_video_gets_a_row_a_frame() -> None:
    trace = traced("qwen2_5_vl", VIDEO)
    grid = trace.grids[0][0]
    frames = [Image.new("RGB", (40, 40), (0, shade, 0)) for shade in (40, 120, 200)]
    assert grid.frames == len(frames)
    cell = 12
    sheet = np.asarray(overlay(frames, trace, panel=cell * grid.width))
    row = TITLE + cell * grid.height + GAP
    assert sheet.shape[0] == GAP + 3 * row
    shades = [int(sheet[GAP + TITLE + number * row + 2, GAP + 2, 1]) for number in range(3)]
    assert shades == [40, 120, 200]


def test_another_number_of_frames_is_refused() -> None:
    trace = traced("qwen2_5_vl", VIDEO)
    with pytest.raises(atp_patch.InputError, match="2 images for 3 frames"):
        overlay([Image.new("RGB", (8, 8))] * 2, trace)


def test_a_sample_without_images_is_refused() -> None:
    from tests.helpers.inputs import MIXED

    with pytest.raises(atp_patch.InputError, match="no visual tokens"):
        overlay(Image.new("RGB", (8, 8)), traced("qwen2_vl", MIXED), sample=2)
