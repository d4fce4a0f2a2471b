"""Small tables of a trace: as plain text, and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """A table of text cells with named columns.

    Attributes:
        columns: the names of the columns.
        rows: the cells of each row, one for each column.
        words: the names of the columns that are aligned to the left; others are aligned to the
            right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[str] = frozenset()

    def text(self) -> str:
        """Return aligned lines of text, without a newline at the end."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if name in self.words else cell.rjust(width)
                for name, cell, width in zip(self.columns, line, widths, strict=True)
            ).rstrip()
            for line in lines
        )

    def html(self) -> str:
        """Return an HTML ``<table>`` in which every cell is escaped."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align: {"left" if name in self.words else "right"}">'
                f"{escape(cell)}</td>"
                for name, cell in zip(self.columns, row, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def as_text(title: str, tables: Sequence[Table]) -> str:
    """Return the title and then the tables as text."""
    return "\n".join([title, *(table.text() for table in tables)])


def as_html(title: str, tables: Sequence[Table]) -> str:
    """Return the title and then the tables as HTML."""
    return f"<p>{escape(title)}</p>" + "".join(table.html() for table in tables)
