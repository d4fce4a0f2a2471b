"""Mistral 3, and LLaVA with a Pixtral tower: images of any size whose rows end in a text id.

An image is written as rows of placeholders. A break id stands behind each row but the last, and an
end id stands behind the last one. So the rows of one image lie one id apart, and where images
follow each other directly, the end ids tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from atp_patch.contract import GridQuery, Span, VisualGrid
from atp_patch.contract.errors import InputError
from atp_patch.families.base import Family, Grids
from atp_patch.families.towers import pixtral_tower


def chains(spans: Sequence[Span]) -> list[list[Span]]:
    """Return rows that lie one id apart, in groups: each is one image, or images without text
    between.
    """
    found: list[list[Span]] = []
    for span in spans:
        if found and span.start == found[-1][-1].stop + 1:
            found[-1].append(span)
        else:
            found.append([span])
    return found


def stacked(rows: Sequence[Span]) -> VisualGrid:
    """Return the grid of one image, given its rows, which lie one id apart.

    Raises:
        InputError: where the rows have different lengths.
    """
    start, width = rows[0].start, rows[0].length
    if any(row.length != width for row in rows):
        raise InputError(
            f"the rows of the image at position {start} have different lengths; let the "
            "model's own processor make input_ids and pixel values together."
        )
    return VisualGrid(start, 1, len(rows), width, row_stride=width + 1)


def _images(chain: list[Span], ids: list[int]) -> list[VisualGrid]:
    """Return the images of a chain of rows; ``ids`` are those of the whole sample."""
    after = [ids[row.stop] if row.stop < len(ids) else -1 for row in chain]
    for row, behind in zip(chain, after, strict=True):
        if behind == row.token_id:
            raise InputError(
                f"the row of visual tokens from position {row.start} on ends before its last "
                "placeholder; mark all tokens of a row as visual, or none."
            )
    end = after[-1]  # The id behind the last row of a chain ends every image in it.
    grids = []
    first = 0
    for last, mark in enumerate(after):
        if mark != end:
            continue
        grids.append(stacked(chain[first : last + 1]))
        first = last + 1
    return grids


def pixtral_grids(query: GridQuery) -> Grids:
    """Return the grids of images whose rows are found by the ids between them.

    Raises:
        InputError: where the prompt came as embeddings alone, or its rows form no images.
    """
    if query.ids is None:
        raise InputError(
            "rows of an image are found by the ids between them: pass input_ids in place of "
            "inputs_embeds, or, to generate, beside them."
        )
    return [
        [grid for chain in chains(spans) for grid in _images(chain, ids)]
        for spans, ids in zip(query.spans, query.ids.tolist(), strict=True)
    ]


MISTRAL3 = Family(
    name="mistral3",
    model_types=("mistral3",),
    grids=pixtral_grids,
    tower=pixtral_tower,
    read_only=True,
    layout="rows x columns, ids of text between rows",
)
