"""The command line pushes adapters, loads them, and shows what an evaluation measured of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import atp_patch
from atp_patch.commands import push
from atp_patch.commands.demo_options import parser
from atp_patch.commands.pruning_options import trained
from atp_patch.evaluation import command as evaluate
from atp_patch.evaluation import options as evaluate_options
from atp_patch.evaluation.adapters import recipes
from atp_patch.evaluation.card import results_of
from atp_patch.evaluation.identity import adapter_hash
from atp_patch.patching.adapter_card import KEEPS
from atp_patch.training import command as train
from tests.helpers.hub import LoopbackHub
from tests.helpers.tiny import tiny_model
from tests.hub.conftest import TOKEN
from tests.hub.test_loading import CONFIG, KIND, LAYERS, NAME, keeping


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = atp_patch.patch_model(tiny_model(KIND), LAYERS, "fastv", keep=0.5)
    atp_patch.save_pretrained(model, tmp_path / "mine")
    return tmp_path / "mine"


def summary(out: Path, hashes: Any, **change: Any) -> Path:
    """A folder as an evaluation leaves it, with the unpruned model, one adapter and a control."""
    plain = {
        "method": "unpruned",
        "group": "builtin",
        "visual_tokens": 576.0,
        "average_tokens": 576.0,
        "mean_accuracy": [0.98, 0.97, 0.99],
        "retention": [1.0, 1.0, 1.0],
        "questions": {"count": 500, "shape": 300},
        "adapter_hash": None,
        "model": "builtin",
        "split": "test",
        "dtype": "float32",
        "device": "cpu",
        "date": "2026-11-22",
        "versions": {"atp_patch": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    mine = {
        **plain,
        "method": "adapter mine",
        "average_tokens": 144.0,
        "mean_accuracy": [0.9604, 0.9512, 0.9698],
        "retention": [0.98, 0.975, 0.985],
        "adapter_hash": hashes,
        **change,
    }
    control = {**mine, "control": "mean", "retention": [0.5, 0.4, 0.6]}
    out.mkdir()
    lines = [json.dumps(row) + "\n" for row in (plain, mine, control)]
    (out / "summary.jsonl").write_text("".join(lines))
    return out


def test_pushed_by_command(hub: LoopbackHub, folder: Path, capsys: Any) -> None:
    results = summary(folder.parent / "measured", adapter_hash(str(folder)))
    argv = [str(folder), NAME, "--token", TOKEN, "--license", "apache-2.0", "--json", "--private"]
    assert push.main([*argv, "--results", str(results), "--message", "First."]) == 0
    told = json.loads(capsys.readouterr().out)
    commit = hub.repositories[NAME].branches["main"]
    assert told == {"repository": NAME, "commit": f"{hub.url}/{NAME}/commit/{commit}"}
    assert hub.repositories[NAME].messages[commit] == "First."
    assert hub.repositories[NAME].private
    card = hub.files(NAME)["README.md"].decode()
    assert "license: apache-2.0" in card
    row = "| builtin, 800 | 144.0 of 576 (25.0 %) | 96.0 [95.1, 97.0] %; unpruned 98.0 % | 98.0"
    assert f"{KEEPS}\n\n| questions |" in card
    assert f"{row} [97.5, 98.5] % |" in card
    assert "50.0" not in card


def test_a_refused_push_is_one_line(hub: LoopbackHub, folder: Path, capsys: Any) -> None:
    assert push.main([str(folder), NAME, "--token", "hf_nobodys"], "atp-patch push") == 2
    said = capsys.readouterr().err
    assert said.startswith("atp-patch push: ")
    assert "does not know this token" in said
    assert said.count("\n") == 1


def test_results_of_another_adapter_are_not_shown(folder: Path, tmp_path: Path) -> None:
    own = adapter_hash(str(folder))
    for number, (hashes, error) in enumerate(
        [("0" * 12, "has no results of the adapter"), (None, "has no results"), ([own, "0"], None)]
    ):
        out = summary(tmp_path / str(number), hashes)
        if error is None:
            assert "Mean over 2 trainings, of which this is one." in results_of(folder, out)
            continue
        with pytest.raises(atp_patch.ConfigError, match=error):
            results_of(folder, out)
    with pytest.raises(atp_patch.ConfigError, match=r"summary\.jsonl cannot be read"):
        results_of(folder, tmp_path)


def test_the_demo_finds_an_adapter_on_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    first = hub.add(NAME, {f"kept/{CONFIG}": keeping(0.3)[CONFIG]}, private=True)
    hub.add(NAME, {f"kept/{CONFIG}": keeping(0.6)[CONFIG]}, private=True)

    def found(*more: str) -> str:
        result = trained(parser().parse_args(["a.png", "Why?", *more]))
        assert result is not None
        return (Path(result.adapter) / CONFIG).read_text()

    where = ["--subfolder", "kept", "--token", TOKEN, "--cache-dir", str(tmp_path / "here")]
    assert json.loads(found("--weights", NAME, *where))["keep"][0] == 0.6
    assert json.loads(found("--weights", NAME, *where, "--revision", first))["keep"][0] == 0.3
    assert json.loads(found("--weights", f"{NAME}@{first}", *where))["keep"][0] == 0.3
    hub.requests.clear()
    assert json.loads(found("--weights", NAME, *where, "--local-files-only"))["keep"][0] == 0.6
    assert hub.requests == []
    with pytest.raises(atp_patch.ConfigError, match="--revision goes with --weights"):
        trained(parser().parse_args(["a.png", "Why?", "--revision", "main"]))


def test_an_evaluation_reads_a_revision_with_a_token(hub: LoopbackHub, tmp_path: Path) -> None:
    first = hub.add(NAME, keeping(0.3), private=True)
    last = hub.add(NAME, keeping(0.6), private=True)
    hub_flags = ["--token", TOKEN, "--cache-dir", str(tmp_path / "here")]

    def found(name: str, *more: str) -> float:
        args = evaluate_options.parser().parse_args(["--adapters", name, *hub_flags, *more])
        [recipe] = recipes(args.adapters, evaluate_options.hub_of(args))
        text = (Path(recipe.trainings[0]) / CONFIG).read_text()
        return float(json.loads(text)["keep"][0])

    assert found(NAME) == 0.6
    assert found(NAME, "--revision", first) == 0.3
    assert found(f"{NAME}@{first}") == 0.3
    assert found(f"{NAME}@{first}", "--revision", last) == 0.3  # a name's own revision stands
    hub.requests.clear()
    assert found(NAME, "--local-files-only") == 0.6
    assert hub.requests == []


def test_the_commands_hand_on_what_the_hub_needs(
    hub: LoopbackHub, tmp_path: Path, capsys: Any
) -> None:
    hub.add(NAME, keeping(0.3), private=True)
    where = ["--out", str(tmp_path / "out")]
    evaluation = ["--no-plots", "--adapters", NAME, "--token", "hf_nobodys", *where]
    assert evaluate.main(evaluation) == 2
    assert "does not know this token" in capsys.readouterr().err
    training = ["--weights", NAME, "--token", TOKEN, "--revision", "nowhere", *where]
    assert train.main(training) == 2
    assert "has no revision 'nowhere'" in capsys.readouterr().err


def test_a_training_starts_from_a_revision_and_no_file_names_a_token(
    hub: LoopbackHub, tmp_path: Path, capsys: Any
) -> None:
    first = hub.add(NAME, keeping(0.3), private=True)  # of a model with 8 layers
    hub.add(NAME, {"README.md": b"No adapter any more."}, private=True)
    where = ["--out", str(tmp_path / "out"), "--token", TOKEN]
    assert train.main(["--weights", NAME, *where, "--revision", first]) == 2
    assert "this model is a llava model of 32 layers" in capsys.readouterr().err
    assert train.main(["--revision", first, *where]) == 2
    assert "it goes with adapter" in capsys.readouterr().err
    file = tmp_path / "settings.yaml"
    file.write_text(f"token: {TOKEN}\n")
    assert train.main([str(file)]) == 2
    assert "there is no setting 'token'" in capsys.readouterr().err
    assert evaluate.main(["--no-plots", "--revision", first]) == 2
    assert "--revision goes with --adapters" in capsys.readouterr().err
