"""Settings: YAML and flags, and every wrong one named with its mend before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atp_patch import train
from atp_patch.contract.errors import ConfigError
from atp_patch.training.options import flags_of, parser
from atp_patch.training.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]


def read(*argv: object) -> Settings:
    args = parser().parse_args([str(arg) for arg in argv])
    return read_settings(args.file, flags_of(args))


def test_flags_win_and_options_merge(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "lr: 1e-3\nsteps: 5\nfreeze_lm: false\nlayers: [2, 3]\nbetas: [0.8, 0.9]\n"
        "options: {slope: 10, score: mean}\n",
        encoding="utf-8",
    )
    got = read(file, "--steps", 7, "--option", "slope=2e1", "--option", "causal_self=true")
    assert got == Settings(
        lr=1e-3,
        steps=7,
        freeze_lm=False,
        layers=(2, 3),
        betas=(0.8, 0.9),
        options={"slope": 20, "score": "mean", "causal_self": True},
    )
    assert read(file, "--freeze-lm", "--layers", "1,2").layers == (1, 2)
    assert read(file, "--freeze-lm").freeze_lm
    assert read(file, "--steps", "none").steps is None
    assert read(ROOT / "examples" / "llava15_665k.yaml").lr == 2e-5
    assert Settings(**{**got.to_dict(), "layers": (2, 3), "betas": (0.8, 0.9)}) == got


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"speed": 3}, ["'speed'", "--help"]),
        ({"steps": "many"}, ["steps", "'many'", "int"]),
        ({"steps": 2.5}, ["steps", "2.5", "int"]),
        ({"steps": 0}, ["steps: 0", "at least 1"]),
        ({"batch_size": 0}, ["batch_size: 0", "at least 1"]),
        ({"lr": -1}, ["lr: -1", "above 0"]),
        ({"lr": "nan"}, ["lr: nan", "above 0"]),
        ({"atp_bias_lr": -1}, ["atp_bias_lr: -1", "above 0"]),
        ({"distill": -0.1}, ["distill", "negative"]),
        ({"warmup": 1.0}, ["warmup", "below 1"]),
        ({"betas": [0.9]}, ["betas", "two"]),
        ({"betas": [2, 3]}, ["betas: [2.0, 3.0]", "below 1"]),
        ({"betas": [0.9, float("nan")]}, ["betas", "below 1"]),
        ({"lr": float("inf")}, ["lr: inf", "finite"]),
        ({"epochs": float("inf")}, ["epochs: inf", "finite"]),
        ({"distill": "inf"}, ["distill: inf", "finite"]),
        ({"target_tokens": float("inf")}, ["target_tokens: inf", "finite"]),
        ({"lora_alpha": 0}, ["lora_alpha: 0", "above 0"]),
        ({"steps": float("inf")}, ["steps: inf", "int"]),
        ({"samples": 1e300}, ["samples: 1e+300", "int"]),
        ({"seed": -1}, ["seed: -1", "negative"]),
        ({"seed": 2**32}, ["seed: 4294967296", "below 2**32"]),
        ({"schedule": "steep"}, ["'steep'", "cosine"]),
        ({"dtype": "float16"}, ["'float16'", "bfloat16"]),
        ({"device": "abacus"}, ["'abacus'", "cuda"]),
        ({"freeze_lm": "perhaps"}, ["freeze_lm", "'perhaps'", "bool"]),
        ({"lora_rank": 4, "freeze_lm": False}, ["lora_rank", "freeze_lm: true"]),
        ({"text_only": True}, ["text_only", "freeze_lm: false"]),
        ({"rope_2d": True}, ["rope_2d", "freeze_lm: false"]),
        ({"adapter": "a", "layers": [2]}, ["adapter", "layers"]),
        ({"options": {"target_tokens": 9}}, ["target_tokens is a setting of its own"]),
        ({"options": {"method": "fastv"}}, ["method is not for a training"]),
    ],
)
def test_wrong_settings(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(None, settings)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: [1", ["a.yaml", "not YAML"]),
        ("- 1", ["a.yaml", "steps: 300"]),
        ("speed: 3", ["a.yaml", "'speed'"]),
        ("options: [1]", ["a.yaml", "options", "mapping"]),
        (None, ["a.yaml", "cannot be read"]),
    ],
)
def test_wrong_files(
    text: str | None, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    assert train.main([str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines[0]
