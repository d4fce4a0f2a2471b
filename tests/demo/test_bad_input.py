"""Every wrong input: one line on stderr that names the mend, exit status 2, nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from atp_patch import supported_families
from atp_patch.commands import demo
from atp_patch.visualize import Drawing

QUESTION = "How many red shapes are there?"


def complaint(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a demo run leaves."""
    capsys.readouterr()
    status = demo.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def broken_image(kind: str, folder: Path) -> Path:
    """A path that leads to no image."""
    path = folder / "image.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("How now, brown cow?")
    elif kind == "empty":
        path.touch()
    elif kind.startswith("truncated"):
        form = kind.split()[1]
        Image.effect_noise((200, 200), 90).convert("RGB").save(path, form)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "long name":
        return folder / ("a" * 300 + ".png")
    elif kind == "beneath a file":
        path.touch()
        return path / "image.png"
    return path


@pytest.mark.parametrize(
    ("kind", "mend"),
    [
        ("missing", "check the path"),
        ("folder", "give the path of an image file"),
        ("text", "give a PNG or a JPEG"),
        ("empty", "give a PNG or a JPEG"),
        ("truncated JPEG", "whole"),
        ("truncated PNG", "whole"),
        ("long name", "give an image file"),
        ("beneath a file", "give an image file"),
    ],
)
def test_image(kind: str, mend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken_image(kind, tmp_path)
    error = complaint(capsys, path, QUESTION)
    assert str(path) in error
    assert mend in error


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--method", "magic"], ["'magic'", "atp", "fixed", "fastv", "random", "uniform"]),
        (["--layers", "0"], ["layers=[0]", "layers=[4, 14, 24]"]),
        (["--layers", "4,32"], ["layers=[4, 32]", "1 to 31"]),
        (["--layers", "4,-1"], ["layers=[4, -1]", "1 to 31"]),
        (["--layers", "14,4"], ["must rise"]),
        (["--layers", "four"], ["--layers", "'four'", "int"]),
        (["--target-tokens", "-5"], ["-5", "above 0"]),
        (["--target-tokens", "nan"], ["nan", "finite"]),
        (["--target-tokens", "10"], ["10", "least possible"]),
        (["--keep", "-0.5"], ["-0.5", "above 0"]),
        (["--keep", "1.5"], ["1.5", "at most 1"]),
        (["--keep", "0.5,0.5"], ["2 shares for 3"]),
        (["--keep", "0.5", "--target-tokens", "144"], ["--keep", "--target-tokens", "one of them"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens 0", "at least 1"]),
        (["--device", "toaster"], ["--device toaster", "give cpu"]),
        (["--device", "meta"], ["--device meta", "give cpu"]),
        (["--device", "cuda:99"], ["--device cuda:99", "give cpu"]),
        (["--dtype", "int4"], ["'int4'", "float32"]),
        (["--weights", "no/such/adapter"], ["no/such/adapter"]),
        (["--weights", "a" * 300], ["neither a folder nor the name of a repository", "check it"]),
        (["--target-tokens", "1e30"], ["1e+30", "at most"]),
        (["--colour", "red"], ["--colour", "--help"]),
        (["--seed", "x"], ["--seed", "int"]),
        (["--seed", "9" * 30], ["--seed", "int"]),
        (["--overlay", "a\0b.png"], ["an argument", "no text"]),
        (["--overlay", "a\ud800b.png"], ["an argument", "no text"]),
        (["--weights", "a\0b"], ["an argument", "no text"]),
    ],
    ids=" ".join,
)
def test_options(
    options: list[str],
    parts: list[str],
    scene: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = complaint(capsys, scene, QUESTION, "--model", checkpoint, *options)
    for part in parts:
        assert part in error


@pytest.mark.parametrize("question", ["", "  \n"])
def test_question(question: str, scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "ask something" in complaint(capsys, scene, question)


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "\udcff"])
def test_names_that_are_no_text(text: str, scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ((text, QUESTION), (scene, text), (scene, QUESTION, "--model", text)):
        assert "an argument holds the character" in complaint(capsys, *given)


def test_arguments_missing(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "QUESTION" in complaint(capsys, scene)


def broken_model(kind: str, folder: Path, checkpoint: Path) -> Path:
    """A path that leads to no supported model."""
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 30}
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("weights")
    elif kind == "bert":
        BertModel(BertConfig(num_hidden_layers=2, **tiny)).save_pretrained(folder)
    elif kind == "llama":
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **tiny)).save_pretrained(folder)
    elif kind != "missing":
        folder.mkdir()
        wanted = {
            "config": "{",
            "unknown type": '{"model_type": "perceptron"}',
            "no type": "{}",
            "deep": "[" * 100_000 + "]" * 100_000,
            "architectures": '{"model_type": "llava", "architectures": [["x"]]}',
            "one architecture": '{"model_type": "llava", "architectures": 5}',
            "no heads": '{"model_type": "llava", "text_config": {"num_attention_heads": 0}}',
            "wrong kind": '{"model_type": "llava", "text_config": 5}',
            "no number": '{"model_type": "llava", "text_config": {"hidden_size": NaN}}',
        }
        if kind == "tokenizer":
            for file in checkpoint.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            (folder / "tokenizer.json").write_text("[" * 100_000)
        config = wanted.get(kind, (checkpoint / "config.json").read_text())
        (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("kind", "mend"),
    [
        ("missing", "check --model"),
        ("empty", "no config.json"),
        ("file", "model folder"),
        ("bert", "supported are: "),
        ("llama", "supported are: "),
        ("config", "configuration"),
        ("unknown type", "perceptron"),
        ("no type", "model_type"),
        ("no processor", "processor"),
        ("tokenizer", "has no processor"),
        ("deep", "nested too deeply"),
        ("architectures", ""),
        ("one architecture", ""),
        ("no heads", "configuration that can be read"),
        ("wrong kind", "configuration that can be read"),
        ("no number", "configuration that can be read"),
    ],
)
def test_model(
    kind: str,
    mend: str,
    scene: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = broken_model(kind, tmp_path / "model", checkpoint)
    error = complaint(capsys, scene, QUESTION, "--model", folder)
    assert mend in error
    if kind in ("bert", "llama"):
        known = (name for names in supported_families().values() for name in names)
        assert all(name in error for name in known)
    else:
        assert str(folder) in error


def test_layers_are_checked_before_weights_are_read(
    scene: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 20
    (tmp_path / "config.json").write_text(json.dumps(config))  # there are no weights
    given = ("--model", tmp_path, "--layers", "4,14,24")
    error = complaint(capsys, scene, QUESTION, *given)
    assert "layers 1 to 19" in error
    assert "layers=[2, 9, 15]" in error


@pytest.mark.parametrize("kind", ["folder", "no parent", "no image format", "the image", "long"])
def test_overlay(
    kind: str, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = {
        "folder": tmp_path,
        "no parent": tmp_path / "none" / "o.png",
        "no image format": tmp_path / "o.txt",
        "the image": scene,
        "long": tmp_path / ("a" * 300 + ".png"),
    }[kind]
    before = scene.read_bytes()
    assert "--overlay" in complaint(capsys, scene, QUESTION, "--overlay", path)
    assert scene.read_bytes() == before


def test_overlay_that_fails_when_written(
    scene: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Drawing, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Drawing, "save", full)
    path = tmp_path / "o.png"
    path.write_bytes(b"an earlier picture")
    status = demo.main([str(scene), QUESTION, "--model", str(checkpoint), "--overlay", str(path)])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert "No space left on device" in err.splitlines()[-1]
    assert "give another file" in err.splitlines()[-1]
    assert path.read_bytes() == b"an earlier picture"
    assert list(tmp_path.iterdir()) == [path]


def test_overlay_without_matplotlib(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = complaint(capsys, scene, QUESTION, "--overlay", tmp_path / "o.png")
    assert "pip install 'atp-patch[visualize]'" in told


def test_without_rich(
    scene: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "atp-patch[demo]" in complaint(capsys, scene, QUESTION)


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "atp_patch.demo", str(tmp_path / "none.png"), QUESTION],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "none.png" in done.stderr
