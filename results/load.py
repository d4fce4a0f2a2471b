"""Loads a server of OpenAI's API with clients that ask about pictures, and prints how it went.

    python results/load.py --clients 16 --seconds 300 --serve "--method plain" --serve "--keep 0.5"
    python results/load.py --clients 16 --seconds 300 --url http://127.0.0.1:8000/v1 --model NAME

The first form starts `atp-patch serve` with each of the given options, one after the other. The
second form loads a server that is running already, of whatever kind.

Before the load each question is asked once, alone. Under load each client asks the next question as
soon as its last one is answered, and an answer that differs from the one given alone is counted.
Answers are streamed and greedy. The clients run on the same machine and share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from atp_patch.builtin import make_scene

SAMPLE_SECONDS = 5.0
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Run:
    """What was measured under load.

    Attributes:
        seconds: from the first request to the last answer.
        first_ms: of each answer, the time from the request to its first text.
        whole_ms: of each answer, the time from the request to its end.
        errors: what went wrong, one for each request that was not answered.
        different: how many answers were not those given alone.
        memory_mib: the server's resident memory, every few seconds.
        cpu_seconds: the time that the server's process computed.
    """

    seconds: float = 0.0
    first_ms: list[float] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    different: int = 0
    memory_mib: list[float] = field(default_factory=list)
    cpu_seconds: float | None = None


def main() -> None:
    """Run the command line."""
    parse = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parse.add_argument("--clients", type=int, default=16)
    parse.add_argument("--seconds", type=float, default=300.0)
    parse.add_argument("--questions", type=int, default=64, help="different ones (default: 64)")
    parse.add_argument("--max-tokens", type=int, default=16, help="of an answer (default: 16)")
    parse.add_argument("--serve", action="append", default=[], metavar="OPTIONS")
    parse.add_argument("--url", help="of a running server, with /v1 at its end")
    parse.add_argument("--model", help="what the running server calls its model")
    parse.add_argument("--pid", type=int, help="of the running server, to read its memory")
    args = parse.parse_args()
    if bool(args.serve) == bool(args.url):
        parse.error("give --serve once or more, or --url")
    asked = [question(number) for number in range(args.questions)]
    print(
        f"{args.clients} clients for {args.seconds:g} s, {args.questions} questions, {machine()}\n"
    )
    print(
        "| server | answers | a second | CPU ms an answer | first text, ms (95 %) "
        "| whole answer, ms (95 %) | errors | other answers | memory, MiB: first, last, most |"
    )
    print("|---" * 9 + "|")
    for options in args.serve:
        with started(options) as (server, told):
            found = asyncio.run(load(args, asked, told["url"], told["model"], server.pid))
        print(row(options, found), flush=True)
    if args.url:
        print(row(args.url, asyncio.run(load(args, asked, args.url, args.model, args.pid))))


def question(number: int) -> list[dict[str, Any]]:
    """Make the messages of a question about a picture of its own."""
    scene = make_scene("test", number)
    buffer = BytesIO()
    scene.image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    text = scene.questions[number % len(scene.questions)].text
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@contextmanager
def started(options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run `atp-patch serve` inside this context; yields the process and what it said of itself."""
    command = [sys.executable, "-m", "atp_patch", "serve", "--port", "0", "--json"]
    server = subprocess.Popen([*command, *shlex.split(options)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            sys.exit(f"the server ended with status {server.wait()}")
        yield server, json.loads(line)
    finally:
        server.terminate()
        server.wait()


async def load(
    args: argparse.Namespace,
    asked: Sequence[list[dict[str, Any]]],
    url: str,
    model: str,
    pid: int | None,
) -> Run:
    """Ask everything once, then load the server with all clients."""
    found = Run()
    async with AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=600) as client:

        async def answer(messages: list[dict[str, Any]]) -> tuple[str, float, float]:
            start, first, text = time.perf_counter(), None, ""
            chunks: Any = await client.chat.completions.create(
                model=model,
                messages=messages,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=args.max_tokens,
                stream=True,
            )
            async for chunk in chunks:
                more = chunk.choices[0].delta.content if chunk.choices else None
                if more and first is None:
                    first = time.perf_counter()
                text += more or ""
            end = time.perf_counter()
            return text, 1000 * ((first or end) - start), 1000 * (end - start)

        alone = [(await answer(messages))[0] for messages in asked]
        numbers = itertools.count()
        start = time.perf_counter()

        async def ask_on() -> None:
            while time.perf_counter() - start < args.seconds:
                number = next(numbers) % len(asked)
                try:
                    text, first, whole = await answer(asked[number])
                except OpenAIError as error:
                    found.errors.append(str(error))
                    continue
                found.first_ms.append(first)
                found.whole_ms.append(whole)
                found.different += text != alone[number]
            found.seconds = time.perf_counter() - start

        computed = None if pid is None else cpu_seconds(pid)
        watching = asyncio.create_task(watch(pid, found.memory_mib))
        await asyncio.gather(*(ask_on() for _ in range(args.clients)))
        watching.cancel()
        if computed is not None:
            found.cpu_seconds = cpu_seconds(pid) - computed
    return found


def cpu_seconds(pid: int) -> float:
    """The time that a process has computed since it began, on all cores together."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def watch(pid: int | None, memory_mib: list[float]) -> None:
    """Note the resident memory of a process, in MiB, every few seconds."""
    while pid is not None:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        memory_mib.append(pages * PAGE_MIB)
        await asyncio.sleep(SAMPLE_SECONDS)


def row(name: str, run: Run) -> str:
    """Write a row of the table."""
    memory, answers = "-", len(run.whole_ms)
    if run.memory_mib:
        memory = ", ".join(
            f"{mib:.0f}" for mib in (run.memory_mib[0], run.memory_mib[-1], max(run.memory_mib))
        )
    cells = [
        name,
        str(answers),
        f"{answers / run.seconds:.2f}" if answers else "-",
        "-" if run.cpu_seconds is None else f"{1000 * run.cpu_seconds / max(answers, 1):.0f}",
        times(run.first_ms),
        times(run.whole_ms),
        str(len(run.errors)) + (f" ({run.errors[0]})" if run.errors else ""),
        str(run.different),
        memory,
    ]
    return f"| {' | '.join(cells)} |"


def times(values: Sequence[float]) -> str:
    """The median, and in brackets the value below which 95 % lie."""
    if len(values) < 2:
        return "-"
    return f"{statistics.median(values):.0f} ({statistics.quantiles(values, n=20)[-1]:.0f})"


def machine() -> str:
    """The processor, its cores, and how busy it is before the load."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((ln.partition(":")[2].strip() for ln in lines if "model name" in ln), "")
    busy = os.getloadavg()[0]
    return f"{name or platform.machine()}, {os.cpu_count()} cores, load before {busy:.1f}"


if __name__ == "__main__":
    main()
