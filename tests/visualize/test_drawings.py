"""Drawings: the right patches are faded, tinted and coloured, and the words are those asked for."""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

import atp_patch
from atp_patch import visualize
from atp_patch.visualize import shades
from atp_patch.visualize.palette import marked, stroked
from tests.helpers.inputs import MIXED, RAGGED, VIDEO, Prompt, batch
from tests.helpers.tiny import tiny_model

LAYERS = [2, 5]
BLUE = (10, 60, 200)


def traced(
    kind: str, prompts: tuple[Prompt, ...], method: str = "random", keep: float = 0.5
) -> atp_patch.PruningTrace:
    """The trace of a forward pass."""
    model = atp_patch.patch_model(tiny_model(kind), layers=LAYERS, method=method, keep=keep)
    with torch.inference_mode():
        model(**batch(model, prompts))
    return atp_patch.last_trace(model)


def words(drawing: visualize.Drawing) -> list[str]:
    """The texts of a drawing, in order."""
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawing.svg())]


def cells(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mean colour of each token, (height, width, 3); each must be of one colour."""
    assert pixels.shape[0] % height == pixels.shape[1] % width == 0
    split = pixels.reshape(height, pixels.shape[0] // height, width, -1, 3).transpose(0, 2, 1, 3, 4)
    assert (split == split[:, :, :1, :1]).all()
    return split[:, :, 0, 0]


@pytest.mark.parametrize(
    ("kind", "prompts"), [("llava-llama", RAGGED), ("qwen2_vl", RAGGED), ("qwen2_5_vl", VIDEO)]
)
def test_survivors_lie_where_the_trace_says(kind: str, prompts: tuple[Prompt, ...]) -> None:
    trace = traced(kind, prompts)
    for sample, grids in enumerate(trace.grids):
        for layer in LAYERS:
            kept = [shades.survivors(trace, grid, layer, sample) for grid in grids]
            total = sum(int(mask.sum()) for mask in kept)
            assert total == int(trace.tokens_per_layer[sample, layer])
            for grid, mask in zip(grids, kept, strict=True):
                assert mask.shape == (grid.frames, grid.height, grid.width)
                last = grid.start + grid.length - 1
                assert mask[-1, -1, -1] == trace.layers[layer].kept[sample, last]


@pytest.mark.parametrize("sample", [0, 1])
def test_pruned_patches_are_faded_and_the_others_are_not(sample: int) -> None:
    trace = traced("qwen2_vl", RAGGED)
    (grid,) = trace.grids[sample]
    (picture,) = visualize.seen(Image.new("RGB", (64, 48), BLUE), trace, sample=sample)
    for layer in LAYERS:
        pixels = shades.kept_alone(picture, trace, sample, layer)
        bright = (cells(pixels, grid.height, grid.width) == BLUE).all(-1)
        assert (bright == shades.survivors(trace, grid, layer, sample)[0]).all()


def test_each_tile_is_faded_in_its_place() -> None:
    """Two grids lie beside each other in one picture, the second one on the left."""
    trace = traced("llava-llama", MIXED)
    parts = (visualize.Part(0, box=(0.5, 0, 1, 1)), visualize.Part(1, box=(0, 0, 0.5, 1)))
    picture = visualize.Picture(Image.new("RGB", (80, 40), BLUE), parts, "tiles")
    pixels = shades.kept_alone(picture, trace, 1, 5)
    bright = (cells(pixels, 6, 12) == BLUE).all(-1)
    right, left = (shades.survivors(trace, grid, 5, 1)[0] for grid in trace.grids[1])
    assert (bright == np.concatenate([left, right], 1)).all()
    assert shades.count(picture, trace, 1, 5) == bright.sum() == trace.tokens_per_layer[1, 5]


def test_two_scores_have_two_colours() -> None:
    trace = traced("llava-llama", RAGGED, "atp")
    (grid,) = trace.grids[0]
    layer_trace = trace.layers[2]
    (picture,) = visualize.seen(Image.new("RGB", (48, 48), BLUE), trace)
    found = cells(shades.kept_by(picture, trace, 0, 2), 6, 6)
    place = grid.coordinates()[0]
    by = {
        name: (layer_trace.scores[name][0, place] >= layer_trace.thresholds[name][0])
        .reshape(6, 6)
        .numpy()
        for name in ("redundant", "spatial")
    }
    first, second = (
        (1 - shades.TINT) * np.asarray(BLUE) + shades.TINT * np.asarray(colour)
        for colour in (shades.FIRST, shades.SECOND)
    )
    assert ((np.abs(found - first) <= 1).all(-1) == (by["redundant"] & ~by["spatial"])).all()
    assert ((np.abs(found - second) <= 1).all(-1) == (by["spatial"] & ~by["redundant"])).all()
    assert ((found == BLUE).all(-1) == (by["redundant"] & by["spatial"])).all()
    shown = visualize.with_pictures(trace, picture.image)
    legend = "kept by 'redundant' alone", "by 'spatial' alone"
    assert set(legend) <= set(words(visualize.overlay(shown, by_score=True)))


def test_heat_runs_from_the_lowest_to_the_highest_score() -> None:
    trace = traced("llava-llama", RAGGED, "fastv")
    (grid,) = trace.grids[0]
    (picture,) = visualize.seen(Image.new("RGB", (48, 48), (99, 99, 99)), trace)
    colours = np.stack([np.arange(256)] * 3, -1).astype(np.float32)  # grey, so that heat is bright
    (scores,) = trace.layers[5].scores.values()
    heat = cells(shades.heated(picture, trace, 0, scores[0], colours), 6, 6)[..., 0]
    score = scores[0, grid.coordinates()[0]].reshape(6, 6).numpy()
    seen = np.isfinite(score)
    assert (seen == shades.survivors(trace, grid, 2)[0]).all()
    order = np.argsort(score[seen])
    assert (np.diff(heat[seen][order].astype(int)) >= 0).all()
    assert abs(int(heat[seen].max()) - int(heat[seen].min()) - 255 * shades.HEAT) <= 1
    assert len(set(heat[~seen])) == 1


def test_an_overlay_says_what_it_shows() -> None:
    trace = traced("qwen2_vl", RAGGED)
    shown = visualize.with_pictures(
        trace, Image.new("RGB", (64, 48), BLUE), question="How many $5 & 10$?", answer="<two>"
    )
    found = words(visualize.overlay(shown))
    counts = trace.tokens_per_layer[0].tolist()
    assert found[:3] == ["image (as given): 48 tokens", f"layer 2: {counts[2]} of 48", found[2]]
    assert found[2] == f"layer 5: {counts[5]} of 48"
    assert "Question: How many $5 & 10$?" in found
    assert "Answer: <two>" in found
    assert any("as it was given" in text for text in found)
    assert (
        visualize.overlay(shown, layers=[5]).image().width < visualize.overlay(shown).image().width
    )


def test_panels_fill_the_axis_that_is_given() -> None:
    shown = visualize.with_pictures(traced("qwen2_vl", RAGGED), Image.new("RGB", (64, 48), BLUE))
    figure = Figure(figsize=(8, 4))
    left, right = figure.subplots(1, 2)
    for draw, ax in ((visualize.overlay, left), (visualize.depth_plot, right)):
        assert draw(shown, ax=ax).figure is figure
    figure.draw_without_rendering()
    place = left.get_window_extent()
    assert len(left.child_axes) == 3
    for inner in left.child_axes:
        box = inner.get_window_extent()
        assert place.x0 <= box.x0 < box.x1 <= place.x1
        assert place.y0 <= box.y0 < box.y1 <= place.y1
    assert not right.child_axes


def test_methods_are_compared_on_one_picture() -> None:
    image = Image.new("RGB", (48, 48), BLUE)
    traces = {
        name: visualize.with_pictures(
            traced("llava-llama", RAGGED, name), image, question="What?", answer=f"answer {name}"
        )
        for name in ("uniform", "random", "fastv")
    }
    found = words(visualize.compare(traces, across=2))
    assert {f"{name}: 9 of 36" for name in traces} <= set(found)
    assert any(text.startswith("answer fastv") for text in found)
    assert {"Question: What?", "Visual tokens that are left in the last layer."} <= set(found)
    found = words(visualize.compare(traces, layer=3))
    assert {f"{name}: 18 of 36" for name in traces} <= set(found)
    assert {f"{name}: 36 of 36" for name in traces} <= set(
        words(visualize.compare(traces, layer=1))
    )


def test_a_strip_has_a_column_a_frame() -> None:
    trace = traced("qwen2_5_vl", VIDEO)
    frames = [Image.new("RGB", (40, 40), (0, shade, 0)) for shade in (40, 120, 200)]
    shown = visualize.with_pictures(trace, [frames])
    found = words(visualize.strip(shown))
    assert found[:3] == [f"video, frame {n} (as given): 16" for n in (1, 2, 3)]
    each = [int(shades.count(p, trace, 0, 2)) for p in visualize.seen([frames], trace)]
    assert sum(each) == trace.tokens_per_layer[0, 2]
    assert found[3:6] == [f"layer 2: {count} of 16" for count in each]
    found = words(visualize.strip(shown, frames=2, layers=[5]))
    assert found[:2] == [f"video, frame {n} (as given): 16" for n in (1, 2)]
    assert "2 of 3 pictures are drawn." in found


def test_depth_is_plotted_as_it_is() -> None:
    trace = traced("llava-llama", RAGGED)
    (ax,) = visualize.depth_plot({"one": trace, "two": trace}).figure.axes
    values = ax.patches[0].get_data().values
    assert values.tolist() == trace.tokens_per_layer.double().mean(0).tolist()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        *(f"{name}: {trace.average_tokens:.0f} on average" for name in ("one", "two")),
        "plain: 36",
    ]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".jpg"])
def test_a_drawing_is_saved_by_its_suffix(suffix: str, tmp_path: Path) -> None:
    drawing = visualize.depth_plot(traced("llava-llama", RAGGED))
    drawing.save(tmp_path / f"d{suffix}")
    data = (tmp_path / f"d{suffix}").read_bytes()
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".jpg": b"\xff\xd8"}[suffix]
    assert data.startswith(start)
    drawing.save(tmp_path / f"again{suffix}")
    assert (tmp_path / f"again{suffix}").read_bytes() == data


def test_on_a_dark_ground_letters_are_light() -> None:
    """A drawing takes the colours of matplotlib's style, its ground included."""
    trace = visualize.with_pictures(traced("llava-llama", RAGGED), Image.new("RGB", (48, 48), BLUE))
    with rc_context({"figure.facecolor": "black", "text.color": "white"}):
        drawing = visualize.overlay(trace)
    pixels = np.asarray(drawing.image().convert("L"))
    title = pixels[14:48]  # between the upper edge and the panels
    assert pixels[0, 0] == 0
    assert title.max() > 230


def test_lines_are_told_apart_without_their_colours() -> None:
    for look, number in ((marked, 84), (stroked, 21)):
        assert len({tuple(sorted(look(n).items())) for n in range(number)}) == number
        assert look(number) == look(0)


def test_a_trace_with_pictures_shows_them_in_a_notebook() -> None:
    trace = traced("llava-llama", RAGGED)
    assert trace._repr_png_() is None
    assert "<img" not in trace._repr_html_()
    shown = visualize.with_pictures(trace, Image.new("RGB", (48, 48), BLUE))
    png = shown._repr_png_()
    assert png is not None
    assert png == visualize.overlay(shown).png()
    assert trace._repr_html_() in shown._repr_html_()
    assert shown._repr_html_().count("<img") == 1


def test_what_cannot_be_drawn_is_refused() -> None:
    trace = traced("llava-llama", RAGGED)
    with pytest.raises(atp_patch.InputError, match="does not know its pictures"):
        visualize.overlay(trace)
    shown = visualize.with_pictures(trace, Image.new("RGB", (48, 48)))
    for draw, part in (
        (lambda: visualize.overlay(shown, layers=[3]), "pruning layers are 2, 5"),
        (lambda: visualize.overlay(shown, by_score=True), "two scores"),
        (lambda: visualize.heat_map(shown), "no scores"),
        (lambda: visualize.strip(shown, frames=0), "at least 1"),
        (lambda: visualize.compare({}), "no methods"),
        (lambda: visualize.depth_plot({}), "nothing to plot"),
    ):
        with pytest.raises(atp_patch.InputError, match=part):
            draw()
    fast = visualize.with_pictures(traced("llava-llama", RAGGED, "fastv"), Image.new("RGB", (9, 9)))
    with pytest.raises(atp_patch.InputError, match="no score 'beauty'"):
        visualize.heat_map(fast, "beauty")


def test_without_matplotlib_one_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced("llava-llama", RAGGED)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(atp_patch.ConfigError, match=r"pip install 'atp-patch\[visualize\]'"):
        visualize.with_pictures(trace, Image.new("RGB", (9, 9)))
    with pytest.raises(atp_patch.ConfigError, match="atp-patch"):
        visualize.depth_plot(trace)
