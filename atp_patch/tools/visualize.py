"""Pictures of the visual tokens that survive, in the manner of Fig. 4 of the ATP-LLaVA paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from atp_patch.contract import VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.patching.trace import PruningTrace

PANEL = 336
TITLE = 30
GAP = 12
DIMMED, FADE_TO = 0.18, 210.0  # share of a pruned patch that is left, and the grey of the rest


def survivors(trace: PruningTrace, grid: VisualGrid, layer: int, sample: int = 0) -> Tensor:
    """Which tokens of one grid enter a pruning layer, (frames, height, width) bool."""
    position = grid.coordinates()[0]
    kept = trace.layers[layer].kept[sample].cpu()
    return kept[position].reshape(grid.frames, grid.height, grid.width)


def overlay(
    images: Image.Image | Sequence[Image.Image],
    trace: PruningTrace,
    sample: int = 0,
    panel: int = PANEL,
) -> Image.Image:
    """Draw an image beside what each pruning layer leaves of it, with pruned patches dimmed.

    Args:
        images: the images as the model sees them (:func:`as_seen`), one for each frame of each of
            the sample's grids, in order. A single picture stands for every frame.
        trace: the trace of the forward pass.
        sample: number of the sample in the batch.
        panel: width of one panel in pixels.

    Returns:
        a row of panels for each frame: the image, and then a panel for each pruning layer, whose
        title has the number of tokens.

    Raises:
        InputError: where the sample has no images, or another number of frames.
    """
    frames = [(grid, frame) for grid in trace.grids[sample] for frame in range(grid.frames)]
    if not frames:
        raise InputError(f"sample {sample} has no visual tokens to draw.")
    pictures = [images] * len(frames) if isinstance(images, Image.Image) else list(images)
    if len(pictures) != len(frames):
        raise InputError(
            f"{len(pictures)} images for {len(frames)} frames of visual tokens; give one for each."
        )
    rows = []
    for (grid, frame), picture in zip(frames, pictures, strict=True):
        total = grid.height * grid.width
        base = _fit(picture, grid, panel)
        row = [_titled(base, f"image: {total} tokens")]
        for layer in trace.layers:
            kept = survivors(trace, grid, layer, sample)[frame]
            title = f"layer {layer}: {int(kept.sum())} of {total}"
            row.append(_titled(_dim(base, kept), title))
        rows.append(row)
    return _sheet(rows)


def as_seen(
    image: Image.Image, inputs: Mapping[str, Any], processor: Any, trace: PruningTrace
) -> list[Image.Image]:
    """The pictures that a model was shown of one image, for each frame of each grid of sample 0.

    A processor may crop, stretch or tile an image. Where ``pixel_values`` are pictures that match
    the grids, these pictures are taken. Otherwise (patches in a row, or a grid over several tiles)
    the whole image stands for each.

    Args:
        image: as it was given to the processor.
        inputs: what the processor made of the image.
        processor: the processor of the model.
        trace: the trace of the forward pass on these inputs.
    """
    grids = trace.grids[0]
    pixels = inputs["pixel_values"].float().cpu()
    if pixels.ndim == 5:
        pixels = pixels[0]
    match = pixels.ndim == 4 and all(
        grid.frames == 1 and grid.height * pixels.shape[3] == grid.width * pixels.shape[2]
        for grid in grids
    )
    if not match or len(pixels) != len(grids):
        return [image] * sum(grid.frames for grid in grids)
    settings = processor.image_processor
    if settings.do_normalize:
        mean, std = (
            torch.tensor(x).view(-1, 1, 1) for x in (settings.image_mean, settings.image_std)
        )
        pixels = pixels * std + mean
    shades = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(picture.numpy()) for picture in shades]


def _fit(image: Image.Image, grid: VisualGrid, panel: int) -> Image.Image:
    """The image at a size at which every token covers the same whole number of pixels."""
    cell = max(4, round(panel / grid.width))
    return image.convert("RGB").resize(
        (grid.width * cell, grid.height * cell), Image.Resampling.LANCZOS
    )


def _dim(image: Image.Image, kept: Tensor) -> Image.Image:
    """Fade the pruned patches (``kept``: (height, width) bool) to grey."""
    height, width = kept.shape
    pixels = np.asarray(image, dtype=np.float32)
    mask = kept.numpy().repeat(image.height // height, 0).repeat(image.width // width, 1)
    faded = FADE_TO + DIMMED * (pixels - FADE_TO)
    return Image.fromarray(np.where(mask[..., None], pixels, faded).astype(np.uint8))


def _titled(image: Image.Image, title: str) -> Image.Image:
    panel = Image.new("RGB", (image.width, image.height + TITLE), "white")
    panel.paste(image, (0, TITLE))
    ImageDraw.Draw(panel).text(
        (image.width / 2, TITLE / 2), title, "black", ImageFont.load_default(size=17), anchor="mm"
    )
    return panel


def _sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Put rows of panels on one white sheet."""
    width = max(sum(panel.width + GAP for panel in row) for row in rows) + GAP
    height = sum(max(panel.height for panel in row) + GAP for row in rows) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    y = GAP
    for row in rows:
        x = GAP
        for panel in row:
            sheet.paste(panel, (x, y))
            x += panel.width + GAP
        y += max(panel.height for panel in row) + GAP
    return sheet
