"""The pictures that a model was shown, and where the tokens of each grid lie in them.

A processor may crop, stretch, pad or tile a picture, and samples the frames of a video. Drawings
are therefore made over the pixels of the model's inputs, wherever these are pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from atp_patch.contract import VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.patching.trace import PruningTrace
from atp_patch.visualize.tiles import divided, likeness

Given: TypeAlias = Image.Image | Sequence[Image.Image]  # a picture, or the frames of a video
_ALIKE = 0.12  # the most that a picture and one put together of patches differ; white is 1
_GIVEN = " (as given)"


@dataclass(frozen=True)
class Part:
    """Where one frame of one grid lies in a picture.

    Attributes:
        grid: the number of the grid within the sample.
        frame: the number of the frame within the grid.
        box: the left, upper, right and lower edge, as shares of the picture's width and height.
    """

    grid: int
    frame: int = 0
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Picture:
    """A picture as a model was shown it.

    Attributes:
        image: the picture.
        parts: where the grids lie in it; several for a picture that was cut into tiles.
        name: what it is, in a few words.
        exact: whether the picture was made of the model's inputs. Otherwise it is the picture as it
            was given to the processor, which stands for the whole of each grid.
    """

    image: Image.Image
    parts: tuple[Part, ...]
    name: str
    exact: bool = True


def seen(
    images: Image.Image | Sequence[Given],
    trace: PruningTrace,
    inputs: Mapping[str, Any] | None = None,
    processor: Any = None,
    sample: int = 0,
) -> tuple[Picture, ...]:
    """Return the pictures that the model was shown of one sample's images and videos.

    Args:
        images: the sample's images in the order of the prompt; a video is a sequence of frames. A
            single image need not be in a list.
        trace: the trace of the forward pass.
        inputs: what the processor made of the batch. Without it the images stand for what the model
            saw.
        processor: the processor of the model, whose normalization is taken back.
        sample: the number of the sample in the batch.

    Returns:
        A picture for each image, two where a model sees tiles and the whole, and one for each frame
        of a video.

    Raises:
        InputError: if the sample has no images, or if the images do not fit its grids.
    """
    grids = trace.grids[sample]
    if not grids:
        raise InputError(f"sample {sample} has no visual tokens to draw.")
    given: list[Given] = [images] if isinstance(images, Image.Image) else list(images)
    if not given:
        raise InputError("no image was given; give those of the prompt.")
    views = None if inputs is None else _views(inputs, processor, trace, sample)
    slots = [Part(g, frame) for g, grid in enumerate(grids) for frame in range(grid.frames)]
    owner = _owners(given, grids, views)
    names = ("pixel_values", "pixel_values_videos")
    in_patches = any(getattr((inputs or {}).get(name), "ndim", 0) == 2 for name in names)
    pictures: list[Picture] = []
    for number, image in enumerate(given):
        own = [n for n, found in enumerate(owner) if found == number]
        parts = [slots[n] for n in own]
        shown = None if views is None else [views[n] for n in own]
        if in_patches and shown and not _looks_like(image, shown):
            shown = None  # the patches are in an order that is not known here
        name = f"image {number + 1}" if len(given) > 1 else "image"
        if isinstance(image, Image.Image):
            pictures += _of_image(image, parts, shown, name)
        else:
            pictures += _of_video(image, parts, shown, name.replace("image", "video"))
    return tuple(pictures)


def _of_image(
    image: Image.Image, parts: Sequence[Part], views: Sequence[Image.Image] | None, name: str
) -> list[Picture]:
    """Return the pictures of one image: one, or the tiles put together and the whole."""
    if views is None:
        several = len(parts) > 1
        names = [f"{name}, view {n + 1}" if several else name for n in range(len(parts))]
        return [
            Picture(image, (part,), named + _GIVEN, exact=False)
            for part, named in zip(parts, names, strict=True)
        ]
    if len(views) == 1:
        return [Picture(views[0], (parts[0],), name)]
    found = divided(image, views)
    if found is None:
        return [
            Picture(view, (part,), f"{name}, tile {n + 1}")
            for n, (view, part) in enumerate(zip(views, parts, strict=True))
        ]
    placed = tuple(
        replace(parts[n], box=box) for n, box in zip(found.tiles, found.boxes, strict=True)
    )
    tiled = Picture(found.image, placed, f"{name}, {found.rows} x {found.columns} tiles")
    if found.whole is None:
        return [tiled]
    whole = Picture(views[found.whole], (parts[found.whole],), f"{name}, the whole")
    return [tiled, whole] if found.whole else [whole, tiled]


def _of_video(
    frames: Sequence[Image.Image],
    parts: Sequence[Part],
    views: Sequence[Image.Image] | None,
    name: str,
) -> list[Picture]:
    """Return a picture for each frame of a video that has tokens of its own."""
    if not frames:
        raise InputError(f"{name} has no frames; give the frames of the video.")
    if views is not None:
        return [
            Picture(view, (part,), f"{name}, frame {n + 1}")
            for n, (view, part) in enumerate(zip(views, parts, strict=True))
        ]
    # The first of the given frames that the tokens of one frame stand for.
    chosen = [n * len(frames) // len(parts) for n in range(len(parts))]
    return [
        Picture(frames[at], (part,), f"{name}, frame {at + 1}{_GIVEN}", exact=False)
        for at, part in zip(chosen, parts, strict=True)
    ]


def _looks_like(image: Given, views: Sequence[Image.Image]) -> bool:
    """Return whether the first view can be made of the image, or of a video's first frame."""
    first = image if isinstance(image, Image.Image) else image[0]
    return likeness(first, views[0]) <= _ALIKE


def _owners(
    given: Sequence[Given], grids: Sequence[VisualGrid], views: Sequence[Image.Image] | None
) -> list[int]:
    """For each frame of each grid, the number of the image or video that it shows.

    Raises:
        InputError: if it cannot be told.
    """
    frames = [number for number, grid in enumerate(grids) for _ in range(grid.frames)]
    if len(given) == 1:
        return [0] * len(frames)
    if len(given) == len(grids):
        return frames
    stills = [image for image in given if isinstance(image, Image.Image)]
    if len(stills) == len(given) and len(frames) == len(grids):
        if views is not None:
            return _shared_out(stills, views)
        if len(grids) % len(given) == 0:  # as many views of each image, such as a whole and a part
            return [number * len(given) // len(grids) for number in range(len(grids))]
    if len(given) - len(stills) == 1 and len(frames) >= len(given):
        rest = len(frames) - len(stills)  # frames of the one video, each of which may be a grid
        counts = [1 if isinstance(image, Image.Image) else rest for image in given]
        return [number for number, count in enumerate(counts) for _ in range(count)]
    raise InputError(
        f"{len(given)} images do not fit {len(grids)} grids of visual tokens; give the images and "
        "videos of this sample in the order of the prompt, a video as the list of its frames."
    )


def _shared_out(images: Sequence[Image.Image], views: Sequence[Image.Image]) -> list[int]:
    """Divide views in a row among several images so that they look most like them."""
    free = len(views) - len(images)
    if free < 0:
        raise InputError(f"{len(images)} images for {len(views)} views; give those of the prompt.")
    # best[n]: the smallest sum of differences of the first images with the first n views
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for number, image in enumerate(images):
        after: dict[int, tuple[float, list[int]]] = {}
        for start, (cost, owner) in best.items():
            for stop in range(start + 1, min(start + free + 1, len(views)) + 1):
                count = stop - start
                found = divided(image, views[start:stop]) if count > 1 else None
                alone = likeness(image, views[start]) if count == 1 else 1.0
                total = cost + count * (alone if found is None else found.difference)
                if stop not in after or total < after[stop][0]:
                    after[stop] = total, [*owner, *[number] * count]
        best = after
    return best[len(views)][1]


def _views(
    inputs: Mapping[str, Any], processor: Any, trace: PruningTrace, sample: int
) -> list[Image.Image] | None:
    """For each frame of each grid the picture in the inputs, or None where they hold none."""
    of_images = _pixels(inputs, "pixel_values", "image_grid_thw", processor)
    of_videos = _pixels(inputs, "pixel_values_videos", "video_grid_thw", processor)
    if of_images is None and of_videos is None:
        return None
    queues = [
        iter([(pixels, settings) for pixels in found])
        for found, settings in (
            (of_images, _settings(processor, "pixel_values")),
            (of_videos, _settings(processor, "pixel_values_videos")),
        )
        if found is not None
    ]
    waiting = [next(queue, None) for queue in queues]
    views: list[Image.Image] = []
    for b, grids in enumerate(trace.grids):
        for grid in grids:
            for _ in range(grid.frames):
                at = next((n for n, one in enumerate(waiting) if one and _fits(one[0], grid)), None)
                if at is None:
                    return None
                view = waiting[at]
                assert view is not None
                if b == sample:
                    views.append(_as_image(*view))
                waiting[at] = next(queues[at], None)
    return None if any(view is not None for view in waiting) else views


def _fits(pixels: Tensor, grid: VisualGrid) -> bool:
    """Return whether a view, (channels, height, width), has the shape of a grid's tokens."""
    return grid.height * pixels.shape[2] == grid.width * pixels.shape[1]


def _pixels(
    inputs: Mapping[str, Any], name: str, sizes: str, processor: Any
) -> list[Tensor] | None:
    """Return the normalized pictures of all samples, (channels, height, width) each, in their
    order.
    """
    pixels = inputs.get(name)
    if not isinstance(pixels, Tensor):
        return None
    pixels = pixels.detach().float().cpu()
    if sizes in inputs and pixels.ndim == 2:
        return _from_patches(pixels, inputs[sizes].tolist(), _settings(processor, name))
    if pixels.ndim == 5:  # (samples, tiles or frames, ...); samples with fewer are filled up with 0
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).any(1)]
    if pixels.ndim != 4:
        return None
    return _without_padding(list(pixels), inputs.get("image_sizes"))


def _without_padding(pictures: list[Tensor], sizes: Any) -> list[Tensor]:
    """Cut off what fills smaller pictures of a batch up to the largest, by their (height, width).

    Some processors use the same name for the sizes of the pictures that they were given; then there
    is more than zeros outside.
    """
    if sizes is None or len(sizes) != len(pictures):
        return pictures
    cut = []
    for picture, size in zip(pictures, sizes, strict=True):
        height, width = (int(side) for side in size)
        if picture[:, height:].any() or picture[:, :, width:].any():
            return pictures
        cut.append(picture[:, :height, :width])
    return cut


def _from_patches(
    patches: Tensor, sizes: Sequence[Sequence[int]], settings: Any
) -> list[Tensor] | None:
    """Put the patches of Qwen2-VL's processors together again.

    Args:
        patches: (patches, channels * frames * side * side), in squares of ``merge_size``.
        sizes: for each image or video its frames, rows and columns of patches.
        settings: the image processor.

    Returns:
        A picture for each pair of frames, the first of the pair; None for another order of patches.
    """
    side, merge, pair = (
        getattr(settings, name, None)
        for name in ("patch_size", "merge_size", "temporal_patch_size")
    )
    if not (isinstance(side, int) and isinstance(merge, int) and isinstance(pair, int)):
        return None
    if patches.shape[1] != 3 * pair * side**2 or len(patches) != sum(
        t * h * w for t, h, w in sizes
    ):
        return None
    pictures, start = [], 0
    for frames, rows, columns in sizes:
        stop = start + frames * rows * columns
        shape = (frames, rows // merge, columns // merge, merge, merge, 3, pair, side, side)
        put = patches[start:stop].reshape(shape).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        whole = put.reshape(frames, pair, 3, rows * side, columns * side)
        pictures += list(whole[:, 0])
        start = stop
    return pictures


def _settings(processor: Any, name: str) -> Any:
    """Return the part of a processor that made the pixels of this name."""
    images = getattr(processor, "image_processor", processor)
    videos = getattr(processor, "video_processor", None)
    return videos if name.endswith("videos") and videos is not None else images


def _as_image(pixels: Tensor, settings: Any) -> Image.Image:
    """Return a picture, (channels, height, width), that a processor normalized, as 8-bit RGB."""
    if getattr(settings, "do_normalize", False):
        mean, std = (
            torch.tensor(getattr(settings, f"image_{x}")).view(-1, 1, 1) for x in ("mean", "std")
        )
        pixels = pixels * std + mean
    shades = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(shades.numpy())
