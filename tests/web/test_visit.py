"""What stands behind the page: visits, answers as they come, limits, errors as sentences."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import atp_patch
from atp_patch.builtin import load_builtin
from atp_patch.contract.errors import InputError
from atp_patch.tools.generation import GREEDY
from atp_patch.tools.loading import encode
from atp_patch.visualize import Drawing
from atp_patch.web import show, uploads
from atp_patch.web.engine import Engine, Pruning, Reply
from atp_patch.web.requests import asks, explained, looks, prunings, scene
from atp_patch.web.visit import Visit, ask, look

SCENE = scene(53, "dynamic")
QUESTION = SCENE.questions[0].text
ATP, UNIFORM = Pruning("atp", 0.5), Pruning("uniform", 0.5, (2, 4))


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """A built-in model and its processor."""
    return load_builtin("dynamic")


@pytest.fixture(scope="module")
def engine(parts: tuple[Any, Any]) -> Engine:
    return Engine(*parts, "builtin-dynamic", max_new_tokens=4)


def plain_answer(parts: tuple[Any, Any], question: str) -> str:
    """What the model alone generates, token by token all at once."""
    model, processor = load_builtin("dynamic")
    inputs = encode(processor, SCENE.image, question, model)
    with torch.inference_mode():
        ids = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    return str(
        processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ).strip()


def test_an_answer_grows_to_what_the_model_says(engine: Engine, parts: tuple[Any, Any]) -> None:
    *growing, last = engine.ask(SCENE.image, QUESTION, None)
    assert last.done
    assert last.text == plain_answer(parts, QUESTION)
    assert last.trace is None
    assert growing
    assert all(last.text.startswith(reply.text) and not reply.done for reply in growing)
    assert last.prefill_ms is not None
    assert last.prefill_ms > 0
    # After another pruning the plain model is as it was.
    *_, pruned = engine.ask(SCENE.image, QUESTION, UNIFORM)
    assert pruned.trace is not None
    assert list(pruned.trace.layers) == [2, 4]
    assert pruned.trace.average_tokens == pytest.approx(0.5 * pruned.trace.visual_tokens, abs=1)
    *_, again = engine.ask(SCENE.image, QUESTION, None)
    assert again.text == last.text


def test_two_visitors_at_once_get_their_own_answers(engine: Engine) -> None:
    found: dict[str, Reply] = {}

    def visitor(method: str) -> None:
        *_, found[method] = engine.ask(SCENE.image, QUESTION, Pruning(method, 0.5, (3,)))

    threads = [threading.Thread(target=visitor, args=(name,)) for name in ("uniform", "fastv")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = {name: reply.trace.layers[3].kept[0].tolist() for name, reply in found.items()}  # type: ignore[union-attr]
    assert kept["uniform"] != kept["fastv"]
    for name in kept:
        *_, alone = engine.ask(SCENE.image, QUESTION, Pruning(name, 0.5, (3,)))
        assert alone.trace is not None
        assert alone.trace.layers[3].kept[0].tolist() == kept[name]
        assert alone.text == found[name].text


def test_an_answer_that_nobody_waits_for_ends(engine: Engine) -> None:
    answers = engine.ask(SCENE.image, QUESTION, None)
    next(answers)
    answers.close()
    *_, last = engine.ask(SCENE.image, QUESTION, None)
    assert last.done


def test_asking_shows_everything(engine: Engine) -> None:
    visit = Visit(SCENE.image)
    ways = {"first": ATP, "second": UNIFORM}
    *growing, last = ask(engine, visit, QUESTION, ways, remembers=False)
    assert last.shown is not None
    assert visit.turns == {}, "a visit is never changed"
    for side in ("plain", "first", "second"):
        user, assistant = last.messages(side)
        assert user == {"role": "user", "content": QUESTION}
        assert assistant["role"] == "assistant"
        assert assistant["content"]
        assert any(side in step.turns and step.shown is None for step in growing)
    assert [name for name in ("atp", "uniform") if f"<h3>{name}</h3>" in last.shown.kept]
    assert last.shown.kept.count("<img") == 2
    assert "no scores" in last.shown.scores
    assert last.shown.scores.count("<img") == 1
    assert "Times are those of this one answer" in last.shown.costs
    for second in ask(engine, last, "Read the sign.", ways, remembers=False):
        if "Read the sign." in str(second.messages("first")):
            break
    assert len(second.messages("plain")) == len(second.messages("first")) == 4
    assert second.messages("first")[:2] == last.messages("first")


class Recorded(Engine):
    """Notes the earlier turns that it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def ask(self, image: Any, question: str, pruning: Any, earlier: Any = ()) -> Iterator[Reply]:
        self.told.append(earlier)
        raise InputError("enough")


@pytest.mark.parametrize("remembers", [True, False])
def test_earlier_turns_are_told_to_models_that_know_them(remembers: bool) -> None:
    engine, turns = Recorded(), (("What?", "a cat"),)
    visit = Visit(SCENE.image, {"plain": turns})
    with pytest.raises(InputError, match="enough"):
        list(ask(engine, visit, "Where?", {"first": ATP}, remembers=remembers))
    assert engine.told == [turns if remembers else ()]


def test_earlier_turns_stand_in_the_prompt(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    inputs = encode(processor, SCENE.image, "Read the sign.", model, [("Is it red?", "yes")])
    text = processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert re.search(r"[Ii]s it red.*yes.*[Rr]ead the sign", text, re.DOTALL)
    alone = encode(processor, SCENE.image, "Read the sign.", model)
    assert alone["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    assert torch.equal(alone["pixel_values"], inputs["pixel_values"])


def test_another_budget_shows_another_picture(engine: Engine) -> None:
    wide = look(engine, Visit(SCENE.image), QUESTION, {"first": Pruning("atp", 0.8)}).shown
    assert wide is not None
    assert "Times" not in wide.costs
    narrow, same = (
        show.kept({"atp": engine.look(SCENE.image, QUESTION, Pruning("atp", share))})
        for share in (0.3, 0.8)
    )
    assert wide.kept == same != narrow


def test_costs_are_those_of_the_trace(engine: Engine) -> None:
    trace = engine.look(SCENE.image, QUESTION, UNIFORM)
    plain, pruned = show.Costs.plain(trace), show.Costs.pruned(trace, Reply("", prefill_ms=3.0))
    assert plain.tokens == trace.visual_tokens > pruned.tokens == trace.average_tokens
    assert plain.gflops * 1e9 == trace.flops_plain > pruned.gflops * 1e9 == trace.flops
    assert plain.kv_mb * 1e6 == trace.kv_bytes_plain
    assert (pruned.prefill_ms, pruned.token_ms) == (3.0, None)


def test_charts_hold_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(Drawing, "png", lambda self: drawn.append(self.figure) or b"")
    found = {"plain": show.Costs(100, 2, 3, 40, None), "<atp>": show.Costs(25, 1, 2, 20, 5)}
    html = show._figure(show._bars(found), "what <b>", "<atp>")
    titles = [ax.get_title() for ax in drawn[0].axes]
    assert [title.split(",")[0] for title in titles] == [
        "visual tokens",
        "decoder prefill",
        "key/value cache",
        "time to first token",
    ]
    assert [bar.get_width() for bar in drawn[0].axes[3].patches] == [40, 20]
    assert "<h3>&lt;atp&gt;</h3>" in html
    assert 'alt="what &lt;b&gt;"' in html


def test_a_pair_of_methods_prunes_twice(engine: Engine) -> None:
    trace = engine.look(SCENE.image, QUESTION, Pruning("divprune/atp", 0.25, (3,)))
    assert list(trace.layers) == [0, 3]


def test_controls_are_read() -> None:
    given = ("atp", 25, [24, 4], False, "divprune", 10, [])
    assert prunings(given) == {"first": Pruning("atp", 0.25, (4, 24))}
    both = prunings((*given[:3], True, *given[4:]))
    assert both == {"first": Pruning("atp", 0.25, (4, 24)), "second": Pruning("divprune", 0.1)}


def test_without_a_picture_nothing_is_asked(engine: Engine) -> None:
    given = ("atp", 50, [], False, "divprune", 10, [])
    assert list(looks(engine, Visit(), QUESTION, given)) == [Visit()]
    with pytest.raises(InputError, match="pick a scene"):
        list(asks(engine, Visit(), QUESTION, given, remembers=False))
    with pytest.raises(InputError, match="question is empty"):
        list(asks(engine, Visit(SCENE.image), "  ", given, remembers=False))


def test_a_pruning_that_cannot_be_is_an_error_of_one_sentence(engine: Engine) -> None:
    for pruning in (Pruning("atp", 0.02), Pruning("atp", 0.5, (99,))):
        with pytest.raises(atp_patch.ConfigError) as caught:
            list(engine.ask(SCENE.image, QUESTION, pruning))
        assert explained(caught.value).count("<") == 2
    *_, last = engine.ask(SCENE.image, QUESTION, ATP)
    assert last.done, "the next request is served"


def test_errors_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert explained(InputError("no <b>")) == '<p class="alert" role="alert">no &lt;b&gt;</p>'
    assert "not enough memory" in explained(MemoryError())
    assert capsys.readouterr().err == ""
    assert "terminal" in explained(KeyError("a bug"))
    assert "KeyError: 'a bug'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["broken", "text", "many pixels", "large"])
def test_uploads_are_limited(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.png"
    Image.new("RGB", (64, 64), "red").save(path)
    assert uploads.read_upload(path).size == (64, 64)
    if kind == "broken":
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "text":
        path.write_text("a letter")
    elif kind == "many pixels":
        monkeypatch.setattr(uploads, "MAX_PIXELS", 64 * 64 - 1)
    else:
        monkeypatch.setattr(uploads, "MAX_MB", path.stat().st_size / 1e6 - 1e-6)
    with pytest.raises(InputError, match=r"^mine\.png ") as caught:
        uploads.read_upload(path)
    assert str(tmp_path) not in str(caught.value)
