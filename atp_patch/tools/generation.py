"""How answers are generated, and the tokens that end them."""

from __future__ import annotations

from typing import Any

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}
"""Arguments of ``generate`` for the likeliest token at each step."""


def end_ids(model: Any) -> tuple[int, ...]:
    """Return the ids at which ``generate`` stops; none where the model names none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)
