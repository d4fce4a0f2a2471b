"""The tables of docs/families.md, from the families' data and the rows of the tests.

    python -m tests.family_table

writes them between the marks; a test holds the page to them. What a tower offers is read from the
tiny configurations of the tests, because it hangs on the model's own tower.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from atp_patch.families import FAMILIES, Family, family_of
from atp_patch.families.refused import REFUSED
from tests.families.kinds import Kind
from tests.families.tables import EVERY

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
MARKS = {  # the name of a table -> what it stands between
    name: (f"<!-- {name}: python -m tests.family_table writes this -->", f"<!-- end of {name} -->")
    for name in ("families", "refused")
}
HEAD = (
    "family",
    "`config.model_type`",
    "visual tokens",
    "videos",
    "tower, at the door",
    "before",
    "VoCo",
)


@cache
def _kinds() -> dict[str, list[Kind]]:
    found: dict[str, list[Kind]] = {family.name: [] for family in FAMILIES}
    for kind in EVERY:
        found[family_of(kind.config()).name].append(kind)
    return found


def _read(config: Any, family: Family) -> str:
    """What methods at the decoder's door may read of the tower."""
    tower = family.tower(config)
    if tower is None:
        return "no"
    return "attention, keys" + (", class token" if tower.class_token else "")


def _merged(config: Any, family: Family) -> str:
    """Which methods in front of the decoder serve the model."""
    tower = family.tower(config)
    if tower is None or not tower.mergeable:
        return "no"
    return "merging, smaller pictures" if family.resizable else "merging"


def _voco(config: Any, family: Family) -> str:
    inside = family.late_layers(config) or family.told_kinds or family.keeps_state
    return "yes" if family.causal and family.outer is None and not inside else "no"


def _each(kinds: list[Kind], family: Family, say: Any) -> str:
    """One word for all kinds of a family, or one for each."""
    said = {kind.name: say(kind.config(), family) for kind in kinds}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    names: dict[str, list[str]] = {}
    for name, word in said.items():
        names.setdefault(word, []).append(f"`{name}`")
    return "; ".join(f"{', '.join(own)}: {word}" for word, own in names.items())


def families() -> str:
    """The table of what is served."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for family in FAMILIES:
        kinds = _kinds()[family.name]
        if not kinds:  # of another package, or any decoder: further down on the page
            continue
        videos = "yes" if any(kind.videos for kind in kinds) else "no"
        types = ", ".join(f"`{name}`" for name in family.model_types)
        cells = (_each(kinds, family, say) for say in (_read, _merged, _voco))
        lines.append(
            "| " + " | ".join((f"`{family.name}`", types, family.layout, videos, *cells)) + " |"
        )
    return "\n".join(lines)


def refused() -> str:
    """The table of what is refused, types of one reason in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for model_type, why in REFUSED.items():
        rows.setdefault(why, []).append(f"`{model_type}`")
    lines = ["| `config.model_type` | why | instead |", "|---|---|---|"]
    lines += [f"| {', '.join(types)} | {why} | {mend} |" for (why, mend), types in rows.items()]
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the tables between their marks."""
    for name, table in (("families", families()), ("refused", refused())):
        start, stop = MARKS[name]
        before, rest = page.split(start)
        page = f"{before}{start}\n{table}\n{stop}{rest.split(stop)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
