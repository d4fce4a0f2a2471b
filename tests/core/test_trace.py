"""What a trace shows of itself: one line, a table in the terminal, the same table in a notebook."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import atp_patch
from tests.helpers import inputs as made
from tests.helpers.tiny import tiny_model

LAYERS = [2, 4, 6]


class Cells(HTMLParser):
    """The rows of all tables, as text; tags that a table has no use for are kept apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.strange: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag not in ("p", "table", "thead", "tbody"):
            self.strange.add(tag)

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1][-1] += data


def traced(**patch: Any) -> atp_patch.PruningTrace:
    """Of a batch of samples with and without images, padded."""
    model = tiny_model("llava-llama")
    atp_patch.patch_model(model, **patch)
    with torch.no_grad():
        model(**made.batch(model, made.MIXED))
    return atp_patch.last_trace(model)


def test_the_table_says_what_each_layer_kept_and_what_was_saved() -> None:
    trace = traced(layers=LAYERS, method="uniform", keep=0.5)
    seen = [b for b, total in enumerate(trace.layout.totals) if total]
    assert 1 < len(seen) < len(trace.layout.totals)
    title, head, *rows = str(trace).splitlines()
    assert title == repr(trace)
    assert head.split() == ["before", "layer", "visual", "tokens", "in", "kept", "thresholds"]
    entering = [trace.layout.totals[b] for b in seen]
    for layer, row in zip(LAYERS, rows, strict=False):
        kept = [trace.layers[layer].kept_counts[b] for b in seen]
        means = (f"{sum(counts) / len(seen):.1f}" for counts in (entering, kept))
        assert row.split() == [str(layer), *means, "-"]
        entering = kept
    assert [row.split()[-2:] for row in rows[len(LAYERS) :]] == [
        ["plain", "pruned"],
        [f"{trace.visual_tokens:.2f}", f"{trace.average_tokens:.2f}"],
        [f"{trace.flops_plain / 1e9:.2f}", f"{trace.flops / 1e9:.2f}"],
        [f"{trace.kv_bytes_plain / 1e6:.2f}", f"{trace.kv_bytes / 1e6:.2f}"],
    ]


def test_thresholds_are_shown_as_means_over_the_samples_with_images() -> None:
    trace = traced(layers=LAYERS, method="atp", keep=0.5)
    seen = [b for b, total in enumerate(trace.layout.totals) if total]
    for layer, row in zip(LAYERS, str(trace).splitlines()[2:], strict=False):
        theta = trace.layers[layer].thresholds
        assert theta
        for name, values in theta.items():
            assert f"{name} {float(values[seen].mean()):.3f}" in row


def test_a_layer_shows_its_samples() -> None:
    layer = traced(layers=LAYERS, method="uniform", keep=0.5).layers[4]
    totals = layer.layout.totals
    title, _, *rows = str(layer).splitlines()
    assert title == repr(layer)
    assert f"kept {sum(layer.kept_counts)} of {sum(totals)} visual tokens" in title
    assert [row.split() for row in rows] == [
        [str(b), str(total), str(kept), "-"]
        for b, (total, kept) in enumerate(zip(totals, layer.kept_counts, strict=True))
    ]


@pytest.mark.parametrize(
    "patch",
    [
        {"layers": LAYERS, "method": "atp", "keep": 0.5},
        {"method": "downsample"},
        {"layers": [4], "method": ["prumerge+", "fastv"], "keep": 0.5},
        {"method": "voco"},
    ],
    ids=str,
)
def test_one_line_and_the_same_cells_in_a_notebook(patch: dict[str, Any]) -> None:
    trace = traced(**patch)
    for one in (trace, *trace.layers.values()):
        assert repr(one).startswith(type(one).__name__)
        assert "\n" not in repr(one)
        assert len(repr(one)) < 160
        assert repr([one]) == f"[{one!r}]"
        shown = str(one).splitlines()[1:]
        cells = Cells(one._repr_html_()).rows
        assert [" ".join(row).split() for row in cells] == [line.split() for line in shown]


def test_names_are_escaped_in_html() -> None:
    """A name is that of a method of anybody's, and a notebook would run what it holds."""
    layer = traced(layers=LAYERS, method="atp", keep=0.5).layers[4]
    assert layer.decision is not None
    thresholds = {"<script>a & b": layer.thresholds["redundant"]}
    named = replace(layer, decision=replace(layer.decision, thresholds=thresholds))
    html = named._repr_html_()
    assert "<script>" not in html
    assert Cells(html).strange == set()
    assert Cells(html).rows[1][-1].startswith("<script>a & b ")
