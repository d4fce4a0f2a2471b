"""What a model was shown: cropped, stretched, padded, in tiles, in patches, several, as a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import atp_patch
from atp_patch.contract import VisualGrid
from atp_patch.visualize import Part, seen


@dataclass
class Processor:
    """As far as `seen` looks."""

    image_processor: Any
    video_processor: Any = None


@dataclass
class Trace:
    """As far as `seen` looks."""

    grids: list[list[VisualGrid]]


def painted(width: int = 160, height: int = 70, blue: int = 99) -> Image.Image:
    """Redder to the right, greener towards the bottom."""
    red = np.arange(width) * 255 // width
    green = (np.arange(height) * 255 // height)[:, None]
    return Image.fromarray(np.stack(np.broadcast_arrays(red, green, blue), -1).astype("uint8"))


def grids(*sizes: tuple[int, int], frames: int = 1) -> list[VisualGrid]:
    """Grids of (height, width), one behind the other."""
    found, at = [], 1
    for height, width in sizes:
        found.append(VisualGrid(at, frames, height, width))
        at += frames * height * width + 2
    return found


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of the shades of two pictures, 0 to 255."""
    assert one.size == other.size
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())


CROP = {"height": 64, "width": 64}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": {"shortest_edge": 64}, "crop_size": CROP}, ImageOps.fit(painted(), (64, 64))),
        ({"size": CROP, "crop_size": CROP}, painted().resize((64, 64))),
        ({"size": CROP, "crop_size": CROP, "do_normalize": False}, painted().resize((64, 64))),
    ],
    ids=["cropped", "stretched", "not normalised"],
)
def test_a_picture_shows_what_the_processor_passed_on(
    settings: dict[str, object], expected: Image.Image
) -> None:
    processor = Processor(CLIPImageProcessorPil(**settings))
    inputs = processor.image_processor(painted(), return_tensors="pt")
    (shown,) = seen(painted(), Trace([grids((8, 8))]), inputs, processor)
    assert shown.exact
    assert shown.parts == (Part(0),)
    assert difference(shown.image, expected) < 3


def test_padding_is_shown() -> None:
    """DeepSeek-VL makes pictures square with a margin."""
    size = {"height": 48, "width": 48}
    processor = Processor(transformers.DeepseekVLImageProcessor(size=size, min_size=4))
    inputs = processor.image_processor(painted(96, 48), return_tensors="pt")
    (shown,) = seen(painted(96, 48), Trace([grids((6, 6))]), inputs, processor)
    inside = shown.image.crop((0, 13, 48, 35))
    assert difference(inside, painted(96, 48).resize((48, 24)).crop((0, 1, 48, 23))) < 6
    assert np.asarray(shown.image)[:8].reshape(-1, 3).std(0).max() < 1, "the margin is even"


def test_the_sample_and_the_image_asked_for() -> None:
    """Pictures of a batch follow each other; the second sample has two."""
    shades = torch.tensor([0.0, 0.4, 1.0]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    trace = Trace([grids((4, 4)), grids((4, 4), (4, 4))])
    processor = Processor(CLIPImageProcessorPil(do_normalize=False))
    given = [Image.new("RGB", (9, 9), (n,) * 3) for n in (102, 255)]
    shown = seen(given, trace, {"pixel_values": shades}, processor, sample=1)
    assert [picture.image.getpixel((5, 5))[0] for picture in shown] == [102, 255]
    assert [picture.parts for picture in shown] == [(Part(0),), (Part(1),)]
    assert [picture.name for picture in shown] == ["image 1", "image 2"]


def tiled(*images: Image.Image) -> tuple[Any, Processor, list[int]]:
    """What InternVL's image processor makes of pictures, and how many views of each."""
    size = {"height": 48, "width": 48}
    made = transformers.GotOcr2ImageProcessor(size=size, max_patches=6, crop_to_patches=True)
    inputs = made(list(images), return_tensors="pt")
    counts = [made.get_number_of_image_patches(i.height, i.width, {}) for i in images]
    return inputs, Processor(made), counts


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [((192, 96), 1, 2), ((96, 192), 2, 1), ((150, 100), 2, 3)]
)
def test_tiles_lie_where_they_were_cut(size: tuple[int, int], rows: int, columns: int) -> None:
    image = painted(*size)
    inputs, processor, (count,) = tiled(image)
    assert count == rows * columns + 1
    shown = seen(image, Trace([grids(*[(6, 6)] * count)]), inputs, processor)
    tiles, whole = shown
    assert difference(tiles.image, image.resize((48 * columns, 48 * rows))) < 4
    assert [part.grid for part in tiles.parts] == list(range(count - 1))
    assert tiles.parts[-1].box == ((columns - 1) / columns, (rows - 1) / rows, 1, 1)
    assert whole.parts == (Part(count - 1),)
    assert difference(whole.image, image.resize((48, 48))) < 4
    assert (tiles.name, whole.name) == (f"image, {rows} x {columns} tiles", "image, the whole")


def test_tiles_of_several_pictures_are_told_apart() -> None:
    images = [painted(192, 96), painted(48, 48, blue=220), painted(150, 100, blue=10)]
    inputs, processor, counts = tiled(*images)
    assert counts == [3, 1, 7]
    shown = seen(images, Trace([grids(*[(6, 6)] * 11)]), inputs, processor)
    assert [picture.name for picture in shown] == [
        "image 1, 1 x 2 tiles",
        "image 1, the whole",
        "image 2",
        "image 3, 2 x 3 tiles",
        "image 3, the whole",
    ]
    assert [part.grid for picture in shown for part in picture.parts] == list(range(11))


def test_tiles_that_do_not_look_like_the_picture_stand_alone() -> None:
    views = torch.rand(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    processor = Processor(CLIPImageProcessorPil(do_normalize=False))
    image = Image.new("RGB", (60, 20), "white")
    shown = seen(image, Trace([grids(*[(4, 4)] * 3)]), {"pixel_values": views}, processor)
    assert [picture.name for picture in shown] == [f"image, tile {n}" for n in (1, 2, 3)]


QWEN = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
QWEN_SIZE = {"size": {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 600}}


def test_patches_in_a_row_are_put_together() -> None:
    processor = Processor(transformers.Qwen2VLImageProcessor(**QWEN, **QWEN_SIZE))
    images = [painted(160, 72), painted(40, 96, blue=200)]
    inputs = processor.image_processor(images, return_tensors="pt")
    trace = Trace([grids((9, 20), (12, 5))])
    for shown, image in zip(seen(images, trace, inputs, processor), images, strict=True):
        assert shown.exact
        assert difference(shown.image, image) < 2


def test_patches_in_another_order_are_not_believed() -> None:
    processor = Processor(transformers.Qwen2VLImageProcessor(**QWEN, **QWEN_SIZE))
    image = painted(160, 72)
    inputs = dict(processor.image_processor(image, return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].flip(0)
    (shown,) = seen(image, Trace([grids((9, 20))]), inputs, processor)
    assert not shown.exact
    assert shown.image is image


def frames(count: int) -> list[Image.Image]:
    """Frames of a video that turns bluer."""
    return [painted(40, 32, blue=255 * n // count) for n in range(count)]


@pytest.mark.parametrize("grid_a_frame", [False, True])
def test_a_video_has_a_picture_for_each_pair_of_frames(grid_a_frame: bool) -> None:
    """Qwen2-VL reads two frames at once; its successors write a grid for each pair."""
    video = frames(6)
    made = transformers.Qwen2VLImageProcessor(**QWEN, **QWEN_SIZE)
    pairs = [made(frame, return_tensors="pt") for frame in video[::2]]
    inputs = {
        "pixel_values_videos": torch.cat([pair["pixel_values"] for pair in pairs]),
        "video_grid_thw": torch.tensor([[3, 8, 10]]),
    }
    found = grids(*[(4, 5)] * 3) if grid_a_frame else grids((4, 5), frames=3)
    shown = seen([video], Trace([found]), inputs, Processor(made, made))
    parts = [Part(n) if grid_a_frame else Part(0, n) for n in range(3)]
    assert [picture.parts for picture in shown] == [(part,) for part in parts]
    for picture, frame in zip(shown, video[::2], strict=True):
        assert difference(picture.image, frame) < 2
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(0)
    shown = seen([video], Trace([found]), inputs, Processor(made, made))
    assert [picture.image for picture in shown] == video[::2], "another order is not believed"


def test_videos_have_a_normalization_of_their_own() -> None:
    """The image processor of this model normalizes, its video processor does not."""
    made = transformers.Qwen2VLImageProcessor(**QWEN, **QWEN_SIZE, do_normalize=False)
    video = frames(2)
    inputs = {
        "pixel_values_videos": made(video[0], return_tensors="pt")["pixel_values"],
        "video_grid_thw": torch.tensor([[1, 8, 10]]),
    }
    of_images = transformers.Qwen2VLImageProcessor(**QWEN, **QWEN_SIZE)
    image = painted(40, 32, blue=200)
    inputs |= of_images(image, return_tensors="pt")
    trace = Trace([grids((4, 5), (4, 5))])
    still, moving = seen([image, video], trace, inputs, Processor(of_images, made))
    assert difference(still.image, image) < 2
    assert difference(moving.image, video[0]) < 2


def test_an_image_and_a_video() -> None:
    image, video = painted(), frames(4)
    shown = seen([image, video], Trace([[*grids((4, 5)), VisualGrid(40, 2, 4, 5)]]))
    assert [picture.image for picture in shown] == [image, video[0], video[2]]
    assert [picture.exact for picture in shown] == [False] * 3
    assert shown[2].name == "video 2, frame 3 (as given)"
    shown = seen([image, video], Trace([grids(*[(4, 5)] * 3)]))
    assert [picture.image for picture in shown] == [image, video[0], video[2]]


def test_pictures_of_a_batch_lose_what_fills_them_up() -> None:
    """Pixtral's smaller pictures are filled up with zeros to the largest one."""
    size, patch = {"longest_edge": 64}, {"height": 8, "width": 8}
    processor = Processor(transformers.PixtralImageProcessor(size=size, patch_size=patch))
    images = [painted(64, 64), painted(32, 32)]
    inputs = processor.image_processor(images, return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (64, 64)
    shown = seen(images, Trace([grids((8, 8), (4, 4))]), inputs, processor)
    assert [picture.image.size for picture in shown] == [(64, 64), (32, 32)]
    assert difference(shown[1].image, images[1]) < 3


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (torch.zeros(48, 12), grids((4, 12))),  # patches whose order is not known
        (torch.ones(1, 5, 3, 16, 16), grids((4, 4), (6, 8))),  # LLaVA-NeXT
        (torch.ones(1, 2, 3, 16, 16), grids((4, 4), (3, 4))),
    ],
)
def test_the_given_image_stands_where_pixels_do_not_match_the_grids(
    pixels: torch.Tensor, found: list[VisualGrid]
) -> None:
    image = painted()
    inputs = {"pixel_values": pixels}
    shown = seen(image, Trace([found]), inputs, Processor(CLIPImageProcessorPil()))
    assert [picture.image for picture in shown] == [image] * len(found)
    assert not any(picture.exact for picture in shown)
    assert all("as given" in picture.name for picture in shown)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(atp_patch.InputError, match="3 images do not fit 2 grids"):
        seen([painted()] * 3, Trace([grids((4, 4), (4, 4))]))
    with pytest.raises(atp_patch.InputError, match="no visual tokens"):
        seen(painted(), Trace([[]]))
    with pytest.raises(atp_patch.InputError, match="no image was given"):
        seen([], Trace([grids((4, 4))]))
    with pytest.raises(atp_patch.InputError, match="no frames"):
        seen([[]], Trace([grids((4, 4))]))
