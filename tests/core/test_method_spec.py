"""One way to name methods, their layers and budgets, for every command."""

from __future__ import annotations

import pytest

from atp_patch.contract.errors import ConfigError
from atp_patch.tools.method_spec import MethodSpec, method_argument, read_method_spec

ENDS = ("@", "@2+", "@x", "@1.5", ":", ":0", ":1.1", ":nan", ":x", ":0.5+", ":-1", "@2:")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("atp", MethodSpec("atp", None, None)),
        ("fastv@2", MethodSpec("fastv", (2,), None)),
        ("atp:0.5+1", MethodSpec("atp", None, (0.5, 1.0))),
        ("atp@1+13+25:0.06", MethodSpec("atp", (1, 13, 25), (0.06,))),
        ("prumerge+", MethodSpec("prumerge+", None, None)),
        ("prumerge+:0.25", MethodSpec("prumerge+", None, (0.25,))),
        ("prumerge+/atp@1+13:0.5", MethodSpec("prumerge+/atp", (1, 13), (0.5,))),
        ("voco", MethodSpec("voco", None, None)),
    ],
)
def test_what_a_name_says(text: str, expected: MethodSpec) -> None:
    assert read_method_spec(text) == expected
    assert expected.stages == expected.name.split("/")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "''"),
        ("atp/", "''"),
        ("magic@2", "no method 'magic'; there are atp, fixed"),
        ("atp/prumerge+", "one that prunes before"),
        ("downsample@2", "give downsample"),
        ("voco@2", "give voco"),
        *((f"atp{end}", "after @ come layers, and after : shares") for end in ENDS),
    ],
)
def test_what_is_no_name_is_one_error(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"--methods|give one method") as raised:
        read_method_spec(text)
    assert said in str(raised.value)


def test_what_patch_model_is_given() -> None:
    assert method_argument("prumerge+") == "prumerge+"
    assert method_argument("prumerge+/atp") == ["prumerge+", "atp"]
