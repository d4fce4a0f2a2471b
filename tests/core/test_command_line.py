"""What all command lines have in common."""

from __future__ import annotations

import errno
import importlib
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from atp_patch.commands.cli import COMMANDS, usage
from atp_patch.contract.errors import ConfigError
from atp_patch.tools import loading
from atp_patch.tools.arguments import DTYPES, Parser, add_output, comma_separated, named_values
from atp_patch.tools.command_line import execute, progress_bar
from atp_patch.tools.files import check_folder, parse_json, replaced, write_text
from atp_patch.tools.trained import shipped

# command -> arguments that are well formed, and what to replace so that nothing is done
ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "demo": (["a.png", "Why?"], "atp_patch.commands.demo.check"),
    "serve": ([], "atp_patch.commands.serve.run"),
    "calibrate": ([], "atp_patch.commands.calibrate.run"),
    "push": (["training", "ann/adapter"], "atp_patch.commands.push.push_folder"),
    "train": ([], "atp_patch.training.command.train"),
    "evaluate": ([], "atp_patch.evaluation.command.check"),
    "evidence": ([], "atp_patch.evaluation.evidence_command.needs"),
    "convert": (["llava", "a", "b"], "atp_patch.convert.__main__.plan_for"),
    "bench": ([], "atp_patch.bench.__main__.run"),
}


def outcome(error: BaseException | None, capsys: Any) -> tuple[int, str]:
    """Status and what was said of a command whose work ends so."""

    def work(_: object) -> None:
        if error is not None:
            raise error

    status = execute(Parser("prog"), work, [], memory="buy some.", stopped="stopped; go on.")
    return status, capsys.readouterr().err


def test_a_status_and_a_line_for_each_end(capsys: Any) -> None:
    assert outcome(None, capsys) == (0, "")
    assert outcome(ConfigError("no\n  such thing."), capsys) == (2, "prog: no such thing.\n")
    assert outcome(KeyboardInterrupt(), capsys) == (130, "prog: stopped; go on.\n")
    for error in (torch.OutOfMemoryError("CUDA"), MemoryError()):
        assert outcome(error, capsys) == (2, "prog: out of memory; buy some.\n")


def test_cpus_out_of_memory(capsys: Any) -> None:
    """Torch's own error, from an allocation that no machine can make."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**58, dtype=torch.uint8)
    assert outcome(raised.value, capsys) == (2, "prog: out of memory; buy some.\n")


def test_other_errors_are_not_hidden(capsys: Any) -> None:
    for bug in (
        RuntimeError("a bug"),
        OSError("a bug"),
        FileNotFoundError(errno.ENOENT, "a bug"),
        RecursionError("a bug"),
        ValueError("a bug"),
    ):
        with pytest.raises(type(bug), match="a bug"):
            outcome(bug, capsys)


def test_what_the_system_refuses_is_one_line(capsys: Any) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "a/b\n.json")
    line = "prog: No space left on device (a/b .json); make room on the disk.\n"
    assert outcome(full, capsys) == (2, line)
    rust = SafetensorError("Error while serializing: I/O error: (os error 28)")
    assert outcome(rust, capsys) == (2, "prog: No space left on device; make room on the disk.\n")
    for code in (errno.EACCES, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS):
        status, line = outcome(OSError(code, "said", "some/where"), capsys)
        assert status == 2
        assert "(some/where); give another path" in line


WRITES = """
import sys, torch
from atp_patch.tools.arguments import Parser
from atp_patch.tools.command_line import execute
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
work = lambda _: torch.save(torch.zeros(100_000), sys.argv[1])
sys.exit(execute(Parser("prog"), work, [], memory=""))
"""


def test_torch_that_cannot_write_a_file_is_one_line(tmp_path: Path) -> None:
    """Torch has no exception of its own for it: a real limit shows what it raises."""
    command = [sys.executable, "-c", WRITES, str(tmp_path / "a.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "prog: torch could not write a file to its end; make room on the disk.\n"


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "\udcff"])
def test_arguments_that_are_no_text_are_refused_before_the_work(text: str, capsys: Any) -> None:
    parser = Parser("prog")
    parser.add_argument("--out")
    assert execute(parser, pytest.fail, ["--out", text], memory="") == 2
    said = capsys.readouterr().err
    assert said.startswith("prog: an argument holds the character '")
    assert said.count("\n") == 1
    assert said.isascii()
    assert execute(parser, pytest.fail, [f"--{text}"], memory="") == 2  # unknown, and printed
    assert capsys.readouterr().err.count("\n") == 1


def test_options_that_are_no_json_are_words() -> None:
    digits, deep = "9" * 5_000, "[" * 100_000
    given = named_values(["a=1", "b=[1, 2]", "c=word", f"d={digits}", f"e={deep}"])
    assert given == {"a": 1, "b": (1, 2), "c": "word", "d": digits, "e": deep}


def test_deep_json_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="Expecting"):
        parse_json("{")


def break_off(path: Path, folder: bool) -> None:
    """Begin to write something, and fail."""
    with replaced(path) as scratch:
        if folder:
            scratch.mkdir()
        file = scratch / "half" if folder else scratch
        file.write_text("half")
        raise OSError("full")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    write_text(file, "one")
    link.symlink_to(file)
    with pytest.raises(OSError, match="full"):
        break_off(link, folder=False)
    assert (file.read_text(), len(list(tmp_path.iterdir()))) == ("one", 2)
    write_text(link, "two")
    assert (file.read_text(), link.is_symlink()) == ("two", True)
    with pytest.raises(OSError, match="full"):
        break_off(tmp_path / "folder", folder=True)
    with replaced(tmp_path / "folder") as scratch:
        scratch.mkdir()
        (scratch / "whole").touch()
    assert (tmp_path / "folder" / "whole").is_file()
    assert len(list(tmp_path.iterdir())) == 3
    with replaced(Path("/dev/null")) as device:
        assert device == Path("/dev/null")


def test_scratch_of_killed_processes_is_removed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from atp_patch.tools.files import replaced\n"
        "from atp_patch.scratch import scratch_folder\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with replaced(path / 'a.json') as file, scratch_folder(path / 'b') as folder:\n"
        "    file.write_text('half')\n"
        "    (folder / 'half').touch()\n"
        "    print('written', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    (tmp_path / "kept.txt").touch()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        elsewhere = tmp_path / ".atp_patch-another_computer-1-0a1b2c3d.json"
        elsewhere.touch()
        write_text(tmp_path / "a.json", "whole")
        assert len(list(tmp_path.iterdir())) == 5, "the scratch of a running process was removed"
        writer.kill()
    write_text(tmp_path / "a.json", "whole again")
    left = {elsewhere, tmp_path / "kept.txt", tmp_path / "a.json"}
    assert set(tmp_path.iterdir()) == left


def test_a_folder_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "deep", "--out")
    check_folder(Path("relative"), "--out")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ConfigError, match=r"--out: .*file is a file; give a folder"):
            check_folder(path, "--out")


def test_an_error_of_a_worker_process_is_its_message(capsys: Any) -> None:
    error = ConfigError("Caught ConfigError in DataLoader worker process 0.\nfile, line\nE: bad.")
    assert outcome(error, capsys) == (2, "prog: E: bad.\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_alike(
    name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = importlib.import_module(COMMANDS[name].module).main
    given, replaced = ARGUMENTS[name]
    assert main([*given, "--no-such-flag"], f"atp-patch {name}") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"atp-patch {name}: ")
    prog = importlib.import_module(COMMANDS[name].options).PROG
    for error, status in ((KeyboardInterrupt(), 130), (torch.OutOfMemoryError(), 2)):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(replaced, fail)
        assert main(given) == status
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith(f"{prog}: ")


def help_of(name: str) -> str:
    parser = importlib.import_module(COMMANDS[name].options).parser(f"atp-patch {name}")
    text: str = parser.format_help()
    return text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_grouped_with_an_example_and_exit_statuses(name: str) -> None:
    text = help_of(name)
    assert f"example:\n  atp-patch {name} " in text
    assert "exit status: 0 " in text
    assert "\noutput:\n  --quiet " in text
    assert "--json" in text
    assert f"  {name} " in usage()


def test_the_same_option_is_called_the_same() -> None:
    """Each flag has one kind of value and one explanation, in all commands that have it."""
    own = {
        "--methods",  # of bench, which takes fewer
        "--model",  # whose default differs
        "--port",  # likewise
        "--questions",
        "--seeds",
        "--split",
        "--tasks",
        "--json",  # which says what is printed
        "--seed",  # what is drawn
        "--out",  # what is written
        "--keep",  # one share, or several
        "--token",
        "--samples",
        "--images",
        "--batch-size",
        "--max-new-tokens",
        "--revision",
    }
    said: dict[str, dict[str, str]] = {}
    for name in COMMANDS:
        if name == "train":  # whose flags are its settings, with their own words for YAML
            continue
        parser = importlib.import_module(COMMANDS[name].options).parser()
        for action in parser._actions:
            for flag in action.option_strings:
                said.setdefault(flag, {})[name] = f"{action.metavar} {action.help}"
    different = {f: by for f, by in said.items() if len(set(by.values())) > 1 and f not in own}
    assert different == {}


def test_old_words_of_training_still_work() -> None:
    from atp_patch.training.options import flags_of, parser

    old = flags_of(parser().parse_args(["--adapter", "a", "--keep", "1"]))
    new = flags_of(parser().parse_args(["--weights", "a", "--keep-checkpoints", "1"]))
    assert old == new == {"adapter": "a", "keep": "1"}


def test_quiet_is_silent_but_for_errors(capsys: Any) -> None:
    def work(_: object) -> None:
        sys.stderr.write("loading\n")
        warnings.warn("a warning", stacklevel=1)
        sys.stdout.write("result\n")
        raise ConfigError("no such thing.")

    parser = Parser("prog")
    add_output(parser, "all")
    assert execute(parser, work, ["--quiet"], memory="") == 2
    found = capsys.readouterr()
    assert (found.out, found.err) == ("result\n", "prog: no such thing.\n")


def test_a_bar_vanishes_where_there_is_no_terminal(capsys: Any) -> None:
    with progress_bar("tensors", 3) as advance:
        advance(3)
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "")


def test_names_without_torch_are_those_with_it() -> None:
    assert set(DTYPES) == set(loading.DTYPES)
    text = help_of("demo")
    assert all(name in text for name in shipped())


def test_lists_are_named_in_errors(capsys: Any) -> None:
    parser = Parser("prog")
    parser.add_argument("--layers", type=comma_separated(int))
    assert parser.parse_args(["--layers", "4,14"]).layers == [4, 14]
    assert execute(parser, print, ["--layers", "4,x"], memory="") == 2
    assert "invalid comma-separated int list value: '4,x'" in capsys.readouterr().err
