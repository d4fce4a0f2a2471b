"""A page in Markdown about one machine and model: from what on does pruning pay?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from atp_patch.bench.comparison_tables import markdown, table
from atp_patch.bench.growth import alike, growth_table
from atp_patch.bench.measure import PLAIN


def pays(column: dict[str, Any]) -> bool:
    """Whether a contender gained time in one case.

    It did where its decoder was faster than the plain one's in every round, and its first token
    came earlier by the medians.

    Args:
        column: the figures of the contender, as
            :func:`atp_patch.bench.comparison_tables.entries` gives them.
    """
    against = column["against_plain"]
    return bool(against["pairs"][0] > 1 and against["prefill_speedup"] > 1)


def page(report: dict[str, Any], command: str) -> str:
    """The page.

    Args:
        report: what :func:`atp_patch.bench.__main__.run` returns.
        command: the command line that made it.
    """
    parts = [
        f"# When pruning pays: {report['model']}",
        f"{report['machine']}; {report['date']}; atp_patch {report['atp_patch']}, torch "
        f"{report['torch']}, transformers {report['transformers']}. The weights are random, so "
        "times are those of the model and answers are not.",
        f"```sh\n{command}\n```",
        "## From what size on",
        "Pruning pays in a case where the decoder was faster than the plain one's in every round, "
        "and the first token came earlier by the medians. A number is how many times as fast as "
        "the plain model's the first token came.",
        *pays_tables(report["cases"]),
    ]
    if report["growth"]:
        parts += ["## Growth", *map(growth_table, report["growth"])]
    parts += ["## All figures", *map(table, report["cases"])]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def pays_tables(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For each batch size and prompt length, a table of the methods and the sizes of pictures."""
    for (batch_size, prompt_tokens), members in alike(cases):
        names = [name for name in members[0]["contenders"] if name != PLAIN]
        columns = {name: [case["contenders"][name] for case in members] for name in names}
        head = ["visual tokens", *(f"{case['visual_tokens']:,}" for case in members), "pays"]
        rows = [
            [
                name,
                *(f"{one['against_plain']['prefill_speedup']:.2f}" for one in of_method),
                _from_where(of_method, members),
            ]
            for name, of_method in columns.items()
        ]
        about = f"Batch {batch_size}, {prompt_tokens} text tokens:"
        yield f"{about}\n\n{markdown(head, rows)}"


def _from_where(columns: Sequence[dict[str, Any]], cases: Sequence[dict[str, Any]]) -> str:
    """From which size on pruning pays in all larger cases too."""
    start = len(columns)
    while start and pays(columns[start - 1]):
        start -= 1
    if start == len(columns):
        return "not here"
    return f"from {cases[start]['visual_tokens']:,}" if start else "in all of these"
