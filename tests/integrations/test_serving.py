"""A patched model behind the server of transformers: what clients ask and what they get."""

from __future__ import annotations

import base64
import json
import socket
import threading
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from PIL import Image

from atp_patch import UnsupportedModelError, last_trace, patch_model
from atp_patch.builtin import DYNAMIC, load_builtin, make_scene, prompt
from atp_patch.builtin.models import as_shown
from atp_patch.commands import serve, serve_options
from atp_patch.commands.pruning_options import patch_settings
from atp_patch.integrations.chat import ChatModel, Generation
from atp_patch.tools.trained import find_trained

NAME = "small"
LIMIT = 500_000


@pytest.fixture(scope="module")
def served() -> Any:
    model, processor = load_builtin(DYNAMIC)
    patch_model(model, target_share=0.25)
    return model, processor


@pytest.fixture
def client(served: Any) -> Any:
    from fastapi.testclient import TestClient

    from atp_patch.integrations.serving import build_app

    app = build_app(NAME, *served, max_image_pixels=LIMIT)
    with TestClient(app, raise_server_exceptions=False) as found:
        yield found


def scene(number: int) -> Any:
    return as_shown(make_scene("development", number), DYNAMIC)


def data_url(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def body(url: str, text: str, **more: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **more}


def alone(served: Any, one: Any) -> str:
    """The answer of a single call of the model."""
    content = [
        {"type": "image", "image": one.image},
        {"type": "text", "text": one.questions[0].text},
    ]
    chat = ChatModel(*served)
    [answer] = chat.answer([[{"role": "user", "content": content}]], Generation(8))
    return answer.text


def test_answers_whole_and_streamed_are_those_of_single_calls(served: Any, client: Any) -> None:
    for number in (0, 1):
        one = scene(number)
        expected = alone(served, one)
        asked = body(data_url(one.image), one.questions[0].text)
        whole = client.post("/v1/chat/completions", json=asked).json()
        assert whole["choices"][0]["message"]["content"] == expected
        found = client.post("/v1/chat/completions", json={**asked, "stream": True})
        events = [line.removeprefix("data: ") for line in found.text.splitlines() if line]
        chunks = [json.loads(event)["choices"][0] for event in events if event != "[DONE]"]
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == expected
        assert chunks[-1]["finish_reason"] == "stop"
    newer = {
        "model": NAME,
        "stream": False,
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": data_url(one.image)},
                    {"type": "input_text", "text": one.questions[0].text},
                ],
            }
        ],
    }
    message = client.post("/v1/responses", json=newer).json()["output"][0]
    assert message["content"][0]["text"] == expected


def test_what_is_served_is_pruned(served: Any, client: Any) -> None:
    """The server computes in a thread of its own, so its trace is read there."""
    model, _ = served
    traces = []
    with_hook = model.get_output_embeddings().register_forward_hook(
        lambda *_: traces.append(last_trace(model))
    )
    one = scene(0)
    client.post("/v1/chat/completions", json=body(data_url(one.image), one.questions[0].text))
    with_hook.remove()
    assert traces[-1].average_tokens < 0.3 * traces[-1].layout.totals[0]


KINDS = {
    "picture": {"method": "downsample", "keep": 0.3},
    "tower": {"method": "prumerge+", "keep": 0.3},
    "door": {"method": "visionzip", "keep": 0.3},
    "layer": {"method": "fastv", "keep": 0.3},
    "both": {"method": ["divprune", "atp"], "target_tokens": 100},
    "voco": {"weights": find_trained("voco8").adapter},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_method_is_served(kind: str) -> None:
    from fastapi.testclient import TestClient

    from atp_patch.integrations.serving import build_app

    model, processor = load_builtin()
    patch_model(model, **KINDS[kind])
    with TestClient(build_app(NAME, model, processor, max_image_pixels=LIMIT)) as client:
        for number in range(3):
            one = make_scene("development", number)
            asked = body(data_url(one.image), one.questions[0].text)
            found = client.post("/v1/chat/completions", json=asked).json()
            expected = alone((model, processor), one)
            assert found["choices"][0]["message"]["content"] == expected


BROKEN = {
    "data:image/png;base64,AAAA": "is not an image",
    "data:image/png;base64,A": "a picture cannot be read",
    data_url(Image.new("RGB", (1000, 501))): "1000 x 501 pixels, more than max_image_pixels=500000",
    data_url(Image.effect_noise((64, 64), 9))[:1022]: "the picture cannot be read",
    "/etc/hostname": "Files of the server are not read",
    "file:///etc/hostname": "Files of the server are not read",
    "http://127.0.0.1:9/a.png": "a picture cannot be read",
}


def test_a_wrong_picture_is_an_error_to_its_client_alone(served: Any, client: Any) -> None:
    for url, said in BROKEN.items():
        for stream in (False, True):
            answer = client.post("/v1/chat/completions", json=body(url, "Why?", stream=stream))
            assert answer.status_code == 400, answer.text
            assert said in answer.json()["error"]["message"]
    for part in ({"url": None}, {}, 3):
        asked = body("data:,", "Why?")
        asked["messages"][0]["content"][0]["image_url"] = part
        assert client.post("/v1/chat/completions", json=asked).status_code == 400
    for kind, source in (
        ("video_url", {"url": "/etc/hostname"}),
        ("audio_url", {"url": "/etc/hostname"}),
        ("input_audio", "/etc/hostname"),
        ("input_audio", {"data": "/etc/hostname"}),
    ):
        asked["messages"][0]["content"] = [{"type": kind, kind: source}]
        assert client.post("/v1/chat/completions", json=asked).status_code == 400
    one = scene(0)
    asked = body(data_url(one.image), one.questions[0].text)
    found = client.post("/v1/chat/completions", json=asked).json()
    assert found["choices"][0]["message"]["content"] == alone(served, one)


def test_a_budget_that_a_picture_cannot_meet_is_an_error_to_its_client() -> None:
    from fastapi.testclient import TestClient

    from atp_patch.integrations.serving import build_app

    model, processor = load_builtin(DYNAMIC)
    patch_model(model, target_tokens=20)
    asked = body(data_url(scene(0).image), "How many?")
    with TestClient(build_app(NAME, model, processor, max_image_pixels=LIMIT)) as client:
        whole = client.post("/v1/chat/completions", json=asked)
        assert whole.status_code == 400
        assert "below the least possible average" in whole.json()["error"]["message"]
        streamed = client.post("/v1/chat/completions", json={**asked, "stream": True})
        assert 'data: {"error": "target_tokens=20 is below the least' in streamed.text


def test_a_server_has_one_model_which_stays(client: Any) -> None:
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == [NAME]
    other = client.post("/v1/chat/completions", json={"model": "other", "messages": []})
    assert (other.status_code, "pinned" in other.text) == (400, True)
    assert (
        "this server has one model, small"
        in client.post("/load_model", json={"model": "other/model"}).text
    )
    assert '"ready"' in client.post("/load_model", json={"model": NAME}).text
    assert client.post("/reset").status_code == 404
    assert client.post("/v1/systemone", json={}).status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    text = {"model": NAME, "messages": [{"role": "user", "content": "How many?"}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=text).status_code == 200


def test_two_apps_of_two_models_do_not_know_each_other(served: Any, client: Any) -> None:
    from fastapi.testclient import TestClient
    from transformers.cli.serving.model_manager import ModelManager

    from atp_patch.integrations.serving import build_app

    with TestClient(build_app("other", *served, max_image_pixels=LIMIT)) as second:
        assert second.get("/v1/models").json()["data"][0]["id"] == "other"
        assert client.get("/v1/models").json()["data"][0]["id"] == NAME
    assert ModelManager.load_model_and_processor.__module__.startswith("transformers.")


def test_the_end_of_a_server_ends_its_answers_and_leaves_the_model(served: Any) -> None:
    """The answer would take many minutes."""
    from transformers.cli.serving.utils import GenerationState

    from atp_patch.integrations.serving import OneModel

    model, processor = served
    one, begun, state = scene(0), threading.Event(), GenerationState()
    expected = alone(served, one)
    manager = OneModel(NAME, model, processor, state)
    inputs = processor(images=one.image, text=prompt("Why?", DYNAMIC), return_tensors="pt")
    watch = model.get_output_embeddings().register_forward_hook(lambda *_: begun.set())
    thread = state.get_manager(manager.process_model_name(NAME))
    many = {"min_new_tokens": 100_000, "max_new_tokens": 100_000}
    answer = thread.submit(model.generate, **inputs, **many)
    assert begun.wait(60)
    manager.shutdown()
    assert "the server has been stopped" in str(answer.exception(0))
    watch.remove()
    assert alone(served, one) == expected


def test_what_the_server_cannot_serve_is_refused_by_name(served: Any) -> None:
    from atp_patch.integrations.serving import build_app

    model, processor = served
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    text = transformers.LlamaForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM for a model of text alone"):
        build_app("text", text, processor, max_image_pixels=1)
    with pytest.raises(UnsupportedModelError, match="does not know LlamaModel"):
        build_app("text", text.model, processor, max_image_pixels=1)
    slow = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(UnsupportedModelError, match="its tokenizer"):
        build_app("slow", model, slow, max_image_pixels=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--continuous-batching"], "takes no pictures"),
        (["--method", "fastest"], "--method 'fastest': give one of"),
        (["--method", "fastv/visionzip"], "fastv"),
        (["--method", "plain", "--keep", "0.5"], "leave out --keep"),
        (["--keep", "0.5", "--target-tokens", "9"], "give one of them"),
        (["--weights", "voco8", "--model", "builtin-dynamic"], "made for"),
        (["--weights", "nowhere/at all"], "nowhere"),
        (["--revision", "main"], "goes with --weights"),
        (["--port", "70000"], "--port 70000"),
        (["--max-image-pixels", "0"], "--max-image-pixels 0"),
        (["--host", "256.1.1.1"], "--host 256.1.1.1"),
    ],
)
def test_wrong_arguments_are_one_line(given: list[str], said: str, capsys: Any) -> None:
    assert serve.main(["--port", "0", *given]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_two_methods_are_named_as_one() -> None:
    args = serve_options.parser().parse_args(["--method", "divprune/atp", "--target-tokens", "99"])
    serve_options.check(args)
    settings = patch_settings(args, None)
    assert (settings["method"], settings["target_tokens"]) == (["divprune", "atp"], 99)


def test_a_port_in_use_is_one_line(capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 2
    assert f"--port {port} cannot be listened on" in capsys.readouterr().err
