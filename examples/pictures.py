"""The pictures of the README and of the documentation, each for light and for dark pages.

    python examples/pictures.py --out docs/pictures

Some are drawn from the built-in model, and the others from what is recorded in `results`. The times
of the first picture are those of this machine: the CPU time of one thread. `--times 203 99` draws
times that were measured before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

import atp_patch
from atp_patch.builtin import load_builtin, prompt

ROOT = Path(__file__).resolve().parent.parent
SCENE, QUESTION = ROOT / "examples" / "scenes" / "01.png", "How many red shapes are there?"
LAYERS, TOKENS = [4, 14, 24], 144
FADED, GREY = 0.12, 235  # share of a dropped patch that is still seen, and the grey of the rest
# Which tasks stand together in the picture of depth.
KINDS = {
    "objects: is there one, its colour,\nshape, size and place": (
        *("exist", "colour", "shape", "size", "position", "relation"),
    ),
    "counts and the commonest colour": ("count", "common"),
    "signs and textures": ("ocr", "texture"),
    "the colour of the background": ("background",),
}


@dataclass(frozen=True)
class Theme:
    """Colours for one kind of pages, which people with any kind of colour vision tell apart.

    They are those of Okabe and Ito, made darker or lighter until they are read well as text.

    Attributes:
        suffix: what is added to a picture's name.
        ink, paper: of letters, and of what they stand on.
        panel: of a box on the paper.
        dropped: of a token that is left out.
        plain, blue, orange, green, purple, yellow: of lines and bars; "plain" is a grey.
    """

    suffix: str
    ink: str
    paper: str
    panel: str
    dropped: str
    plain: str
    blue: str
    orange: str
    green: str
    purple: str
    yellow: str

    @property
    def style(self) -> dict[str, Any]:
        """Settings of matplotlib."""
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        return {
            "figure.dpi": 200,
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            **dict.fromkeys(inked, self.ink),
        }


LIGHT = Theme(
    suffix="",
    ink="#1a1a1a",
    paper="#ffffff",
    panel="#eef2f5",
    dropped="#d9d9d9",
    plain="#6b6b6b",
    blue="#0072b2",
    orange="#d55e00",
    green="#007a59",
    purple="#a5508a",
    yellow="#8f6400",
)
DARK = Theme(
    suffix="-dark",
    ink="#e8e8e8",
    paper="#16191f",
    panel="#262b34",
    dropped="#4a505b",
    plain="#a8a8a8",
    blue="#56b4e9",
    orange="#ff8f4d",
    green="#2cc295",
    purple="#e29cc8",
    yellow="#f0b93a",
)


@dataclass(frozen=True)
class Answered:
    """What the built-in model did with the question, plain and pruned.

    Attributes:
        pictures: a title, pixels, and the number of visual tokens of each panel.
        answers: plain and pruned.
        tokens: visual tokens, averaged over the layers, plain and pruned.
        times_ms: milliseconds up to the first token, plain and pruned.
        num_layers: the number of decoder layers.
    """

    pictures: list[tuple[str, np.ndarray, float]]
    answers: tuple[str, str]
    tokens: tuple[float, float]
    times_ms: tuple[float, float]
    num_layers: int


def ask(model: Any, processor: Any, inputs: Any) -> str:
    """The greedy answer to the question."""
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def left(image: Image.Image, trace: atp_patch.PruningTrace, layer: int) -> np.ndarray:
    """(height, width, 3): the picture with the patches faded that do not enter a pruning layer."""
    (grid,) = trace.grids[0]
    kept = trace.layers[layer].kept[0][grid.coordinates()[0]].reshape(grid.height, grid.width)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    rows, columns = pixels.shape[0] // grid.height, pixels.shape[1] // grid.width
    mask = kept.numpy().repeat(rows, 0).repeat(columns, 1)[..., None]
    faded = GREY + FADED * (pixels - GREY)
    return np.where(mask, pixels, faded).astype(np.uint8)


def cpu_ms(model: Any, inputs: Any, rounds: int) -> tuple[float, float]:
    """The CPU time of a prompt up to the first token's logits, plain and pruned.

    One thread computes, so that it is also the time that passes on a machine with nothing else to
    do. Plain and pruned passes take turns, after one of each. The least time of all rounds is the
    one that other programs have disturbed least.
    """
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for times, way in zip(found, (atp_patch.disabled(model), nullcontext()), strict=True):
            with torch.inference_mode(), way:
                start = time.process_time()
                model(**inputs, logits_to_keep=1)
                times.append(1000 * (time.process_time() - start))
    return min(found[0][1:]), min(found[1][1:])


def answered(times_ms: tuple[float, float] | None, rounds: int) -> Answered:
    """Ask the built-in model, plain and pruned, and measure the times that are not given."""
    model, processor = load_builtin()
    image = Image.open(SCENE)
    inputs = processor(images=image, text=prompt(QUESTION), return_tensors="pt")
    plain = ask(model, processor, inputs)
    atp_patch.patch_model(model, layers=LAYERS, target_tokens=TOKENS)
    times_ms = times_ms or cpu_ms(model, inputs, rounds)
    answers = plain, ask(model, processor, inputs)
    trace = atp_patch.last_trace(model)
    counts = trace.tokens_per_layer[0].tolist()
    whole = "what the model is shown", np.asarray(image.convert("RGB")), trace.visual_tokens
    pictures = [whole, *((f"from layer {i} on", left(image, trace, i), counts[i]) for i in LAYERS)]
    tokens = trace.visual_tokens, trace.average_tokens
    return Answered(pictures, answers, tokens, times_ms, len(counts))


def first_screen(found: Answered, theme: Theme) -> Figure:
    """A scene under three pruning layers, with the question, both answers, and what they cost."""
    figure = plt.figure(figsize=(8, 3.5))
    for number, (title, pixels, count) in enumerate(found.pictures):
        axes = figure.add_axes((0.012 + 0.2475 * number, 0.325, 0.235, 0.54))
        axes.imshow(pixels)
        for height, line in ((1.14, title), (1.04, f"{count:.0f} visual tokens")):
            axes.text(0.5, height, line, ha="center", transform=axes.transAxes)
        axes.axis("off")
    axes = figure.add_axes((0.012, 0.0, 0.976, 0.29), xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    columns = {
        f"visual tokens, mean of {found.num_layers} layers": found.tokens,
        "ms to the first token (one core)": found.times_ms,
    }
    bars(axes, theme, found.answers, columns)
    return figure


def bars(
    axes: Axes,
    theme: Theme,
    answers: tuple[str, str],
    columns: dict[str, tuple[float, float]],
) -> None:
    """A table of two rows, plain and pruned: the answer, and a bar with its number in each column.

    Args:
        axes: from 0 to 1 in both directions.
        theme: the colours.
        answers: of the plain and of the pruned model.
        columns: title -> the plain and the pruned model's number.
    """
    box = FancyBboxPatch(
        (0.01, 0.04), 0.98, 0.92, boxstyle="round,pad=0.01", fc=theme.panel, ec="none"
    )
    axes.add_patch(box)
    axes.text(0.02, 0.82, QUESTION, fontweight="bold", va="center")
    rows = ((0.52, "plain", theme.plain), (0.22, "pruned", theme.blue))
    for number, (y, name, colour) in enumerate(rows):
        axes.text(0.02, y, name, va="center", color=colour, fontweight="bold")
        axes.text(0.12, y, answers[number], va="center", fontweight="bold", fontsize=11)
        for place, values in enumerate(columns.values()):
            x, width = 0.42 + 0.31 * place, 0.2 * values[number] / max(values)
            axes.add_patch(Rectangle((x, y - 0.1), width, 0.2, color=colour))
            axes.text(x + width + 0.008, y, f"{values[number]:.0f}", va="center", fontweight="bold")
    for place, title in enumerate(columns):
        axes.text(0.42 + 0.31 * place, 0.82, title, va="center")


def held() -> tuple[list[int], list[int]]:
    """The visual tokens that enter each decoder layer at one budget: pruned inside the decoder, and
    before it.
    """
    model, processor = load_builtin()
    inputs = processor(images=Image.open(SCENE), text=prompt(QUESTION), return_tensors="pt")

    def counts(**settings: Any) -> list[int]:
        atp_patch.patch_model(model, target_tokens=TOKENS, **settings)
        with torch.no_grad():
            model(**inputs)
        return [int(count) for count in atp_patch.last_trace(model).tokens_per_layer[0]]

    return counts(layers=LAYERS), counts(method="divprune")


def stairs(inside: list[int], door: list[int], theme: Theme) -> Figure:
    """How many visual tokens each decoder layer holds under three ways to spend one budget."""
    depth, total = len(inside), inside[0]
    figure, axes = plt.subplots(figsize=(8, 3.1), layout="constrained")
    for counts, colour, line in (
        ([total] * depth, theme.plain, ":"),
        (inside, theme.blue, "-"),
        (door, theme.orange, "--"),
    ):
        edges = np.arange(depth + 1)
        axes.stairs(counts, edges, baseline=None, color=colour, linestyle=line, linewidth=2.2)
    at_end: dict[str, Any] = {"x": depth, "ha": "right"}
    whole, before = (
        f"plain model: {total} in every layer",
        f"before the decoder: {np.mean(door):.0f} in every layer",
    )
    axes.text(**at_end, y=total - 14, s=whole, color=theme.plain, va="top")
    axes.text(**at_end, y=door[0] + 14, s=before, color=theme.orange)
    within = f"inside, before layers 4, 14 and 24:\n{np.mean(inside):.0f} on average"
    axes.text(LAYERS[0] + 0.4, inside[LAYERS[0]] + 90, within, color=theme.blue)
    axes.set_xlim(0, depth)
    axes.set_ylim(0, total * 1.08)
    axes.set_xticks([*range(0, depth, 4), depth])
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("visual tokens")
    return figure


def one_layer(theme: Theme) -> Figure:
    """Scores, the choice among them, and how the kept tokens move together."""
    scores = [0.2, 0.9, 0.35, 0.15, 0.8, 0.1, 0.7, 0.25]
    kept = [number for number, score in enumerate(scores) if score > 0.5]
    text = ["what", "is", "it", "?"]
    titles = ("1. score the picture's tokens", "2. choose the best", "3. gather: positions stay")
    widths = [12.6, 12.6, 8.6]
    figure, panels = plt.subplots(
        1, 3, figsize=(8, 0.95), width_ratios=widths, layout="constrained"
    )
    for axes, title, width in zip(panels, titles, widths, strict=True):
        axes.set_title(title, loc="left")
        axes.set_xlim(-0.2, width - 0.2)
        axes.set_ylim(-1.2, 2.05)
        axes.set_aspect("equal")
        axes.axis("off")

    def token(axes: Axes, x: float, number: int, *, stays: bool = True) -> None:
        visual = number < len(scores)
        colour = (theme.blue if stays else theme.dropped) if visual else theme.paper
        look: dict[str, Any] = {"facecolor": colour, "edgecolor": theme.ink, "linewidth": 0.6}
        axes.add_patch(Rectangle((x, 0), 0.9, 0.9, **look))
        ink = theme.paper if visual and stays else theme.ink
        axes.text(x + 0.45, 0.43, str(number), ha="center", va="center", fontsize=7, color=ink)

    everything = len(scores) + len(text)
    for number in range(everything):
        token(panels[0], number, number)
        token(panels[1], number, number, stays=number in kept or number >= len(scores))
    for number, score in enumerate(scores):
        panels[0].add_patch(Rectangle((number + 0.2, 1.05), 0.5, score, facecolor=theme.orange))
    left_over = [*kept, *range(len(scores), everything)]
    for x, number in enumerate(left_over):
        token(panels[2], x, number)
    for axes, visual in (
        (panels[0], len(scores)),
        (panels[1], len(scores)),
        (panels[2], len(kept)),
    ):
        axes.text(visual / 2, -0.75, "picture", ha="center", va="center", fontsize=8)
        axes.text(visual + len(text) / 2, -0.75, "question", ha="center", va="center", fontsize=8)
    return figure


def recorded(name: str) -> list[dict[str, Any]]:
    """The rows of a summary in `results`."""
    path = ROOT / "results" / name / "summary.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def frontier(name: str, layers: Sequence[int], budgets: Sequence[float], theme: Theme) -> Figure:
    """Mean accuracy against the share of the visual tokens that is kept, method by method.

    Args:
        name: of the summary.
        layers: the pruning layers of the methods inside the decoder.
        budgets: shares of the visual tokens.
        theme: the colours.
    """
    looks = {
        "atp": (theme.blue, "o", "-"),
        "uniform": (theme.plain, "s", "-"),
        "random": (theme.plain, "x", "--"),
        "sparsevlm": (theme.green, "^", "-"),
        "fastv": (theme.orange, "v", "-"),
        "downsample": (theme.yellow, "D", "--"),
        "prumerge+": (theme.purple, "P", "--"),
    }
    rows = recorded(name)
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    (plain,) = (100 * row["mean_accuracy"][0] for row in rows if row["method"] == "unpruned")
    ends: dict[str, float] = {}
    for method, (colour, mark, line) in looks.items():
        found = {
            row["budget"]: np.multiply(100, row["mean_accuracy"])
            for row in rows
            if row["method"] == method and row["layers"] in ([], list(layers))
        }
        value, low, high = np.array([found[budget] for budget in budgets]).T
        axes.errorbar(
            [100 * budget for budget in budgets],
            value,
            yerr=[value - low, high - value],
            color=colour,
            marker=mark,
            linestyle=line,
            linewidth=2.6 if method == "atp" else 1.3,
            markersize=5,
        )
        ends[method] = value[-1]
    smallest, largest = 100 * budgets[0], 100 * budgets[-1]
    margin = 0.05 * (largest - smallest)
    for method, y in apart(ends, gap=4.4).items():
        weight = "bold" if method == "atp" else "normal"
        place = largest + margin / 2, y
        axes.text(*place, method, color=looks[method][0], va="center", fontweight=weight)
    axes.hlines(plain, smallest - margin, largest, colors=theme.ink, lw=0.8, linestyles="dotted")
    axes.text(smallest, plain + 1, f"unpruned: {plain:.1f}", va="bottom")
    axes.set_xlim(smallest - margin, largest + 4 * margin)
    axes.set_ylim(30, 105)
    axes.set_xticks([100 * budget for budget in budgets])
    axes.set_xlabel("visual tokens kept, % (mean over all decoder layers)")
    axes.set_ylabel("accuracy, % (mean over 11 tasks)")
    return figure


def apart(places: dict[str, float], gap: float) -> dict[str, float]:
    """Heights of labels, moved down where one would come closer than a gap to the one above it."""
    moved: dict[str, float] = {}
    above = float("inf")
    for name, y in sorted(places.items(), key=lambda item: -item[1]):
        moved[name] = above = min(y, above - gap)
    return moved


def depth(theme: Theme) -> Figure:
    """Accuracy where no decoder layer from some layer on sees the picture, by kind of question."""
    rows = recorded("depth")
    (whole,) = (row["accuracy"] for row in rows if row["method"] == "unpruned")
    (blind,) = (row["accuracy"] for row in rows if row["method"] == "no visual tokens")
    dropped = [row for row in rows if row["method"] == "no visual tokens from"]
    points = {0: blind, **{row["layers"][0]: row["accuracy"] for row in dropped}, 32: whole}
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    lines = (
        (theme.blue, "-"),
        (theme.green, "--"),
        (theme.purple, "-."),
        (theme.orange, (0, (1, 1))),
    )
    for (label, tasks), (colour, line) in zip(KINDS.items(), lines, strict=True):
        values = [100 * np.mean([accuracy[task] for task in tasks]) for accuracy in points.values()]
        axes.step(
            list(points),
            values,
            where="post",
            color=colour,
            linestyle=line,
            linewidth=2,
            label=label,
        )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), labelspacing=1.2)
    axes.set_xlim(0, 32)
    axes.set_ylim(0, 105)
    axes.set_xticks(sorted(points))
    axes.set_xlabel("decoder layer from which on no visual tokens are left")
    axes.set_ylabel("accuracy, %")
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write a figure as a small PNG."""
    figure.savefig(path)
    plt.close(figure)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main(argv: list[str] | None = None) -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: 30)")
    parser.add_argument(
        "--times",
        type=float,
        nargs=2,
        metavar=("PLAIN", "PRUNED"),
        help="milliseconds to the first token that were measured before; nothing is timed then",
    )
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    times = None if given.times is None else (given.times[0], given.times[1])
    drawings: dict[str, Callable[[Theme], Figure]] = {
        "first_screen": partial(first_screen, answered(times, given.rounds)),
        "stairs": partial(stairs, *held()),
        "one_layer": one_layer,
        "frontier": partial(frontier, "builtin", [1, 4, 10], [0.06, 0.15, 0.25]),
        "frontier_second": partial(frontier, "dynamic", [1, 4, 6], [0.15, 0.25, 0.5]),
        "depth": depth,
    }
    for theme in (LIGHT, DARK):
        with plt.rc_context(theme.style):
            for name, draw in drawings.items():
                write(draw(theme), given.out / f"{name}{theme.suffix}.png")


if __name__ == "__main__":
    main()
