"""Every method keeps what it says, the same each time, in any batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import atp_patch
from atp_patch.methods import METHODS, make_method
from atp_patch.methods.base import keep_best
from tests.helpers import inputs as made
from tests.helpers.run import INSIDE, forward
from tests.helpers.tiny import tiny_model

LAYERS = [2, 4, 6]
METHOD_NAMES = ["atp", "fixed", "fastv", "sparsevlm", "pyramiddrop", "dart"]
METHOD_NAMES += ["prumerge", "prumerge+"]
METHOD_NAMES += ["fastervlm", "visionzip", "divprune", "scope", "cdpruner"]
METHOD_NAMES += ["vispruner", "hiprune", "prunesid", "vscan"]
METHOD_NAMES += ["random", "uniform", "downsample", "voco"]


def run(kind: str, prompts: Any, **patch: Any) -> atp_patch.PruningTrace:
    model = atp_patch.patch_model(tiny_model(kind), LAYERS, **patch)
    with torch.no_grad():
        model(**made.batch(model, prompts))
    return atp_patch.last_trace(model)


def test_the_table_names_every_method() -> None:
    assert atp_patch.available_methods() == METHOD_NAMES == [method.name for method in METHODS]


@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
@pytest.mark.parametrize("method", INSIDE)
class TestEveryMethod:
    def test_keeps_exactly_its_share(self, kind: str, method: str) -> None:
        trace = run(kind, made.MIXED, method=method, keep=(0.7, 0.5, 0.4))
        for b, total in enumerate(trace.layout.totals):
            # A method of two stages has let fewer enter.
            left = trace.layers[0].kept_counts[b] if 0 in trace.layers else total
            for layer, share in zip(LAYERS, (0.7, 0.5, 0.4), strict=True):
                left = round(share * left)
                left = max(left, min(1, total))
                assert trace.layers[layer].kept_counts[b] == left
                kept = trace.layers[layer].kept[b] & trace.visual[b]
                assert int(kept.sum()) == left

    def test_holds_its_target_on_any_image(self, kind: str, method: str) -> None:
        trace = run(kind, made.RAGGED, method=method, target_tokens=17)
        averages = trace.tokens_per_layer.double().mean(1)
        assert bool(((averages - 17).abs() <= 1).all())

    def test_prunes_for_good(self, kind: str, method: str) -> None:
        trace = run(kind, made.MIXED, method=method, keep=0.5)
        for earlier, later in pairwise(LAYERS):
            assert not bool((trace.layers[later].kept & ~trace.layers[earlier].kept).any())

    def test_is_deterministic(self, kind: str, method: str) -> None:
        first, second = (run(kind, made.MIXED, method=method, keep=0.5) for _ in range(2))
        assert torch.equal(first.layers[6].kept, second.layers[6].kept)

    def test_leaves_every_image_its_minimum(self, kind: str, method: str) -> None:
        trace = run(kind, made.TWO_IMAGES, method=method, keep=0.1, min_tokens_per_image=3)
        for layer in LAYERS:
            for grid in trace.grids[0]:
                kept = trace.layers[layer].kept[0, grid.start : grid.start + grid.length]
                assert int(kept.sum()) >= 3


def test_random_differs_by_seed_and_question() -> None:
    kept = {}
    for seed in (0, 1):
        trace = run("llava-llama", made.SAME_SIZE, method="random", keep=0.5, seed=seed)
        for b in range(2):
            kept[seed, b] = trace.layers[2].kept[b][trace.visual[b]]
    pairs = [(kept[0, 0], kept[1, 0]), (kept[0, 0], kept[0, 1])]
    for one, other in pairs:
        assert 0.2 < float((one & other).sum() / one.sum()) < 0.8


def test_uniform_covers_every_quarter_of_the_grid() -> None:
    trace = run("llava-llama", made.SINGLE, method="uniform", keep=0.25)
    grid = trace.grids[0][0]
    kept = trace.layers[2].kept[0, grid.start : grid.start + grid.length].reshape(6, 6)
    quarters = kept.reshape(2, 3, 2, 3).sum((1, 3))
    assert int(quarters.min()) >= 1
    assert int(kept.sum()) == 9


def test_atp_takes_its_spatial_share_from_an_even_grid() -> None:
    trace = run("llava-llama", made.SINGLE, keep=0.5, spatial_share=0.5)
    layer = trace.layers[2]
    spatial = layer.scores["spatial"][0][trace.visual[0]]
    reached = spatial >= layer.thresholds["spatial"]
    assert int(reached.sum()) == 9
    redundant = layer.scores["redundant"][0][trace.visual[0]]
    by_threshold = reached | (redundant >= layer.thresholds["redundant"])
    assert torch.equal(by_threshold, layer.kept[0][trace.visual[0]])


def test_learned_thresholds_decide_by_the_papers_equations() -> None:
    torch.manual_seed(0)
    model = tiny_model("llava-llama")
    atp_patch.patch_model(
        model,
        LAYERS,
        thresholds="learned",
        threshold_inputs="scores",
        standardise=False,
        reference_grid=6,
        score="mean",
        cross_over="all",
    )
    heads: Any = model.atp_patch_heads
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    with torch.no_grad():
        model(**made.batch(model, made.SINGLE))
        trace = atp_patch.last_trace(model)
        visual = trace.visual[0]
        scores = trace.layers[2].scores
        # Eq. 6-8 with one 6 x 6 image: the grid is the reference grid, so the scores go in as they
        # are.
        inputs = torch.cat([scores["self"][0][visual], scores["cross"][0][visual]])
        z = heads.z["2"].weight @ inputs + heads.z["2"].bias
        for name, head in (("redundant", heads.theta_redundant), ("spatial", heads.theta_spatial)):
            theta = torch.sigmoid(head["2"].weight[0] @ z + head["2"].bias[0])
            torch.testing.assert_close(trace.layers[2].thresholds[name][0], theta)
    expected = scores["redundant"][0] >= trace.layers[2].thresholds["redundant"]
    expected |= scores["spatial"][0] >= trace.layers[2].thresholds["spatial"]
    assert torch.equal(trace.layers[2].kept[0][visual], expected[visual])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("nonsense", {}, "atp, fixed, fastv"),
        ("fastv", {"keeps": 1}, "no option keeps"),
        ("atp", {"score": "both"}, "mean, cross, self"),
        ("atp", {"score_norm": "none"}, "only ranks can"),
        ("atp", {"spatial_share": 2}, "between 0 and 1"),
        ("atp", {"spatial_order": "spiral"}, "progressive, strided"),
    ],
)
def test_wrong_methods_and_options_name_the_known(
    method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(atp_patch.ConfigError, match=message):
        make_method(method, options)


@dataclass(frozen=True)
class Last(atp_patch.LayerMethod):
    """The user's own."""

    name = "last"
    summary = "the last tokens"
    first: int = 0

    def decide(self, view: atp_patch.View, module: object) -> atp_patch.Decision:
        return atp_patch.Decision(keep_best(view, view.token.float()))


def test_a_method_of_ones_own_comes_back_from_its_folder(tmp_path: Path) -> None:
    model = atp_patch.patch_model(tiny_model("llava-llama"), [2], Last(first=3), keep=0.5)
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(tiny_model("llava-llama"), weights=tmp_path)
    assert make_method("last", {"first": 3}) == Last(first=3)
    logits = [forward(one, made.batch(one, made.SINGLE)).logits for one in (model, again)]
    assert torch.equal(*logits)


def test_of_ones_own_the_last_definition_counts() -> None:
    for first in (5, 7):  # as a notebook's cell that is run again
        fields = {"name": "again", "first": first, "__annotations__": {"first": "int"}}
        kind = dataclass(frozen=True)(type("Again", (Last,), fields))
    assert type(make_method("again", {})) is kind
    assert make_method("again", {}).options() == {"first": 7}


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    given = {"min_tokens": np.int64(3), "seed": np.int64(2), "keep": np.float32(0.5)}
    model = atp_patch.patch_model(tiny_model("llava-llama"), [2], "random", **given)
    atp_patch.save_pretrained(model, tmp_path)
    written = json.loads((tmp_path / "atp_config.json").read_text(encoding="utf-8"))
    found = written["min_tokens"], written["options"]["seed"], written["keep"]
    assert found == (3, 2, [0.5])


def test_a_method_of_ones_own_needs_no_registration() -> None:
    trace = run("llava-llama", made.SINGLE, method=Last(), keep=0.5)
    kept = trace.layers[2].kept[0][trace.visual[0]]
    assert kept.tolist() == [False] * 18 + [True] * 18
