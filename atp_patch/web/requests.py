"""From the controls of the page to the model: what they ask for, and errors as sentences."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from atp_patch.builtin import as_shown, make_scene
from atp_patch.builtin.scenes import Scene
from atp_patch.contract.errors import ATPError
from atp_patch.tools.command_line import is_out_of_memory
from atp_patch.web.engine import Engine, Pruning
from atp_patch.web.visit import Visit, ask, look


def scene(index: int, builtin: str | None) -> Scene:
    """Return one of the generated scenes, of the size that a built-in model is shown."""
    made = make_scene("test", index)
    return made if builtin is None else as_shown(made, builtin)


def prunings(given: Sequence[Any]) -> dict[str, Pruning]:
    """Return the prunings that the controls ask for, by the names of their sides.

    Args:
        given: method, budget in percent and layers of the first, whether there is a second, and
            the same three of the second.
    """
    first, twice, second = given[:3], given[3], given[4:]
    ways = {"first": first, "second": second} if twice else {"first": first}
    return {
        side: Pruning(method, percent / 100, tuple(sorted(layers)))
        for side, (method, percent, layers) in ways.items()
    }


def looks(engine: Engine, visit: Visit, question: str, given: Sequence[Any]) -> Iterator[Visit]:
    """Show what the controls' prunings keep; before a picture is chosen there is nothing to do."""
    if visit.image is None:
        yield visit
    else:
        yield look(engine, visit, question, prunings(given))


def asks(
    engine: Engine, visit: Visit, question: str, given: Sequence[Any], *, remembers: bool
) -> Iterator[Visit]:
    """Answer a question under the controls' prunings; arguments as those of :func:`visit.ask`."""
    yield from ask(engine, visit, question, prunings(given), remembers=remembers)


def explained(error: Exception) -> str:
    """Return a sentence about an error, as HTML. A bug is printed with its traceback."""
    if isinstance(error, ATPError):
        text = str(error)
    elif is_out_of_memory(error):
        text = "There is not enough memory for this; take a smaller picture or budget."
    else:
        traceback.print_exception(type(error), error, error.__traceback__)
        text = "The page failed here; its terminal has the details."
    return f'<p class="alert" role="alert">{escape(text)}</p>'
