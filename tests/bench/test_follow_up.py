"""A second question on what is kept of an image gets what it would get anew, from fewer tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atp_patch.bench.__main__ import main
from atp_patch.bench.follow_up import AGAIN, KEPT, Prompt, compare_questions
from atp_patch.bench.presets import PRESETS
from tests.bench.test_bench import SMALL


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_ways_answer_alike(family: str) -> None:
    preset, image, tokens = SMALL[family]
    torch.manual_seed(0)
    model: Any = preset.build(1.0, "sdpa", "cpu", torch.float32)
    inputs = preset.inputs(image, 2, 20, seed=0)
    read: list[tuple[int, Tensor]] = []  # tokens that went in, and the last one's logits
    note = model.register_forward_hook(
        lambda _m, _a, given, out: read.append((given["input_ids"].shape[1], out.logits[:, -1])),
        with_kwargs=True,
    )
    text = inputs["input_ids"] != 9  # the presets' placeholder
    told: list[int] = []
    found = compare_questions(model, inputs, text, [4], runs=1, advance=told.append)
    assert told == [1] * 6
    note.remove()
    question = Prompt.cut(inputs, text).question.shape[1]
    assert question == 18
    lengths = [length for length, _ in read]
    plain, kept = [tokens + 20] * 2, [tokens + 20, question]
    assert lengths[:4] == plain + kept
    assert lengths[-4:] == [question] * 2 + plain  # on VoCo tokens, twice; another way is first
    torch.testing.assert_close(read[0][1], read[3][1], atol=1e-4, rtol=1e-4)
    assert torch.equal(read[-3][1], read[-4][1])
    assert not torch.allclose(read[-3][1], read[0][1])
    assert found[AGAIN].kept_bytes == 0
    assert found[KEPT].kept_bytes > found["voco, 4 tokens"].kept_bytes > 0


def test_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", SMALL["llava"][0])
    path = tmp_path / "asked.json"
    options = ["--preset", "tiny", "--follow-up", "1,2", "--runs", "2", "--json", str(path)]
    assert main(options) == 0
    (case,) = json.loads(path.read_text())["cases"]
    names = [AGAIN, KEPT, "voco, 1 token", "voco, 2 tokens"]
    assert list(case["question_ways"]) == names
    assert case["question_ways"][AGAIN]["second_of_plain"] == 1.0
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "--follow-up", "2"], "give one of --train and --follow-up"),
        (["--follow-up", "2", "--keep", "0.5"], "leave out --keep"),
        (["--follow-up", "2", "--layers", "2"], "leave out --layers"),
        (["--follow-up", "0"], "from 1"),
    ],
)
def test_wrong_arguments(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--preset", "tiny", *options]) == 2
    assert message in capsys.readouterr().err
