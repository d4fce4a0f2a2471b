"""``python -m atp_patch.train`` from end to end, on a model that is small and random."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor

import atp_patch
from atp_patch.builtin import DYNAMIC, load_builtin, prompt
from atp_patch.contract.errors import InputError
from atp_patch.training.records import Scenes
from tests.training.conftest import Writer, record
from tests.training.runs import LAYERS, heads, history, plain, question, run

SHOW_CURSOR = "\x1b[?25h"
PARTS = ("next_token", "atp", "target", "average_tokens", "token_accuracy", "answer_accuracy")


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of four steps."""
    out = tmp_path_factory.mktemp("whole")
    run(folder, out)
    return out


def test_the_loss_is_the_sum_of_its_parts_and_all_are_logged(whole: Path) -> None:
    lines = history(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert all(name in line for name in PARTS)
        total = line["next_token"] + 0.05 * line["atp"] + 0.2 * line["target"]
        assert line["loss"] == pytest.approx(total, rel=1e-3, abs=1e-4)
        assert 0 < line["average_tokens"] <= line["visual_tokens"] == 36
        assert line["skipped"] == 0


def test_the_adapter_loads_and_its_card_says_what_was_done(folder: Path, whole: Path) -> None:
    model = atp_patch.patch_model(plain(folder), weights=whole / "adapter")
    with torch.no_grad():
        model(**question(folder))
    assert atp_patch.last_trace(model).average_tokens < 36
    start = heads_at_start(folder)
    learned = heads(whole / "adapter")
    assert any(not torch.equal(learned[name], start[name]) for name in start)
    card = (whole / "adapter" / "README.md").read_text(encoding="utf-8")
    for words in (
        "language model frozen",
        "40 samples; 0 were",
        "4 steps of 4",
        "seed 0",
        "12 vis",
    ):
        assert words in card, words
    row = re.search(r"\| next-token loss \| (\S+) \| (\S+) \|", card)
    assert row is not None
    lines = history(whole)
    logged = [lines[0]["next_token"], lines[-1]["next_token"]]
    assert [float(x) for x in row.groups()] == pytest.approx(logged, rel=1e-3)
    settings = json.loads((whole / "settings.json").read_text(encoding="utf-8"))
    assert settings["target_tokens"] == 12
    assert set(load_file(whole / "checkpoint-2" / "learned.safetensors")) == {
        "atp_patch_heads." + name for name in start
    }


def heads_at_start(folder: Path) -> dict[str, Tensor]:
    from transformers import set_seed

    model = plain(folder)
    set_seed(0)
    options = {"reference_grid": 6, "heads_hidden_size": 8}
    atp_patch.patch_model(model, LAYERS, target_tokens=12, thresholds="learned", **options)
    return model.atp_patch_heads.state_dict()


def test_a_training_that_goes_on_is_one_that_never_stopped(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "half"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "adapter")
    (out / "trainer_state.json").unlink()
    run(folder, out, resume=True)
    for a, b in zip(history(out), history(whole), strict=True):
        assert {name: a[name] for name in PARTS} == pytest.approx({n: b[n] for n in PARTS})
        assert a["loss"] == pytest.approx(b["loss"])
    expected = heads(whole / "adapter")
    for name, tensor in heads(out / "adapter").items():
        torch.testing.assert_close(tensor, expected[name])


def test_resuming_is_refused_where_it_would_be_another_training(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(atp_patch.ConfigError, match="--resume goes on"):
        run(folder, whole)
    with pytest.raises(atp_patch.ConfigError, match=r"seed \(0, now 1\)"):
        run(folder, whole, resume=True, seed=1)
    with pytest.raises(atp_patch.ConfigError, match="no checkpoint"):
        run(folder, tmp_path, resume=True)
    shutil.copytree(whole / "adapter", tmp_path / "done" / "adapter")
    with pytest.raises(atp_patch.ConfigError, match="holds the adapter of an earlier training"):
        run(folder, tmp_path / "done")
    shutil.copytree(whole, tmp_path / "torn")
    (tmp_path / "torn" / "checkpoint-4" / "learned.safetensors").unlink()
    shutil.rmtree(tmp_path / "torn" / "adapter")
    with pytest.raises(atp_patch.WeightsError, match="does not hold what this training learns"):
        run(folder, tmp_path / "torn", resume=True, steps=4)


def test_accumulated_passes_are_one_large_batch(folder: Path, tmp_path: Path, data: Writer) -> None:
    """Eq. 13 is of the whole batch's average, not of the mean over passes: left out here."""
    file = data([record(), record(image="other.png")] * 4)
    found = []
    for micro in (4, 1):
        settings = {"micro_batch_size": micro, "steps": 2, "options": {"lambda_target": 0.0}}
        settings |= {"data": str(file), "samples": None}
        adapter = run(folder, tmp_path / str(micro), **settings)
        found.append((heads(adapter), [h["loss"] for h in history(tmp_path / str(micro))]))
    (at_once, loss), (in_parts, other_loss) = found
    assert other_loss == pytest.approx(loss, rel=1e-3)
    for name, tensor in at_once.items():
        torch.testing.assert_close(in_parts[name], tensor, rtol=1e-3, atol=1e-4)
    with pytest.raises(atp_patch.ConfigError, match="batch_size 4 is no multiple"):
        run(folder, tmp_path / "odd", micro_batch_size=3)


def test_lora_learns_beside_the_heads_and_is_saved_beside_them(
    folder: Path, tmp_path: Path
) -> None:
    adapter = run(folder, tmp_path, lora_rank=2, lora_alpha=8, lr=1e-2, save_every=9)
    before = plain(folder).state_dict()
    model, inputs = plain(folder), question(folder)
    with torch.no_grad():
        bare = model(**inputs).logits
    model.load_adapter(tmp_path / "lora")
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    atp_patch.patch_model(model, weights=adapter)
    with torch.no_grad(), atp_patch.disabled(model):
        assert not torch.equal(model(**inputs).logits, bare)
    assert "LoRA of rank 2" in (adapter / "README.md").read_text(encoding="utf-8")
    with pytest.raises(atp_patch.ConfigError, match="LoRA learned beside"):
        run(folder, tmp_path / "a", adapter=str(adapter), layers=None, target_tokens=None)
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert f'load_trained(model, "{tmp_path.name}")' in card
    assert str(tmp_path.parent) not in card
    written = [f for f in (tmp_path / "lora").iterdir() if f.suffix in (".json", ".md")]
    assert written
    assert not any(str(tmp_path.parent) in f.read_text(encoding="utf-8") for f in written)


def test_the_language_model_learns_and_the_vision_tower_does_not(
    folder: Path, tmp_path: Path
) -> None:
    adapter = run(folder, tmp_path, freeze_lm=False, lr=1e-3, steps=2)
    learned, before = plain(tmp_path / "model").state_dict(), plain(folder).state_dict()
    assert set(learned) == set(before)
    same = {name for name in before if torch.equal(learned[name], before[name])}
    towers = {name for name in before if "vision_tower" in name}
    assert towers <= same
    assert not any("proj.weight" in name for name in same - towers)
    model = atp_patch.patch_model(plain(tmp_path / "model"), weights=adapter)
    AutoProcessor.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model(**question(folder))
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_the_plain_model_teaches(folder: Path, tmp_path: Path) -> None:
    """KL(plain || pruned) of the answers' tokens, by hand, before anything is learned."""
    adapter = run(folder, tmp_path, distill=0.7, steps=1, batch_size=1, samples=1, atp_lr=1e-9)
    (line,) = history(tmp_path)
    model = atp_patch.patch_model(plain(folder), weights=adapter)
    inputs = question(folder, 0)
    answer = inputs["labels"][0, 1:] != -100
    target = inputs["input_ids"][0, 1:][answer]
    with torch.no_grad():
        pruned = model.train()(**inputs).logits[0, :-1][answer]
        with atp_patch.disabled(model):
            teacher = model.eval()(**inputs).logits[0, :-1][answer].softmax(-1)
    divergence = float((teacher * (teacher.log() - pruned.log_softmax(-1))).sum(-1).mean())
    assert line["distill"] == pytest.approx(divergence, rel=1e-3)
    assert line["next_token"] == pytest.approx(float(cross_entropy(pruned, target)), rel=1e-3)
    total = line["next_token"] + 0.05 * line["atp"] + 0.2 * line["target"] + 0.7 * divergence
    assert line["loss"] == pytest.approx(total, rel=1e-3)


def test_an_adapter_learns_on(folder: Path, whole: Path, tmp_path: Path) -> None:
    again = {"adapter": str(whole / "adapter"), "layers": None, "target_tokens": None}
    run(folder, tmp_path, steps=1, atp_lr=1e-9, **again)
    start = heads(whole / "adapter")
    for name, tensor in heads(tmp_path / "adapter").items():
        torch.testing.assert_close(tensor, start[name], rtol=1e-5, atol=1e-6)
    atp_patch.save_pretrained(
        atp_patch.patch_model(plain(folder), [2], "fixed", keep=0.5), tmp_path / "fixed"
    )
    with pytest.raises(atp_patch.ConfigError, match="no learned thresholds"):
        run(folder, tmp_path / "out", **{**again, "adapter": str(tmp_path / "fixed")})


def test_the_average_is_set_to_the_target_at_the_end(folder: Path, tmp_path: Path) -> None:
    adapter = run(folder, tmp_path, steps=1, calibrate=24)
    model = atp_patch.patch_model(plain(folder), weights=adapter)
    averages = []
    for number in range(24):
        with torch.no_grad():
            model(**question(folder, number))
        averages.append(atp_patch.last_trace(model).average_tokens)
    assert sum(averages) / 24 == pytest.approx(12, rel=0.01)
    card = (adapter / "README.md").read_text(encoding="utf-8")
    told = re.search(r"calibrated on 24 of the samples: from an average of \S+ .* to (\S+)\n", card)
    assert told is not None
    assert float(told[1]) == pytest.approx(sum(averages) / 24, abs=0.1)


def test_a_target_out_of_reach_is_told_and_the_adapter_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = run(folder, tmp_path, steps=1, calibrate=4, target_tokens=9.1, layers=[2, 4, 6])
    assert "Not calibrated: target_tokens=9.1" in capsys.readouterr().err
    assert "calibrated on" not in (adapter / "README.md").read_text(encoding="utf-8")


def test_a_bad_sample_among_those_to_calibrate_on_is_told_and_the_adapter_saved(
    folder: Path, tmp_path: Path, data: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    # The one step draws another sample.
    file = data([record(image="broken.png")] + [record() for _ in range(5)])
    adapter = run(
        folder, tmp_path / "out", steps=1, batch_size=1, calibrate=6, data=str(file), samples=None
    )
    assert "Not calibrated: sample 0" in capsys.readouterr().err
    assert (adapter / "README.md").is_file()


def test_the_second_built_in_model_learns(tmp_path: Path) -> None:
    adapter = run(Path("builtin-dynamic"), tmp_path, steps=1, target_tokens=40, batch_size=2)
    model, processor = load_builtin(DYNAMIC)
    atp_patch.patch_model(model, weights=adapter)
    image = Scenes(1, DYNAMIC)[0].images[0]
    inputs = processor(images=image, text=prompt("What?", DYNAMIC), return_tensors="pt")
    with torch.no_grad():
        model(**inputs)
    trace = atp_patch.last_trace(model)
    assert trace.layers.keys() == {2, 4, 6}
    assert trace.average_tokens < trace.visual_tokens
    (step,) = history(tmp_path)
    assert 0 < step["average_tokens"] < 225


def test_progress_is_a_line_a_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, tmp_path, steps=2, batch_size=2, layers=None)
    lines = capsys.readouterr().err.splitlines()
    assert re.search(
        r"step 2/2  loss \S+  next_token \S+  atp \S+  target \S+  tokens \S+ of 36  right "
        r"\S+ / \S+  \S+ s a step",
        "\n".join(lines),
    )
    assert lines[-1] == f"Saved {tmp_path / 'adapter'}."


@pytest.fixture
def terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> pytest.CaptureFixture[str]:
    """stderr, taken for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    return capsys


def test_a_terminal_sees_a_bar_below_the_lines(
    folder: Path, tmp_path: Path, terminal: pytest.CaptureFixture[str]
) -> None:
    run(folder, tmp_path, steps=2, batch_size=2, layers=None)
    told = terminal.readouterr().err
    assert re.search(r"step 2/2  loss \S+  next_token \S+ .* right \S+ / \S+", told)
    assert "2/2" in told[told.rindex("steps") :]
    assert told.index(SHOW_CURSOR) < told.index("Saved")


def test_a_terminal_is_left_as_it_was(
    folder: Path, tmp_path: Path, data: Writer, terminal: pytest.CaptureFixture[str]
) -> None:
    file = data([record(image="broken.png")] * 4)
    with pytest.raises(InputError):
        run(folder, tmp_path, data=str(file), samples=None, steps=2)
    assert terminal.readouterr().err.endswith(SHOW_CURSOR)
