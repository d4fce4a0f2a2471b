"""`atp-patch serve` as a process of its own, asked over HTTP by OpenAI's client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from atp_patch import patch_model
from atp_patch.builtin import DYNAMIC, LLAVA, builtin_path, load_builtin, make_scene
from atp_patch.builtin.models import as_shown
from atp_patch.integrations.chat import ChatModel, Generation
from atp_patch.tools.trained import load_trained
from tests.integrations.test_serving import data_url
from tests.repo.code_blocks import ROOT, blocks

pytestmark = pytest.mark.slow
QUESTIONS, CLIENTS = 24, 16


@contextmanager
def server(
    *options: str, stderr: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process, and what it says of itself when it is ready."""
    command = [sys.executable, "-m", "atp_patch", "serve", "--port", "0", "--json", *options]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": stderr}
    with subprocess.Popen(command, text=True, **streams) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.terminate()


@contextmanager
def client_of(told: dict[str, Any]) -> Iterator[Any]:
    from openai import OpenAI

    with OpenAI(base_url=told["url"], api_key="-", max_retries=0, timeout=120) as client:
        yield client


def scenes(name: str = LLAVA) -> list[Any]:
    return [as_shown(make_scene("development", number), name) for number in range(QUESTIONS)]


def chat(one: Any, image: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image, {"type": "text", "text": one.questions[0].text}]}]


def messages(one: Any) -> list[dict[str, Any]]:
    return chat(one, {"type": "image_url", "image_url": {"url": data_url(one.image)}})


def ask(client: Any, model: str, one: Any, stream: bool) -> str:
    answer = client.chat.completions.create(
        model=model, messages=messages(one), stream=stream, max_tokens=8
    )
    if not stream:
        return str(answer.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


def alone(model: Any, processor: Any, asked: list[Any]) -> list[str]:
    """The answers of single calls."""
    found = ChatModel(model, processor)
    chats = [chat(one, {"type": "image", "image": one.image}) for one in asked]
    return [found.answer([one], Generation(8))[0].text for one in chats]


def long_request(told: dict[str, Any], one: Any, stream: bool, tokens: int) -> bytes:
    """A request, as it is sent, whose answer has as many tokens as it asks for."""
    asked = {"model": told["model"], "messages": messages(one), "stream": stream}
    asked |= {"logit_bias": {"2": -100.0}, "max_tokens": tokens}
    data = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(told['url']).hostname}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def ask_all(told: dict[str, Any], asked: list[Any]) -> list[str]:
    """The answers that many clients get at once, every second one streamed."""
    with client_of(told) as client, ThreadPoolExecutor(CLIENTS) as pool:
        futures = [
            pool.submit(ask, client, told["model"], one, number % 2 == 1)
            for number, one in enumerate(asked)
        ]
        return [future.result() for future in futures]


def test_many_clients_get_the_answers_of_single_calls() -> None:
    from openai import BadRequestError

    model, processor = load_builtin()
    patch_model(model, target_tokens=144)
    asked = scenes()
    expected = alone(model, processor, asked)
    with server("--target-tokens", "144") as (process, told):
        assert (told["model"], told["methods"]) == ("builtin", ["atp"])
        assert ask_all(told, asked) == expected
        wrong = ["data:image/png;base64,AAAA", data_url(Image.new("1", (8000, 8000)))]
        with client_of(told) as client, ThreadPoolExecutor(CLIENTS) as pool:
            others = [pool.submit(ask, client, "builtin", one, True) for one in asked]
            for url in wrong:
                part = {"type": "image_url", "image_url": {"url": url}}
                with pytest.raises(BadRequestError, match="the picture is"):
                    client.chat.completions.create(model="builtin", messages=chat(asked[0], part))
            assert [future.result() for future in others] == expected
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_the_page_shows_what_its_code_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "serve.md"
    asking, piping = (block.source for block in blocks(page, "python"))
    _, asked, piped = (block.source for block in blocks(page, "text"))
    monkeypatch.chdir(ROOT)
    with server("--target-tokens", "144") as (_, told):
        address = "http://127.0.0.1:8000/v1"
        assert address in asking
        exec(compile(asking.replace(address, told["url"]), page.name, "exec"), {})
    assert capsys.readouterr().out == asked
    exec(compile(piping, page.name, "exec"), {})
    assert capsys.readouterr().out == piped


def test_a_client_that_is_killed_harms_nobody() -> None:
    """It asks for a long answer, and goes without a word while that is made.

    An answer that is streamed would take minutes, so the others' wait shows that it is given up.
    """
    asked = scenes(DYNAMIC)
    model, processor = load_builtin(DYNAMIC)
    patch_model(model, method="divprune", keep=0.3)
    expected = alone(model, processor, asked)
    options = ("--model", "builtin-dynamic", "--method", "divprune", "--keep", "0.3")
    with server(*options) as (process, told):
        assert told["methods"] == ["divprune"]
        where = urlsplit(told["url"])
        for stream in (True, False):
            for number in range(4):
                tokens = 100_000 if stream else 500
                asking = long_request(told, asked[number], stream, tokens)
                with socket.create_connection((where.hostname, where.port)) as line:
                    line.sendall(asking[: len(asking) // 2] if number == 3 else asking)
                    if number == 0 and stream:
                        assert b"200 OK" in line.recv(1000)
        assert ask_all(told, asked) == expected
        assert process.poll() is None


@pytest.mark.parametrize("stream", [True, False])
def test_ctrl_c_ends_the_server_while_it_answers(stream: bool) -> None:
    """The answer would take many minutes."""
    [one] = scenes(DYNAMIC)[:1]
    options = ("--model", "builtin-dynamic", "--method", "divprune", "--keep", "0.3")
    with server(*options, stderr=subprocess.PIPE) as (process, told):
        where = urlsplit(told["url"])
        with socket.create_connection((where.hostname, where.port)) as line:
            line.sendall(long_request(told, one, stream, 100_000))
            if stream:
                assert b"200 OK" in line.recv(1000)
            else:
                time.sleep(5)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=200)
    assert (process.returncode, said) == (130, "atp-patch serve: stopped.\n")


def test_voco_tokens_and_a_local_folder_are_served() -> None:
    asked = scenes()[:4]
    model, processor = load_builtin()
    load_trained(model, "voco8")
    folder = str(builtin_path())
    with server("--weights", "voco8") as (_, told):
        assert ask_all(told, asked) == alone(model, processor, asked)
    model, processor = load_builtin()
    with server("--model", folder, "--method", "plain") as (_, told):
        assert (told["model"], told["methods"], told["layers"]) == (folder, [], [])
        assert ask_all(told, asked) == alone(model, processor, asked)


def test_memory_stays_flat() -> None:
    pages = os.sysconf("SC_PAGE_SIZE")

    def resident(pid: int) -> float:
        text = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8")
        return int(text.split()[1]) * pages / 2**20

    asked = scenes(DYNAMIC)
    with server("--model", "builtin-dynamic", "--keep", "0.3") as (process, told):
        for _ in range(4):
            first = ask_all(told, asked)
        before, start = resident(process.pid), time.monotonic()
        while time.monotonic() - start < 30:
            assert ask_all(told, asked) == first
        assert resident(process.pid) < before + 30
