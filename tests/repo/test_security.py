"""What SECURITY.md promises of the source: nothing that is loaded runs code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS_CODE = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system", "numpy.load"}


def calls() -> Iterator[tuple[str, str, dict[str, str]]]:
    """File, name of what is called, and the keywords of every call in the package."""
    for path in sorted((ROOT / "atp_patch").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg is not None}
                yield str(path.relative_to(ROOT)), ast.unparse(node.func), given


def test_no_code_is_run_from_a_file() -> None:
    found = list(calls())
    assert len(found) > 1000
    assert [(file, name) for file, name, _ in found if name in RUNS_CODE] == []
    unpickled = [(file, given) for file, name, given in found if name == "torch.load"]
    assert unpickled, "torch.load is looked for under another name"
    assert all(given.get("weights_only") == "True" for _, given in unpickled)


def test_no_remote_code_is_trusted() -> None:
    trusting = [given["trust_remote_code"] for *_, given in calls() if "trust_remote_code" in given]
    assert trusting
    assert set(trusting) == {"False"}
