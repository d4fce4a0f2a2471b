"""What one visitor of the page has done so far, and what asking adds to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from PIL import Image

from atp_patch.contract.errors import InputError
from atp_patch.patching.trace import PruningTrace
from atp_patch.web import show
from atp_patch.web.engine import Engine, Pruning, Reply, Turn
from atp_patch.web.show import Costs

SIDES = ("plain", "first", "second")


@dataclass(frozen=True)
class Shown:
    """What the tabs of the page show, as HTML."""

    kept: str
    scores: str
    costs: str


@dataclass(frozen=True)
class Visit:
    """What one visitor has done so far.

    Attributes:
        image: the picture, or None before one was chosen.
        turns: for each side, the questions about this picture and their answers.
        shown: what the tabs show, or None before anything was pruned.
    """

    image: Image.Image | None = None
    turns: Mapping[str, tuple[Turn, ...]] = field(default_factory=dict)
    shown: Shown | None = None

    def messages(self, side: str) -> list[dict[str, str]]:
        """Return the turns of one side as the page's chats take them."""
        return [
            {"role": role, "content": text}
            for turn in self.turns.get(side, ())
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]


def look(engine: Engine, visit: Visit, question: str, prunings: Mapping[str, Pruning]) -> Visit:
    """Show what each pruning keeps of the picture for a question, without an answer.

    Args:
        engine: the model.
        visit: the visit so far.
        question: the question.
        prunings: by the names of their sides, the prunings to show.

    Raises:
        ATPError: if there is no picture, or if the model cannot be pruned like this.
    """
    image = _image(visit)
    traces = {
        side: engine.look(image, question or "What is this?", pruning)
        for side, pruning in prunings.items()
    }
    return replace(visit, shown=_shown(traces, prunings, {}))


def ask(
    engine: Engine,
    visit: Visit,
    question: str,
    prunings: Mapping[str, Pruning],
    *,
    remembers: bool,
) -> Iterator[Visit]:
    """Answer a question, first by the plain model, then pruned in each way, token by token.

    Args:
        engine: the model.
        visit: the visit so far.
        question: the question.
        prunings: by the names of their sides, how the model is pruned.
        remembers: whether the model is told the earlier turns; the built-in models know single
            questions only.

    Raises:
        ATPError: if there is no picture or no question, or if the model cannot be pruned like this.
    """
    image = _image(visit)
    done: dict[str, Reply] = {}
    for side, pruning in [("plain", None), *prunings.items()]:
        earlier = visit.turns.get(side, ())
        for reply in engine.ask(image, question, pruning, earlier if remembers else ()):
            turns = {**visit.turns, side: (*earlier, (question, reply.text))}
            yield replace(visit, turns=turns)
            if reply.done:
                visit, done[side] = replace(visit, turns=turns), reply
    traces = {side: reply.trace for side, reply in done.items() if reply.trace is not None}
    yield replace(visit, shown=_shown(traces, prunings, done))


def _image(visit: Visit) -> Image.Image:
    if visit.image is None:
        raise InputError("There is no picture yet; pick a scene or upload one.")
    return visit.image


def _shown(
    traces: Mapping[str, PruningTrace],
    prunings: Mapping[str, Pruning],
    replies: Mapping[str, Reply],
) -> Shown:
    names = _names(prunings)
    named = {names[side]: trace for side, trace in traces.items()}
    any_trace = next(iter(traces.values()))
    found = {"plain": Costs.plain(any_trace, replies.get("plain"))}
    for side, trace in traces.items():
        found[names[side]] = Costs.pruned(trace, replies.get(side))
    return Shown(show.kept(named), show.scores(named), show.costs(found, named))


def _names(prunings: Mapping[str, Pruning]) -> dict[str, str]:
    """Return what drawings call each side: its method, with the share where both have the same."""
    methods = [pruning.method for pruning in prunings.values()]
    names = {}
    for number, (side, pruning) in enumerate(prunings.items(), start=1):
        twice = methods.count(pruning.method) > 1
        names[side] = f"{pruning.method} ({number})" if twice else pruning.method
    return names
