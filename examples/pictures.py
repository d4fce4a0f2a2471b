"""The pictures of the README and of "How pruning works", drawn from the built-in model.

    python examples/pictures.py --out docs/pictures

The times are those of this machine: the CPU time of one thread.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
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
# Colours that people with any kind of colour vision tell apart (Okabe and Ito).
PLAIN, PRUNED, DOOR = "#6b6b6b", "#0072B2", "#D55E00"
INK, PAPER, PANEL = "#1a1a1a", "#ffffff", "#eef2f5"
FADED = 0.12  # share of a dropped patch that is still seen
STYLE = {
    "figure.dpi": 200,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


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
    faded = 235 + FADED * (pixels - 235)
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


def strip(axes: Axes, answers: tuple[str, str], columns: dict[str, tuple[float, float]]) -> None:
    """A table of two rows, plain and pruned: the answer, and a bar with its number in each column.

    Args:
        axes: from 0 to 1 in both directions.
        answers: of the plain and of the pruned model.
        columns: title -> the plain and the pruned model's number.
    """
    axes.add_patch(
        FancyBboxPatch((0.01, 0.04), 0.98, 0.92, boxstyle="round,pad=0.01", fc=PANEL, ec="none")
    )
    axes.text(0.02, 0.82, QUESTION, fontweight="bold", va="center")
    rows = ((0.52, "plain", PLAIN), (0.22, "pruned", PRUNED))
    for number, (y, name, colour) in enumerate(rows):
        axes.text(0.02, y, name, va="center", color=colour, fontweight="bold")
        axes.text(0.12, y, answers[number], va="center", fontweight="bold", fontsize=11)
        for place, values in enumerate(columns.values()):
            x, width = 0.42 + 0.31 * place, 0.2 * values[number] / max(values)
            axes.add_patch(Rectangle((x, y - 0.1), width, 0.2, color=colour))
            axes.text(x + width + 0.008, y, f"{values[number]:.0f}", va="center", fontweight="bold")
    for place, title in enumerate(columns):
        axes.text(0.42 + 0.31 * place, 0.82, title, va="center")


def first_screen(rounds: int) -> Figure:
    """A scene under three pruning layers, with the question, both answers, and what they cost."""
    model, processor = load_builtin()
    image = Image.open(SCENE)
    inputs = processor(images=image, text=prompt(QUESTION), return_tensors="pt")
    plain = ask(model, processor, inputs)
    atp_patch.patch_model(model, layers=LAYERS, target_tokens=TOKENS)
    times = cpu_ms(model, inputs, rounds)
    answers = plain, ask(model, processor, inputs)
    trace = atp_patch.last_trace(model)
    counts = trace.tokens_per_layer[0].tolist()

    figure = plt.figure(figsize=(8, 3.5))
    shown = [("what the model is shown", np.asarray(image.convert("RGB")), trace.visual_tokens)]
    shown += [(f"from layer {i} on", left(image, trace, i), counts[i]) for i in LAYERS]
    for number, (title, pixels, count) in enumerate(shown):
        axes = figure.add_axes((0.012 + 0.2475 * number, 0.325, 0.235, 0.54))
        axes.imshow(pixels)
        for height, line in ((1.14, title), (1.04, f"{count:.0f} visual tokens")):
            axes.text(0.5, height, line, ha="center", transform=axes.transAxes)
        axes.axis("off")
    axes = figure.add_axes((0.012, 0.0, 0.976, 0.29), xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    columns = {
        f"visual tokens, mean of {len(counts)} layers": (trace.visual_tokens, trace.average_tokens),
        "ms to the first token (one core)": times,
    }
    strip(axes, answers, columns)
    return figure


def stairs() -> Figure:
    """How many visual tokens each decoder layer holds under three ways to spend one budget."""
    model, processor = load_builtin()
    inputs = processor(images=Image.open(SCENE), text=prompt(QUESTION), return_tensors="pt")

    def held(**settings: Any) -> list[int]:
        atp_patch.patch_model(model, target_tokens=TOKENS, **settings)
        with torch.no_grad():
            model(**inputs)
        return [int(count) for count in atp_patch.last_trace(model).tokens_per_layer[0]]

    inside, door = held(layers=LAYERS), held(method="divprune")
    depth = len(inside)
    figure, axes = plt.subplots(figsize=(8, 3.1), layout="constrained")
    total = inside[0]
    for counts, colour, line in (
        ([total] * depth, PLAIN, ":"),
        (inside, PRUNED, "-"),
        (door, DOOR, "--"),
    ):
        edges = np.arange(depth + 1)
        axes.stairs(counts, edges, baseline=None, color=colour, linestyle=line, linewidth=2.2)
    axes.text(
        depth, total - 14, f"plain model: {total} in every layer", color=PLAIN, ha="right", va="top"
    )
    axes.text(
        LAYERS[0] + 0.4,
        inside[LAYERS[0]] + 90,
        f"inside, before layers 4, 14 and 24:\n{np.mean(inside):.0f} on average",
        color=PRUNED,
    )
    axes.text(
        depth,
        door[0] + 14,
        f"before the decoder: {np.mean(door):.0f} in every layer",
        color=DOOR,
        ha="right",
    )
    axes.set_xlim(0, depth)
    axes.set_ylim(0, total * 1.08)
    axes.set_xticks([*range(0, depth, 4), depth])
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("visual tokens")
    return figure


def one_layer() -> Figure:
    """Scores, the choice among them, and how the kept tokens move together."""
    scores = [0.2, 0.9, 0.35, 0.15, 0.8, 0.1, 0.7, 0.25]
    kept = [number for number, score in enumerate(scores) if score > 0.5]
    text = ["what", "is", "it", "?"]
    titles = ("1. score the picture's tokens", "2. choose the best", "3. gather: positions stay")
    widths = [12.6, 12.6, 8.6]
    figure, panels = plt.subplots(
        1, 3, figsize=(8, 1.15), width_ratios=widths, layout="constrained"
    )
    for axes, title, width in zip(panels, titles, widths, strict=True):
        axes.set_title(title, loc="left")
        axes.set_xlim(-0.2, width - 0.2)
        axes.set_ylim(-1.2, 2.05)
        axes.set_aspect("equal")
        axes.axis("off")

    def token(axes: Axes, x: float, number: int, *, stays: bool = True) -> None:
        visual = number < len(scores)
        colour = (PRUNED if stays else "#d9d9d9") if visual else PAPER
        axes.add_patch(Rectangle((x, 0), 0.9, 0.9, facecolor=colour, edgecolor=INK, linewidth=0.6))
        ink = PAPER if visual and stays else INK
        axes.text(x + 0.45, 0.43, str(number), ha="center", va="center", fontsize=7, color=ink)

    everything = len(scores) + len(text)
    for number in range(everything):
        token(panels[0], number, number)
        token(panels[1], number, number, stays=number in kept or number >= len(scores))
    for number, score in enumerate(scores):
        panels[0].add_patch(Rectangle((number + 0.2, 1.05), 0.5, score, facecolor=DOOR))
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
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with plt.rc_context(STYLE):
        write(first_screen(given.rounds), given.out / "first_screen.png")
        write(stairs(), given.out / "stairs.png")
        write(one_layer(), given.out / "one_layer.png")


if __name__ == "__main__":
    main()
