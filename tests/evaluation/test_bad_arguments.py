"""Every wrong argument: one line on stderr that names the mend, exit status 2, nothing else."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from atp_patch import evaluate
from atp_patch.commands import cli
from atp_patch.contract.errors import ConfigError
from atp_patch.evaluation import command, options


def complaint(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert evaluate.main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("Loading ")]
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("python -m atp_patch.evaluate: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--methods", "magic"], ["'magic'", "atp, fixed, fastv"]),
        (["--methods", "fastv@two"], ["fastv@two", "@1+13+25"]),
        (["--methods", "fastv@"], ["fastv@", "@1+13+25"]),
        (["--methods", "fastv@8"], ["layers=[8]", "1 to 7"]),
        (["--methods", "prumerge@2"], ["prumerge@2", "before the decoder"]),
        (["--methods", "voco"], ["voco", "trained", "--adapters"]),
        (["--layers", "4,2"], ["layers=[4, 2]", "must rise"]),
        (["--layers", "a"], ["--layers", "int"]),
        (["--budgets", "0"], ["--budgets 0", "above 0"]),
        (["--budgets", "144"], ["--budgets 144", "at most 1"]),
        (["--budgets", "half"], ["--budgets", "float"]),
        (["--tasks", "taste"], ["'taste'", "builtin, dense", "ocr"]),
        (["--tasks", "table"], ["table/cell", "ordinary words", "another --model"]),
        (["--questions", "0"], ["--questions 0", "at least 1"]),
        (["--seeds", "0"], ["--seeds 0", "at least 1"]),
        (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens 0", "at least 1"]),
        (["--max-new-tokens", "9"], ["--max-new-tokens", "--answers generate"]),
        (["--summaries", "."], ["summary.jsonl cannot be read"]),
        (["--split", "train"], ["--split", "'train'", "test"]),
        (["--option", "score"], ["--option score", "NAME=VALUE"]),
        (["--option", "colour=red"], ["'colour'", "downsample: none", "spatial_share"]),
        (["--methods", "fastv", "--option", "atp.score=self"], ["'atp.score'"]),
        (["--option", "score=best"], ["score='best'", "mean, cross, self"]),
        (["--adapters", "heads~median"], ["heads~median", "mean, shuffled"]),
        (["--adapters", "."], [". is no adapter: it has no atp_config.json"]),
        (["--model", "."], ["not a model folder", "config.json"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--speed"], ["--speed"]),
        (["--out", "a\0b"], ["an argument", "no text"]),
        (["--model", "a\ud800b"], ["an argument", "no text"]),
        (["--adapters", "a\0b"], ["an argument", "no text"]),
        (["--summaries", "a\0b"], ["an argument", "no text"]),
        (["--out", "a" * 5_000], ["File name too long"]),
        (["--option", "score=" + "[" * 100_000], ["score="]),
    ],
)
def test_arguments(
    options: list[str],
    parts: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--model", folder, "--no-plots", "--questions", 2, "--tasks", "exist", *options]
    error = complaint(capsys, *argv)
    for part in parts:
        assert part in error
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out"
    path.touch()
    assert "is a file" in complaint(capsys, "--model", folder, "--out", path)
    assert "can be written" in complaint(capsys, "--model", folder, "--out", path / "deeper")


@pytest.mark.parametrize("text", ["1", "[" * 100_000, '{"layers": 1, "seeds": 2}', "9" * 5_000])
def test_a_summary_that_is_none(
    text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.jsonl").write_text(text, encoding="utf-8")
    given = ("--model", folder, "--no-plots", "--summaries", tmp_path, "--out", tmp_path)
    assert "summary.jsonl cannot be read" in complaint(capsys, *given)


def test_earlier_results_outlive_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = options.parser().parse_args(["--out", str(tmp_path), "--no-plots"])
    command.write([], args)
    before = (tmp_path / "table.md").read_bytes()
    write = Path.write_text

    def full(self: Path, text: str, **kwargs: str) -> int:
        write(self, text[:10], **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        command.write([], args)
    assert (tmp_path / "table.md").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.jsonl", "table.md"]


def test_answers_are_forced_with_the_built_in_tokenizer_alone(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "word_ids", dict)
    error = complaint(
        capsys, "--model", folder, "--no-plots", "--answers", "forced", "--out", tmp_path
    )
    assert "--answers generate" in error


def test_plots_need_a_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "atp-patch[eval]" in complaint(capsys)


def test_it_is_a_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--questions", "0"]) == 2
    assert "--questions 0" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--help"]) == 0
    assert "--budgets" in capsys.readouterr().out
