"""How time and memory grow with the number of tokens, fitted over pictures of several sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from atp_patch.bench.comparison_tables import markdown
from atp_patch.bench.measure import PLAIN
from atp_patch.bench.plot import figure
from atp_patch.visualize.palette import marked

FEWEST_SIZES = 3  # a line through two points fits always, and says nothing of how well


def growths(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fit growth over the cases that differ in their picture alone, where there are enough.

    A time that grows as ``tokens ** k`` is a line of slope k in logarithms. The slope is that of
    least squares over the medians of the cases.

    Args:
        cases: what :func:`atp_patch.bench.__main__.run` reports, with different pictures.

    Returns:
        for each batch size and prompt length: "tokens" of the plain prefill, visual and text; and
        for each contender "decoder_ms" and "peak_bytes" at each of them, the slopes
        "decoder_exponent" and "overhead_exponent" (None for the plain model), and
        "exponent_of_plain", the first in relation to the plain model's.
    """
    found = []
    for (batch_size, prompt_tokens), members in alike(cases):
        tokens = [case["visual_tokens"] + prompt_tokens for case in members]
        if len(set(tokens)) < FEWEST_SIZES:
            continue
        contenders: dict[str, dict[str, Any]] = {}
        for name in members[0]["contenders"]:
            columns = [case["contenders"][name] for case in members]
            times = [column["decoder_ms"]["median"] for column in columns]
            spent = [column["overhead_ms"] for column in columns]
            contenders[name] = {
                "decoder_ms": times,
                "peak_bytes": [column["peak_bytes"] for column in columns],
                "decoder_exponent": slope(tokens, times),
                "overhead_exponent": (
                    None if None in spent else slope(tokens, [one["median"] for one in spent])
                ),
            }
        plain = contenders[PLAIN]["decoder_exponent"]
        for one in contenders.values():
            one["exponent_of_plain"] = one["decoder_exponent"] / plain
        about = {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "tokens": tokens}
        found.append({**about, "contenders": contenders})
    return found


def slope(tokens: Sequence[float], values: Sequence[float]) -> float:
    """The exponent k of the power law ``c * tokens ** k`` nearest to the values, in logarithms."""
    x, y = ([math.log(value) for value in one] for one in (tokens, values))
    middle_x, middle_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    across = math.fsum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return across / math.fsum((a - middle_x) ** 2 for a in x)


def growth_table(growth: dict[str, Any]) -> str:
    """The table of one growth, with a row for each contender."""
    head = [
        "decoder ms at tokens",
        *(f"{tokens:,}" for tokens in growth["tokens"]),
        "exponent",
        "of plain's",
        "overhead's exponent",
        "peak GB at the last",
    ]
    rows = [
        [
            name,
            *(f"{value:.1f}" for value in one["decoder_ms"]),
            f"{one['decoder_exponent']:.2f}",
            f"{one['exponent_of_plain']:.2f}",
            "-" if one["overhead_exponent"] is None else f"{one['overhead_exponent']:.2f}",
            "-" if one["peak_bytes"][-1] is None else f"{one['peak_bytes'][-1] / 1e9:.2f}",
        ]
        for name, one in growth["contenders"].items()
    ]
    about = f"growth with the picture: batch {growth['batch_size']}, {growth['prompt_tokens']} text"
    return f"{about} tokens; time fitted as tokens ** exponent\n\n{markdown(head, rows)}"


def draw_growths(found: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the decoder's time against the tokens of the plain prefill, both on logarithmic axes.

    Args:
        found: what :func:`growths` returns; at least one.
        title: the title of the plot.
        path: the path of the file to write.
    """
    with figure(path, title) as axes:
        for growth in found:
            about = f", batch {growth['batch_size']}" if len(found) > 1 else ""
            for name, one in growth["contenders"].items():
                label = f"{name}{about} (exponent {one['decoder_exponent']:.2f})"
                look = {**marked(len(axes.lines)), "label": label}
                axes.loglog(growth["tokens"], one["decoder_ms"], **look)
        axes.set_xlabel("tokens of the plain prefill, visual and text")
        axes.set_ylabel("decoder prefill, milliseconds (median)")


def alike(
    cases: Sequence[dict[str, Any]],
) -> Iterator[tuple[tuple[int, int], list[dict[str, Any]]]]:
    """The cases of each batch size and prompt length, the smaller pictures first."""

    def setting(case: dict[str, Any]) -> tuple[int, int]:
        return case["batch_size"], case["prompt_tokens"]

    ordered = sorted(cases, key=lambda case: (*setting(case), case["visual_tokens"]))
    return ((key, list(members)) for key, members in groupby(ordered, key=setting))
