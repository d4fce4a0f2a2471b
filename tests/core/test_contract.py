"""The contract of methods: four kinds, classes of other packages, decisions that are checked."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.contract import Recycled
from atp_patch.contract.before_decoder import check_grid
from atp_patch.methods import METHODS, MethodSet, keep_best, make_method, make_methods
from tests.helpers import inputs as made
from tests.helpers.run import forward
from tests.helpers.tiny import tiny_model

KINDS = {
    "picture": atp_patch.PictureMethod,
    "tower": atp_patch.TowerMethod,
    "door": atp_patch.DoorMethod,
    "layer": atp_patch.LayerMethod,
}
Change = Callable[[atp_patch.View, atp_patch.Decision], dict[str, Any]]


@pytest.mark.parametrize("kind", [atp_patch.Method, *KINDS.values(), atp_patch.Decision])
def test_the_example_in_the_docstring_runs(kind: type) -> None:
    (found,) = (
        test
        for test in doctest.DocTestFinder(recurse=False).find(
            kind,
            kind.__name__,
            globs={name: getattr(atp_patch, name) for name in atp_patch.__all__},
        )
    )
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0


def test_every_method_stands_somewhere() -> None:
    for cls in METHODS:
        assert cls.where in (*KINDS, "voco")
        if cls.where in KINDS:
            assert issubclass(cls, KINDS[cls.where])


def test_a_class_of_methods_derived_as_before_is_a_layer_method() -> None:
    with pytest.warns(DeprecationWarning, match=r"Former .* atp_patch\.LayerMethod") as caught:

        @dataclass(frozen=True)
        class Former(atp_patch.Method):
            name = "former"
            summary = "as it was written for the first release"
            last: bool = True

            def decide(self, view: Any, module: Any) -> atp_patch.Decision:
                order = view.token.float() if self.last else -view.token.float()
                return atp_patch.Decision(keep_best(view, order))

    assert caught[0].filename == __file__
    assert issubclass(Former, atp_patch.LayerMethod)
    assert make_methods("former", {"last": False}) == MethodSet(layer=Former(last=False))
    model = atp_patch.patch_model(tiny_model("llava-llama"), [2], Former(), keep=0.5)
    forward(model, made.batch(model, made.SINGLE))
    trace = atp_patch.last_trace(model)
    assert trace.layers[2].kept[0][trace.visual[0]].tolist() == [False] * 18 + [True] * 18


def test_a_decision_that_says_exact_is_told_that_it_need_not() -> None:
    with pytest.warns(DeprecationWarning, match="Leave it out") as caught:
        atp_patch.Decision(torch.ones(1, 3, dtype=torch.bool), exact=True)
    assert caught[0].filename == __file__


def test_what_is_no_method_is_named() -> None:
    class Nowhere(atp_patch.Method):
        name = "nowhere"

    class Unnamed(atp_patch.LayerMethod):
        def decide(self, view: Any, module: Any) -> Any:
            raise NotImplementedError

    for given, message in (
        (Nowhere(), "nowhere has no place"),
        (Unnamed(), "Unnamed has no name"),
        (Last, r"method=Last\(\)"),
        ([Last], r"method=Last\(\)"),
        (3, "3 is no method"),
        ([], "give one method"),
    ):
        with pytest.raises(atp_patch.ConfigError, match=message):
            atp_patch.patch_model(tiny_model("llava-llama"), [2], given)  # type: ignore[arg-type]


def test_an_option_that_must_be_given_is_named() -> None:
    @dataclass(frozen=True)
    class Wanting(atp_patch.PictureMethod):
        name = "wanting"
        side: int

        def grid(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
            return self.side, self.side

    with pytest.raises(atp_patch.ConfigError, match="'wanting' needs its options side"):
        make_method("wanting", {})
    assert make_method("wanting", {"side": 3}) == Wanting(side=3)


# -- methods of other packages --------------------------------------------------------------------


def distribution(folder: Path, package: str, points: dict[str, str], source: str) -> None:
    """A package as pip would leave it in a folder of the path."""
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {module}:{value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[atp_patch.methods]", *lines]) + "\n")


OUTSIDE = """
from dataclasses import dataclass
import atp_patch
from atp_patch.methods import keep_best

@dataclass(frozen=True)
class First(atp_patch.LayerMethod):
    name = "outside-first"
    summary = "the first tokens"
    flip: bool = False

    def decide(self, view, module):
        order = view.token.float()
        return atp_patch.Decision(keep_best(view, order if self.flip else -order))

class Misnamed(First):
    name = "another"

word = "no class"
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


def test_a_method_of_another_package_is_found_by_its_name(site: Path) -> None:
    distribution(site, "outside-one", {"outside-first": "First"}, OUTSIDE)
    assert atp_patch.available_methods()[-1] == "outside-first"
    assert "outside_one" not in sys.modules, "it was loaded before it was asked for"
    model = tiny_model("llava-llama")
    atp_patch.patch_model(model, [2], "outside-first", keep=0.5, flip=True)
    forward(model, made.batch(model, made.SINGLE))
    trace = atp_patch.last_trace(model)
    assert trace.layers[2].kept[0][trace.visual[0]].tolist() == [False] * 18 + [True] * 18
    atp_patch.save_pretrained(model, site / "adapter")
    again = atp_patch.patch_model(tiny_model("llava-llama"), weights=site / "adapter")
    forward(again, made.batch(again, made.SINGLE))
    assert atp_patch.last_trace(again).layers[2].kept.equal(trace.layers[2].kept)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("absent", "Absent", "of the package outside-two .* cannot be loaded.*Absent"),
        ("word", "word", "'word' of the package outside-two .* is not a class of methods"),
        ("misnamed", "Misnamed", "calls itself 'another'"),
    ],
)
def test_a_broken_entry_point_is_one_error_when_it_is_asked_for(
    site: Path, name: str, value: str, message: str
) -> None:
    distribution(site, "outside-two", {name: value, "outside-first": "First"}, OUTSIDE)
    assert {name, "outside-first"} < set(atp_patch.available_methods())
    assert make_method("outside-first", {}).name == "outside-first"
    assert make_method("fastv", {}).name == "fastv"
    with pytest.raises(atp_patch.ConfigError, match=message):
        make_method(name, {})


def test_a_package_that_cannot_be_imported_is_one_error(site: Path) -> None:
    distribution(site, "outside-three", {"third": "Third"}, "import no_such_package\n")
    assert "third" in atp_patch.available_methods()
    with pytest.raises(atp_patch.ConfigError, match=r"outside-three .*no_such_package.*uninstall"):
        make_method("third", {})


def test_a_name_that_is_taken_is_refused(site: Path) -> None:
    distribution(site, "outside-four", {"fastv": "First", "shared": "First"}, OUTSIDE)
    distribution(site, "outside-five", {"shared": "First"}, OUTSIDE)
    assert atp_patch.available_methods().count("fastv") == 1
    assert atp_patch.available_methods().count("shared") == 1
    with pytest.raises(atp_patch.ConfigError, match="claimed by atp_patch and by outside-four"):
        make_method("fastv", {})
    with pytest.raises(atp_patch.ConfigError, match=r"outside-(four|five) and by outside-"):
        make_method("shared", {})


# -- decisions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Last(atp_patch.LayerMethod):
    """A right decision, and what a test makes of it."""

    name = "last-but"
    summary = "the last tokens, changed by a test"
    change: Any = None

    def decide(self, view: atp_patch.View, module: object) -> atp_patch.Decision:
        keep = keep_best(view, view.token.float())
        scores, thresholds = {"place": view.token.float()}, {"place": torch.zeros(len(keep))}
        right = atp_patch.Decision(keep, scores=scores, thresholds=thresholds)
        if self.change is None:
            return right
        return atp_patch.Decision(**{**vars(right), **self.change(view, right)})


def patched(method: Any, kind: str = "qwen2_vl", **options: Any) -> Any:
    return atp_patch.patch_model(tiny_model(kind), [2, 4], method, **{"keep": 0.5, **options})


def taken_in(view: atp_patch.View, column: Tensor, weight: Tensor | None = None) -> Recycled:
    column = column.expand(len(view.token), 1)
    shape = (*column.shape, view.token.shape[1])
    weight = torch.ones(shape) if weight is None else weight
    return Recycled(column, torch.ones_like(column, dtype=torch.bool), weight)


def taken_in_twice(decision: atp_patch.Decision) -> Recycled:
    """Two entries for one kept token, in samples that have one."""
    column = decision.keep.long().argmax(1, keepdim=True).expand(-1, 2)
    valid = decision.keep.any(1, keepdim=True).expand(-1, 2)
    return Recycled(column, valid, torch.ones(len(column), 2, decision.keep.shape[1]))


def holding(value: float, of: Tensor) -> Tensor:
    """The same with one number in a place that counts."""
    return of.float().index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(value))


WRONG: dict[str, tuple[Change, str]] = {
    "short": (lambda v, d: {"keep": d.keep[:, :-1]}, r"keep is \(4, 71\) torch.bool; .*\(4, 72\)"),
    "one sample": (lambda v, d: {"keep": d.keep[:1]}, r"keep is \(1, 72\)"),
    "floats": (lambda v, d: {"keep": d.keep.float()}, "keep is .*float32.* bool"),
    "a list": (lambda v, d: {"keep": d.keep.tolist()}, "keep is list"),
    "elsewhere": (lambda v, d: {"keep": d.keep.to("meta")}, "keep is on meta"),
    "none": (lambda v, d: {"keep": d.keep & False}, "a sample keeps fewer than min_tokens=1"),
    "scores": (lambda v, d: {"scores": {"s": v.token[:, 1:].float()}}, r"scores\['s'\] is \(4, 71"),
    "whole scores": (lambda v, d: {"scores": {"s": v.token}}, r"scores\['s'\] .*floating point"),
    "NaN": (
        lambda v, d: {"scores": {"s": holding(torch.nan, v.token)}},
        r"scores\['s'\] holds numbers that are not finite; look for NaN",
    ),
    "infinite": (
        lambda v, d: {"scores": {"s": holding(torch.inf, v.token)}},
        r"scores\['s'\] holds numbers that are not finite",
    ),
    "thresholds": (
        lambda v, d: {"thresholds": {"t": torch.zeros(4, 1)}},
        r"thresholds\['t'\] is \(4, 1\)",
    ),
    "NaN thresholds": (
        lambda v, d: {"thresholds": {"t": torch.full((4,), torch.nan)}},
        r"thresholds\['t'\] holds numbers that are not finite",
    ),
    "infinite thresholds": (
        lambda v, d: {"thresholds": {"t": torch.full((4,), -torch.inf)}},
        r"thresholds\['t'\] holds numbers that are not finite",
    ),
    "scores of None": (lambda v, d: {"scores": None}, "scores is NoneType; give a dict"),
    "thresholds in a list": (
        lambda v, d: {"thresholds": [torch.zeros(4)]},
        "thresholds is list; give a dict",
    ),
    "soft": (lambda v, d: {"soft": torch.ones(4, 2)}, r"soft is \(4, 2\)"),
    "NaN soft": (lambda v, d: {"soft": holding(torch.nan, d.keep)}, "soft holds numbers"),
    "counted": (lambda v, d: {"counted": d.keep}, "counted is .*bool"),
    "takes in and goes": (
        lambda v, d: {"recycled": taken_in(v, torch.tensor(0))},
        "recycled.column names tokens that are not kept",
    ),
    "takes in outside": (
        lambda v, d: {"recycled": taken_in(v, torch.tensor(500))},
        "recycled.column names tokens outside of the view's 72",
    ),
    "takes in twice": (
        lambda v, d: {"recycled": taken_in_twice(d)},
        "recycled.column names a token twice; give each",
    ),
    "takes in by a list": (
        lambda v, d: {"recycled": Recycled([[0]], d.keep, d.keep)},  # type: ignore[arg-type]
        r"recycled must be an atp_patch.Recycled whose column is \(B, C\)",
    ),
    "weights": (
        lambda v, d: {"recycled": taken_in(v, torch.tensor(0), torch.ones(4, 1, 2))},
        r"recycled.weight is \(4, 1, 2\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_decision_is_an_error_that_names_the_method(name: str) -> None:
    change, message = WRONG[name]
    model = patched(Last(change))
    inputs = made.batch(model, made.MIXED)
    with pytest.raises(atp_patch.ATPError, match=f"^last-but: {message}"):
        forward(model, inputs)
    # The model is as good as before.
    atp_patch.patch_model(model, [2, 4], Last(), keep=0.5)
    expected = forward(patched(Last()), inputs).logits
    assert torch.equal(forward(model, inputs).logits, expected)


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("attention_layers", None, r"attention_layers\(2\) is None; it must name .* or be \(\)"),
        ("attention_layers", 1, r"attention_layers\(2\) is 1; it must name"),
        ("build", {"weight": torch.zeros(2)}, r"build\(\) returned dict; return a torch.nn.Module"),
    ],
)
def test_what_a_method_asks_for_is_checked_before_the_model_is_patched(
    name: str, answer: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llava-llama")
    monkeypatch.setattr(Last, name, lambda self, given: answer)
    with pytest.raises(atp_patch.ATPError, match=f"last-but: {message}"):
        atp_patch.patch_model(model, [2, 4], Last(), keep=0.5)
    with pytest.raises(atp_patch.NotPatchedError):
        atp_patch.last_trace(model)


def test_what_is_in_padding_does_not_count() -> None:
    def spoil(view: atp_patch.View, right: atp_patch.Decision) -> dict[str, Any]:
        scores = {"s": view.token.float().masked_fill(~view.slot_valid, torch.nan)}
        return {"keep": right.keep | ~view.slot_valid, "scores": scores}

    model, other = patched(Last(spoil)), patched(Last())
    inputs = made.batch(model, made.MIXED)
    assert torch.equal(forward(model, inputs).logits, forward(other, inputs).logits)


def test_what_is_no_decision_is_named() -> None:
    class Bare(Last):
        def decide(self, view: Any, module: Any) -> Any:
            return super().decide(view, module).keep

    model = patched(Bare())
    with pytest.raises(atp_patch.ATPError, match=r"last-but: decide\(\) returned Tensor"):
        forward(model, made.batch(model, made.SINGLE))


@dataclass(frozen=True)
class Own(atp_patch.LayerMethod):
    """Keeps its own number of tokens, whatever was asked."""

    name = "own"
    summary = "so many of the first tokens"
    tokens: int = 2

    @property
    def needs_budget(self) -> bool:
        return False

    def decide(self, view: atp_patch.View, module: object) -> atp_patch.Decision:
        return atp_patch.Decision(view.slot_valid & (view.token < self.tokens))


def test_the_minimums_hold_for_a_method_of_ones_own() -> None:
    for options, message in (
        ({"min_tokens": 3}, "own: a sample keeps fewer than min_tokens=3"),
        ({"min_tokens_per_image": 1}, "own: an image keeps fewer than min_tokens_per_image=1"),
    ):
        model = atp_patch.patch_model(tiny_model("qwen2_vl"), [2, 4], Own(), **options)
        with pytest.raises(atp_patch.ATPError, match=message):
            forward(model, made.batch(model, made.TWO_IMAGES))
    model = atp_patch.patch_model(tiny_model("qwen2_vl"), [2, 4], Own(), min_tokens=2)
    forward(model, made.batch(model, made.TWO_IMAGES))
    assert atp_patch.last_trace(model).layers[4].kept_counts == (2,)


def test_what_was_kept_is_counted_not_believed() -> None:
    """A method that keeps another number than the budget's is traced as it is."""
    model = patched(Own(5), "llava-llama")
    forward(model, made.batch(model, made.SINGLE))
    trace = atp_patch.last_trace(model)
    assert [trace.layers[layer].kept_counts for layer in (2, 4)] == [(5,), (5,)]
    assert int((trace.layers[2].kept & trace.visual).sum()) == 5


def test_a_method_that_needs_a_budget_it_was_not_given_is_told() -> None:
    class Needy(Own):
        def decide(self, view: atp_patch.View, module: object) -> atp_patch.Decision:
            return atp_patch.Decision(keep_best(view, view.token.float()))

    model = atp_patch.patch_model(tiny_model("llava-llama"), [2], Needy())
    with pytest.raises(atp_patch.ATPError, match="keep= or target_tokens="):
        forward(model, made.batch(model, made.SINGLE))


def test_features_are_the_hidden_states_of_the_tokens_left() -> None:
    seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    class Look(Last):
        def decide(self, view: atp_patch.View, module: object) -> atp_patch.Decision:
            position = view.layout.position.gather(1, view.token)
            seen.append((view.layer, view.features, position, view.slot_valid))
            return super().decide(view, module)

    model = patched(Look())
    inputs = made.batch(model, made.MIXED)
    states = forward(model, inputs, output_hidden_states=True).hidden_states
    for layer, features, position, valid in seen:
        for b in range(len(valid)):
            expected = states[layer][b, position[b, valid[b]]]
            assert torch.equal(features[b, valid[b]], expected)
            assert not features[b, ~valid[b]].any()
    assert [layer for layer, *_ in seen] == [2, 4]


def test_tables_over_the_layout_come_back_for_the_tokens_left() -> None:
    class Check(Last):
        def decide(self, view: atp_patch.View, module: object) -> atp_patch.Decision:
            table = view.to_table(view.token + 1, fill=-1)
            assert table.shape == view.layout.valid.shape
            assert torch.equal(
                view.of_token(table)[view.slot_valid], view.token[view.slot_valid] + 1
            )
            gone = (table == -1).sum(1)
            assert torch.equal(gone, table.shape[1] - view.slot_valid.sum(1))
            return super().decide(view, module)

    model = patched(Check())
    forward(model, made.batch(model, made.MIXED))


# -- what tower and picture methods answer --------------------------------------------------------

ChangeMerge = Callable[[atp_patch.TokenGroups, atp_patch.Merge], Any]


@dataclass(frozen=True)
class FirstOfTower(atp_patch.TowerMethod):
    """A right merge of the first tokens of each group, and what a test makes of it."""

    name = "first-but"
    summary = "the first tokens of each group, changed by a test"
    change: Any = None

    def merge(self, groups: atp_patch.TokenGroups) -> Any:
        assert groups.counts is not None
        counts = torch.tensor(groups.counts)
        place = torch.arange(groups.valid.shape[1])
        keep = (place < counts[:, None]) & groups.valid
        index = place[: max(groups.counts)].expand(len(keep), -1)
        index = index.masked_fill(index >= counts[:, None], 0)
        weight = torch.ones(*index.shape, keep.shape[1]) / keep.shape[1]
        changed = index == 0
        changed[:, 1:] = False
        right = atp_patch.Merge(keep, index, weight, changed)
        if self.change is None:
            return right
        changed_by = self.change(groups, right)
        if not isinstance(changed_by, dict):
            return changed_by
        return atp_patch.Merge(**{**vars(right), **changed_by})


def put(table: Tensor, place: tuple[int, ...], value: Any) -> Tensor:
    """The same table with one other value."""
    table = table.clone()
    table[place] = value
    return table


WRONG_MERGES: dict[str, tuple[ChangeMerge, str]] = {
    "no merge": (lambda g, m: None, r"merge\(\) returned NoneType; return an atp_patch.Merge"),
    "only keep": (lambda g, m: m.keep, r"merge\(\) returned Tensor"),
    "none": (lambda g, m: {"keep": m.keep & False}, "a group keeps fewer than minimum=3"),
    "floats": (lambda g, m: {"keep": m.keep.float()}, "keep is .*float32; it must be .* bool"),
    "short": (lambda g, m: {"keep": m.keep[:, :-1]}, r"keep is \(2, 35\) torch.bool"),
    "one group": (lambda g, m: {"keep": m.keep[:1]}, r"keep is \(1, 36\)"),
    "elsewhere": (lambda g, m: {"keep": m.keep.to("meta")}, "keep is on meta"),
    "others": (lambda g, m: {"keep": m.keep.flip(1)}, "index names tokens that keep drops"),
    "more": (
        lambda g, m: {"keep": g.valid},
        r"a group keeps more tokens than index has room for \(18\)",
    ),
    "one twice": (
        lambda g, m: {"index": put(m.index, (0, 1), 0)},
        "index does not name the kept tokens in order",
    ),
    "from right to left": (
        lambda g, m: {"index": m.index.flip(1)},
        "index does not name the kept tokens in order",
    ),
    "outside": (
        lambda g, m: {"index": put(m.index, (0, 1), 500)},
        "index names tokens outside of the groups' 36",
    ),
    "index of floats": (lambda g, m: {"index": m.index.float()}, "index is .* int64"),
    "a list": (lambda g, m: {"index": m.index.tolist()}, "index is list; give a tensor"),
    "square weights": (lambda g, m: {"weight": m.weight[..., :2]}, r"weight is \(2, 18, 2\)"),
    "half weights": (lambda g, m: {"weight": m.weight.half()}, "weight is .*float16; .* float32"),
    "NaN weights": (
        lambda g, m: {"weight": m.weight * torch.nan},
        "weight holds numbers that are not finite",
    ),
    "no changed": (lambda g, m: {"changed": None}, "changed is NoneType; give a tensor"),
    "changed in a free slot": (
        lambda g, m: {
            "keep": put(m.keep, (0, 17), False),
            "changed": put(m.changed, (0, 17), True),
        },
        "changed is True in slots of index that no kept token has",
    ),
}


def tower_pass(method: Any, kind: str = "qwen2_vl", **options: Any) -> Tensor:
    model = atp_patch.patch_model(tiny_model(kind), method=method, **{"keep": 0.5, **options})
    return forward(model, made.batch(model, made.RAGGED)).logits


@pytest.mark.parametrize("name", WRONG_MERGES)
def test_a_wrong_merge_is_an_error_that_names_the_method(name: str) -> None:
    change, message = WRONG_MERGES[name]
    with pytest.raises(atp_patch.ATPError, match=f"^first-but: {message}"):
        tower_pass(FirstOfTower(change), "llava-llama", min_tokens=3)


def test_what_a_merge_says_of_padding_does_not_count() -> None:
    def spoil(groups: atp_patch.TokenGroups, right: atp_patch.Merge) -> dict[str, Any]:
        assert not groups.valid.all()
        return {
            "keep": right.keep | ~groups.valid,
            "weight": right.weight.masked_fill(~right.changed[..., None], torch.nan),
        }

    assert torch.equal(tower_pass(FirstOfTower(spoil)), tower_pass(FirstOfTower()))


@dataclass(frozen=True)
class Given(atp_patch.PictureMethod):
    """The grid that a test gives."""

    name = "given"
    summary = "the grid that a test gives"
    size: Any = None

    def grid(self, height: int, width: int, count: int, minimum: int, *, square: bool) -> Any:
        return self.size


WRONG_GRIDS: dict[str, tuple[Any, str]] = {
    "larger": ((100, 100), r"\(100, 100\) for a grid of 6 x 6; return a height from 1 to 6"),
    "wider": ((6, 7), r"\(6, 7\) for a grid of 6 x 6"),
    "nothing": ((0, 0), r"\(0, 0\) for a grid"),
    "less than nothing": ((-1, 2), r"\(-1, 2\) for a grid"),
    "floats": ((3.0, 3.0), r"\(3.0, 3.0\); return two integers"),
    "one": ((3,), r"\(3,\); return two integers"),
    "three": ((1, 3, 3), r"\(1, 3, 3\); return two integers"),
    "None": (None, "None; return two integers"),
    "too small": ((1, 1), r"\(1, 1\) for a grid of 6 x 6; return one of at least minimum=4 tokens"),
}


@pytest.mark.parametrize("name", WRONG_GRIDS)
def test_a_wrong_grid_is_an_error_that_names_the_method(name: str) -> None:
    size, message = WRONG_GRIDS[name]
    with pytest.raises(atp_patch.ATPError, match=rf"^given: grid\(\) returned {message}"):
        tower_pass(Given(size), "llava-llama", min_tokens=4)


def test_a_wrong_grid_for_a_tower_of_patches_is_an_error_too() -> None:
    for size, message in (((100, 100), "for a grid of"), (None, "return two integers")):
        with pytest.raises(atp_patch.ATPError, match=rf"^given: grid\(\) returned .*{message}"):
            tower_pass(Given(size))


def test_a_grid_that_must_be_square_is_checked_for_it() -> None:
    given: dict[str, Any] = {"height": 6, "width": 6, "minimum": 1, "method": "given"}
    assert check_grid((2, 3), **given, square=False) == (2, 3)
    assert check_grid((2, 2), **given, square=True) == (2, 2)
    with pytest.raises(atp_patch.ATPError, match=r"^given: .*\(2, 3\).* needs a square one"):
        check_grid((2, 3), **given, square=True)


def test_a_grid_may_be_a_list_and_the_same_as_before() -> None:
    whole = forward(tiny_model("llava-llama"), made.batch(tiny_model("llava-llama"), made.RAGGED))
    assert torch.equal(tower_pass(Given([6, 6]), "llava-llama"), whole.logits)
