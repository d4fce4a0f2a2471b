"""What all command lines have in common."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from atp_patch.commands.cli import COMMANDS
from atp_patch.contract.errors import ConfigError
from atp_patch.tools.command_line import OneLineParser, comma_separated, execute

# command -> arguments that are well formed, and what to replace so that nothing is done
ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "demo": (["a.png", "Why?"], "atp_patch.commands.demo.check"),
    "train": ([], "atp_patch.training.command.train"),
    "evaluate": ([], "atp_patch.evaluation.command.check"),
    "convert": (["llava", "a", "b"], "atp_patch.convert.__main__.plan_for"),
    "bench": ([], "atp_patch.bench.__main__.run"),
}


def outcome(error: BaseException | None, capsys: Any) -> tuple[int, str]:
    """Status and what was said of a command whose work ends so."""

    def work(_: object) -> None:
        if error is not None:
            raise error

    status = execute(OneLineParser("prog"), work, [], memory="buy some.", stopped="stopped; go on.")
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
    with pytest.raises(RuntimeError, match="a bug"):
        outcome(RuntimeError("a bug"), capsys)


def test_an_error_of_a_worker_process_is_its_message(capsys: Any) -> None:
    error = ConfigError("Caught ConfigError in DataLoader worker process 0.\nfile, line\nE: bad.")
    assert outcome(error, capsys) == (2, "prog: E: bad.\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_alike(
    name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = importlib.import_module(COMMANDS[name][0]).main
    given, replaced = ARGUMENTS[name]
    assert main(["--help"]) == 0
    capsys.readouterr()
    assert main([*given, "--no-such-flag"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"python -m atp_patch.{name}: ")
    for error, status in ((KeyboardInterrupt(), 130), (torch.OutOfMemoryError(), 2)):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(replaced, fail)
        assert main(given) == status
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith(f"python -m atp_patch.{name}: ")


def test_lists_are_named_in_errors(capsys: Any) -> None:
    parser = OneLineParser("prog")
    parser.add_argument("--layers", type=comma_separated(int))
    assert parser.parse_args(["--layers", "4,14"]).layers == [4, 14]
    assert execute(parser, print, ["--layers", "4,x"], memory="") == 2
    assert "invalid comma-separated int list value: '4,x'" in capsys.readouterr().err
