"""Pictures whose patches are dimmed, tinted or coloured by what happened to their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from atp_patch.contract import VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.patching.trace import LayerTrace, PruningTrace
from atp_patch.visualize.pictures import Picture

DIMMED, FADE_TO = 0.18, 210.0  # share of a pruned patch that is left, and the grey of the rest
TINT, HEAT, PALE = 0.6, 0.65, 0.15  # shares of a tint, of a heat map's colour, of what has no score
# Colours of Okabe and Ito, which most people with colour-blindness tell apart.
FIRST, SECOND = (0, 114, 178), (230, 159, 0)
WIDTH_PX, LEAST_PX = 336, 4  # about the width of a picture, and the least side of a token

Floats = NDArray[np.float32]


def table_of(values: Tensor, grid: VisualGrid) -> NDArray[Any]:
    """Read values over the sequence, (L,), for the tokens of a grid: (frames, height, width)."""
    position = grid.coordinates()[0]
    table = values.detach().cpu()[position].reshape(grid.frames, grid.height, grid.width)
    return table.float().numpy() if table.is_floating_point() else table.numpy()


def survivors(trace: PruningTrace, grid: VisualGrid, layer: int, sample: int = 0) -> NDArray[Any]:
    """Return which tokens of one grid enter a pruning layer, (frames, height, width) bool."""
    return table_of(trace.layers[layer].kept[sample], grid)


def count(picture: Picture, trace: PruningTrace, sample: int, layer: int | None) -> int:
    """Return how many tokens of a picture enter a pruning layer; None: the decoder, before any
    pruning.
    """
    total = 0
    for part in picture.parts:
        grid = trace.grids[sample][part.grid]
        if layer is None:
            total += grid.height * grid.width
        else:
            total += int(survivors(trace, grid, layer, sample)[part.frame].sum())
    return total


def fitted(picture: Picture, trace: PruningTrace, sample: int) -> Image.Image:
    """Return the picture at a size at which tokens cover whole numbers of pixels, the same for
    each.
    """
    part = picture.parts[0]
    grid = trace.grids[sample][part.grid]
    left, top, right, bottom = part.box
    across, down = round(grid.width / (right - left)), round(grid.height / (bottom - top))
    cell = max(LEAST_PX, round(WIDTH_PX / across))
    return picture.image.convert("RGB").resize(
        (across * cell, down * cell), Image.Resampling.LANCZOS
    )


def plain(picture: Picture, trace: PruningTrace, sample: int) -> NDArray[np.uint8]:
    """Return the picture without any shade."""
    return np.asarray(fitted(picture, trace, sample))


def kept_alone(picture: Picture, trace: PruningTrace, sample: int, layer: int) -> NDArray[np.uint8]:
    """Return the picture with the patches faded to grey whose tokens do not enter a layer."""
    return _painted(
        picture,
        trace,
        sample,
        lambda pixels, grid, frame: _faded(
            pixels, _spread(survivors(trace, grid, layer, sample)[frame], pixels)
        ),
    )


def kept_by(picture: Picture, trace: PruningTrace, sample: int, layer: int) -> NDArray[np.uint8]:
    """Return the same, with the patches tinted that one of two scores keeps and the other does not.

    Raises:
        InputError: if the method did not compare two scores with thresholds there.
    """
    passed = [
        trace.layers[layer].scores[name][sample] >= value[sample]
        for name, value in compared(trace, layer).items()
    ]

    def paint(pixels: Floats, grid: VisualGrid, frame: int) -> Floats:
        kept = survivors(trace, grid, layer, sample)[frame]
        first, second = (table_of(found, grid)[frame] & kept for found in passed)
        for alone, colour in ((first & ~second, FIRST), (second & ~first, SECOND)):
            tinted = (1 - TINT) * pixels + TINT * np.asarray(colour, np.float32)
            pixels = np.where(_spread(alone, pixels), tinted, pixels)
        return _faded(pixels, _spread(kept, pixels))

    return _painted(picture, trace, sample, paint)


def compared(trace: PruningTrace, layer: int) -> dict[str, Tensor]:
    """Return the two thresholds of a layer by the names of their scores.

    Raises:
        InputError: if there are not two.
    """
    thresholds = trace.layers[layer].thresholds
    if len(thresholds) != 2:
        raise InputError(
            f"two colours need a method that compares two scores with thresholds, as atp does; "
            f"before layer {layer} there are {len(thresholds)} thresholds. Leave out by_score=True."
        )
    return thresholds


def scores_of(layer_trace: LayerTrace, layer: int, name: str | None) -> tuple[str, Tensor]:
    """Return the name of a score of one layer and its values, (B, L).

    Args:
        layer_trace: what happened before the layer.
        layer: its number, for errors.
        name: the name of the score; None: the first one with a threshold, or the first one.

    Raises:
        InputError: if there is none of that name.
    """
    scores = layer_trace.scores
    if not scores:
        raise InputError(
            f"the method gave no scores before layer {layer}: it kept everything, or it does not "
            "rank tokens. Draw the overlay instead."
        )
    chosen = next(iter([*layer_trace.thresholds, *scores])) if name is None else name
    if chosen not in scores:
        raise InputError(
            f"no score {chosen!r} before layer {layer}; there are {', '.join(scores)}."
        )
    return chosen, scores[chosen]


def heated(
    picture: Picture, trace: PruningTrace, sample: int, values: Tensor, colours: Floats
) -> NDArray[np.uint8]:
    """Return the picture in grey under the colours of a score; what has no score is paler.

    Args:
        values: (L,) scores by position, NaN where nothing was scored.
        colours: (n, 3) colours from the lowest to the highest score of the sample.
    """
    finite = values[values.isfinite()]
    low = float(finite.min()) if finite.numel() else 0.0
    wide = (float(finite.max()) - low if finite.numel() else 0.0) or 1.0

    def paint(pixels: Floats, grid: VisualGrid, frame: int) -> Floats:
        score = table_of(values, grid)[frame]
        seen = np.isfinite(score)
        place = np.where(seen, (score - low) / wide, 0) * (len(colours) - 1)
        colour = colours[place.round().astype(int)]
        grey = pixels.mean(-1, keepdims=True)
        hot = (1 - HEAT) * grey + HEAT * _spread(colour, pixels)
        pale = FADE_TO + PALE * (grey - FADE_TO)
        return np.where(_spread(seen, pixels), hot, pale)

    return _painted(picture, trace, sample, paint)


def _painted(
    picture: Picture,
    trace: PruningTrace,
    sample: int,
    paint: Callable[[Floats, VisualGrid, int], Floats],
) -> NDArray[np.uint8]:
    """Let a function paint each part of a picture, given its pixels, its grid and its frame."""
    pixels = np.array(fitted(picture, trace, sample), dtype=np.float32)
    height, width = pixels.shape[:2]
    for part in picture.parts:
        left, top, right, bottom = part.box
        rows = slice(round(top * height), round(bottom * height))
        columns = slice(round(left * width), round(right * width))
        grid = trace.grids[sample][part.grid]
        pixels[rows, columns] = paint(pixels[rows, columns], grid, part.frame)
    return pixels.round().astype(np.uint8)


def _spread(table: NDArray[Any], pixels: Floats) -> NDArray[Any]:
    """Return values of tokens, (rows, columns[, 3]), for every pixel: (height, width, 1 or 3)."""
    height, width = pixels.shape[:2]
    rows = np.arange(height) * table.shape[0] // height
    columns = np.arange(width) * table.shape[1] // width
    spread = table[rows][:, columns]
    return spread if spread.ndim == 3 else spread[..., None]


def _faded(pixels: Floats, kept: NDArray[Any]) -> Floats:
    return np.where(kept, pixels, FADE_TO + DIMMED * (pixels - FADE_TO))
