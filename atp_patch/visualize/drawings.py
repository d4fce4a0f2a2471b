"""What a forward pass kept, drawn over what the model saw; how many tokens each layer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atp_patch.contract.errors import InputError
from atp_patch.patching.trace import PruningTrace
from atp_patch.visualize import shades
from atp_patch.visualize.canvas import (
    Drawing,
    Panel,
    drawing_of,
    plot_axis,
    require_matplotlib,
    sheet,
)
from atp_patch.visualize.palette import stroked
from atp_patch.visualize.pictures import Given, Picture, seen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

_STRIP = 8  # the most frames in a strip, unless the caller says otherwise
_COLOURS = 256
_NOT_EXACT = "The picture is drawn as it was given; the model may have seen it cropped or padded."
_EXACT = "Drawn over the pixels that the model saw."


@dataclass(frozen=True)
class Shown:
    """What a trace is drawn over.

    Attributes:
        pictures: the pictures that the model saw.
        sample: the number of the sample in the batch.
        question: what was asked.
        answer: what was answered.
    """

    pictures: tuple[Picture, ...]
    sample: int = 0
    question: str | None = None
    answer: str | None = None

    @property
    def words(self) -> list[str]:
        """The lines of a caption: question and answer, and what the picture is."""
        told = [("Question", self.question), ("Answer", self.answer)]
        lines = [f"{name}: {text}" for name, text in told if text is not None]
        exact = all(picture.exact for picture in self.pictures)
        return [*lines, _EXACT if exact else _NOT_EXACT]

    def png(self, trace: PruningTrace) -> bytes:
        """Return the overlay of a trace as a PNG file, for notebooks."""
        return overlay(trace).png()


def with_pictures(
    trace: PruningTrace,
    images: Image.Image | Sequence[Given],
    inputs: Mapping[str, Any] | None = None,
    processor: Any = None,
    *,
    sample: int = 0,
    question: str | None = None,
    answer: str | None = None,
) -> PruningTrace:
    """Return the trace with the pictures over which it is drawn. In a notebook it shows itself.

    Args:
        trace: what ``atp_patch.last_trace(model)`` gives.
        images: the sample's images and videos in the order of the prompt; a video is a sequence of
            frames. A single image need not be in a list.
        inputs: what the processor made of the batch. Pictures are taken from there, so that a
            drawing shows what the model saw: cropped, stretched, padded or in tiles. Without it the
            images are drawn as they are given, and the caption says so.
        processor: the model's processor, whose normalization is taken back.
        sample: the number of the sample in the batch.
        question: what was asked, for the caption.
        answer: what was answered, for the caption.

    Raises:
        ConfigError: if matplotlib is not installed.
        InputError: if the sample has no images, or if the images do not fit its grids.
    """
    require_matplotlib()
    pictures = seen(images, trace, inputs, processor, sample)
    return replace(trace, illustration=Shown(pictures, sample, question, answer))


def overlay(
    trace: PruningTrace,
    *,
    layers: Sequence[int] | None = None,
    by_score: bool = False,
    ax: Axes | None = None,
) -> Drawing:
    """Draw each picture, and beside it what each pruning layer leaves of it, the rest faded.

    This is the form of Fig. 4 of the ATP-LLaVA paper.

    Args:
        trace: a trace with pictures (:func:`with_pictures`).
        layers: the pruning layers to draw; by default all.
        by_score: for a method with two thresholds, tint the tokens that only one of its scores
            keeps: blue by the first, orange by the second.
        ax: a matplotlib axis whose place is filled; by default a new figure.

    Raises:
        ConfigError: if matplotlib is not installed.
        InputError: if the trace has no pictures or no such layer, or if the method does not have
            the two thresholds that ``by_score`` needs.
    """
    shown, chosen = _shown(trace), _layers(trace, layers)
    legend = _legend(trace, chosen) if by_score else None
    paint = shades.kept_by if by_score else shades.kept_alone
    rows = []
    for picture in shown.pictures:
        total = shades.count(picture, trace, shown.sample, None)
        row = [Panel(shades.plain(picture, trace, shown.sample), f"{picture.name}: {total} tokens")]
        for layer in chosen:
            left = shades.count(picture, trace, shown.sample, layer)
            pixels = paint(picture, trace, shown.sample, layer)
            row.append(Panel(pixels, f"{_name(layer)}: {left} of {total}"))
        rows.append(row)
    return sheet(rows, ax, caption=shown.words, legend=legend)


def heat_map(
    trace: PruningTrace,
    score: str | None = None,
    *,
    layers: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Drawing:
    """Draw a method's score of every visual token over the pictures, for each pruning layer.

    Colours run from the lowest to the highest score of a layer. Tokens that were pruned earlier
    have no score, and are pale.

    Args:
        trace: a trace with pictures (:func:`with_pictures`).
        score: the name of the score, as in ``trace.layers[n].scores``; by default the first one
            with a threshold, or the first one.
        layers: the pruning layers to draw; by default those that have scores.
        ax: a matplotlib axis whose place is filled; by default a new figure.

    Raises:
        ConfigError: if matplotlib is not installed.
        InputError: if the trace has no pictures, no such layer or no such score.
    """
    shown, chosen = _shown(trace), _layers(trace, layers)
    require_matplotlib()
    from matplotlib import colormaps

    steps = np.linspace(0, 1, _COLOURS)
    colours = (colormaps["viridis"](steps)[:, :3] * 255).astype(np.float32)
    if layers is None:
        chosen = [layer for layer in chosen if trace.layers[layer].scores] or chosen[:1]
    rows, name = [], ""
    for picture in shown.pictures:
        row = [Panel(shades.plain(picture, trace, shown.sample), picture.name)]
        for layer in chosen:
            name, values = shades.scores_of(trace.layers[layer], layer, score)
            of_sample = values[shown.sample].detach().float().cpu()
            pixels = shades.heated(picture, trace, shown.sample, of_sample, colours)
            row.append(Panel(pixels, f"{_name(layer)}: {name}"))
        rows.append(row)
    bar = ("low", colours.astype(np.uint8)[None], f"high: the score {name!r}")
    return sheet(rows, ax, caption=shown.words, bar=bar)


def compare(
    traces: Mapping[str, PruningTrace],
    *,
    layer: int | None = None,
    across: int = 4,
    ax: Axes | None = None,
) -> Drawing:
    """Draw one picture under several methods: what each of them leaves.

    Args:
        traces: for each name, usually a method's, a trace with the pictures of the same prompt
            (:func:`with_pictures`). The answer that it knows is written below its panel.
        layer: what is left in this decoder layer; by default in the last layer.
        across: the most panels in a row.
        ax: a matplotlib axis whose place is filled; by default a new figure.

    Raises:
        ConfigError: if matplotlib is not installed.
        InputError: if there are no traces, or if one has no pictures or another number of them.
    """
    if not traces:
        raise InputError("there are no methods to compare; give a trace for each name.")
    shown = {name: _shown(trace) for name, trace in traces.items()}
    first = next(iter(shown.values()))
    if any(len(each.pictures) != len(first.pictures) for each in shown.values()):
        raise InputError("the traces are of different pictures; compare those of one prompt.")
    rows: list[list[Panel]] = []
    for number, picture in enumerate(first.pictures):
        panels = []
        for name, trace in traces.items():
            each = shown[name]
            own, total = each.pictures[number], shades.count(picture, trace, each.sample, None)
            at = _in_force(trace, layer)
            if at is None:
                pixels, left = shades.plain(own, trace, each.sample), total
            else:
                pixels = shades.kept_alone(own, trace, each.sample, at)
                left = shades.count(own, trace, each.sample, at)
            average = float(trace.tokens_per_layer[each.sample].double().mean())
            whole = trace.layout.totals[each.sample]
            title = f"{name}: {left} of {total}"
            told = "" if each.answer is None else f"{each.answer}  "
            panels.append(Panel(pixels, title, f"{told}({average / whole:.0%} over all layers)"))
        rows += [panels[at : at + across] for at in range(0, len(panels), across)]
    where = "in the last layer" if layer is None else f"in layer {layer}"
    asked = [] if first.question is None else [f"Question: {first.question}"]
    caption = [*asked, f"Visual tokens that are left {where}.", first.words[-1]]
    return sheet(rows, ax, caption=caption)


def strip(
    trace: PruningTrace,
    *,
    frames: int = _STRIP,
    layers: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Drawing:
    """Draw the frames of a video in a row, and below them what each pruning layer leaves.

    Args:
        trace: a trace with pictures (:func:`with_pictures`).
        frames: the most frames that are drawn; of more, some are chosen evenly, and the caption
            says so.
        layers: the pruning layers to draw; by default all.
        ax: a matplotlib axis whose place is filled; by default a new figure.

    Raises:
        ConfigError: if matplotlib is not installed.
        InputError: if the trace has no pictures or no such layer, or if ``frames`` is below 1.
    """
    shown, chosen = _shown(trace), _layers(trace, layers)
    if frames < 1:
        raise InputError(f"frames={frames} must be at least 1.")
    every = len(shown.pictures)
    wanted = min(frames, every)
    picked = [shown.pictures[n * every // wanted] for n in range(wanted)]
    sample = shown.sample
    totals = [shades.count(picture, trace, sample, None) for picture in picked]
    rows = [
        [
            Panel(shades.plain(picture, trace, sample), f"{picture.name}: {total}")
            for picture, total in zip(picked, totals, strict=True)
        ]
    ]
    for layer in chosen:
        rows.append(
            [
                Panel(
                    shades.kept_alone(picture, trace, sample, layer),
                    f"{_name(layer)}: {shades.count(picture, trace, sample, layer)} of {total}",
                )
                for picture, total in zip(picked, totals, strict=True)
            ]
        )
    left_out = [f"{wanted} of {every} pictures are drawn."] if wanted < every else []
    return sheet(rows, ax, caption=[*shown.words, *left_out])


def depth_plot(
    traces: PruningTrace | Mapping[str, PruningTrace], *, ax: Axes | None = None
) -> Drawing:
    """Plot how many visual tokens of a sample enter each decoder layer, on average over samples.

    Args:
        traces: a trace, or one for each name. They need no pictures.
        ax: the matplotlib axis to plot on; by default that of a new figure.

    Raises:
        ConfigError: if matplotlib is not installed.
        InputError: if there is no trace.
    """
    named = {"pruned": traces} if isinstance(traces, PruningTrace) else dict(traces)
    if not named:
        raise InputError("there is nothing to plot; give a trace for each name.")
    ax = plot_axis(ax, 5.2, 3.0)
    deepest = 0
    for number, (name, trace) in enumerate(named.items()):
        samples = [b for b, total in enumerate(trace.layout.totals) if total]
        counts = trace.tokens_per_layer[samples].double().mean(0).tolist()
        label = f"{name}: {trace.average_tokens:.0f} on average"
        look = {**stroked(number), "linewidth": 2, "label": label}
        ax.stairs(counts, np.arange(len(counts) + 1), baseline=None, **look)
        deepest = max(deepest, len(counts))
    whole = max(trace.visual_tokens for trace in named.values())
    ax.hlines(whole, 0, deepest, colors="0.5", linestyles="dotted", label=f"plain: {whole:.0f}")
    legend = min(0.08 * (len(named) + 1), 0.5)  # its share of the height, above all lines
    ax.set(xlabel="decoder layer", ylabel="visual tokens")
    ax.set(xlim=(0, deepest), ylim=(0, whole / (1 - legend)))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper right", borderaxespad=0)
    return drawing_of(ax)


def _shown(trace: PruningTrace) -> Shown:
    if not isinstance(trace.illustration, Shown):
        raise InputError(
            "this trace does not know its pictures; draw atp_patch.visualize.with_pictures(trace, "
            "images, inputs, processor)."
        )
    return trace.illustration


def _layers(trace: PruningTrace, layers: Sequence[int] | None) -> list[int]:
    """Return the pruning layers to draw.

    Raises:
        InputError: if one of them is none.
    """
    chosen = list(trace.layers) if layers is None else list(layers)
    wrong = [layer for layer in chosen if layer not in trace.layers]
    if wrong:
        raise InputError(
            f"nothing is pruned before layer {wrong[0]}; the pruning layers are "
            f"{', '.join(map(str, trace.layers)) or 'none'}."
        )
    return chosen


def _in_force(trace: PruningTrace, layer: int | None) -> int | None:
    """Return the pruning layer that decided what is left in a layer; None if all is left there."""
    return max((at for at in trace.layers if layer is None or at <= layer), default=None)


def _name(layer: int) -> str:
    return f"layer {layer}" if layer else "before the decoder"


def _legend(trace: PruningTrace, layers: Sequence[int]) -> dict[str, str]:
    if not layers:
        raise InputError("no layer pruned anything, so no score kept anything.")
    first, second = shades.compared(trace, layers[0])
    names = {f"kept by {first!r} alone": shades.FIRST, f"by {second!r} alone": shades.SECOND}
    return {label: f"#{bytes(colour).hex()}" for label, colour in names.items()}
