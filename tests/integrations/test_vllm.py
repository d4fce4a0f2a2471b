"""The plugin in the real vLLM, against transformers with the same method and budget.

`make test-vllm` installs vLLM's CPU build into an environment of its own and runs these there.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3000)]
pytest.importorskip("vllm", reason="vLLM is not installed: make serve-env")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import atp_patch  # noqa: E402
from atp_patch.builtin import load_builtin, make_scene, prompt  # noqa: E402
from atp_patch.integrations.vllm.plugin import register  # noqa: E402
from atp_patch.integrations.vllm.settings import VARIABLE, Settings  # noqa: E402
from tests.helpers.vllm_models import export_llava  # noqa: E402

QUESTIONS = int(os.environ.get("ATP_PATCH_TEST_QUESTIONS", "20"))
ANSWER_TOKENS = 8
SETTINGS = (
    "method=divprune,keep=1",  # the plain model
    "method=divprune,keep=0.25",
    "method=uniform,tokens_per_image=64",
    "method=random,keep=0.25,seed=1",
    "method=visionzip,keep=0.25",
    "method=scope,keep=0.1",
    "method=prumerge+,keep=0.25",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return export_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def asked() -> list[tuple[Any, Any]]:
    """Held-out pictures, with a question each."""
    scenes = [make_scene("test", number) for number in range(QUESTIONS)]
    return [
        (scene.image, scene.questions[number % len(scene.questions)])
        for number, scene in enumerate(scenes)
    ]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts an engine with settings of the plugin, and ends it after the test."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    started: list[Any] = []

    def start(folder: Any, settings: str, **options: Any) -> Any:
        monkeypatch.setenv(VARIABLE, settings)
        register()
        common = {
            "dtype": "float32",
            "max_model_len": 1536,
            "enforce_eager": True,
            "max_num_seqs": 8,
            "limit_mm_per_prompt": {"image": 2},
        }
        started.append(LLM(str(folder), **{**common, **options}))
        return started[-1]

    yield start
    started.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


def answers(llm: Any, requests: list[Any]) -> list[list[int]]:
    from vllm import SamplingParams

    done = llm.generate(requests, SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS))
    return [list(one.outputs[0].token_ids) for one in done]


def patched(settings: str) -> tuple[Any, Any]:
    """The built-in model under the same method and budget, and its processor."""
    found = Settings.parse(settings)
    model, processor = load_builtin("llava")
    method, keep, tokens = found.method, found.keep, found.tokens_per_image
    if keep != 1:
        atp_patch.patch_model(model, method=method, keep=keep, target_tokens=tokens)
    return model, processor


def generated(model: Any, processor: Any, images: Any, text: str) -> list[int]:
    inputs = processor(images=images, text=text, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    found: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_answers_are_those_of_transformers(
    engine: Any, folder: Any, asked: Any, settings: str
) -> None:
    llm = engine(folder, settings)
    requests = [
        {"prompt": prompt(question.text), "multi_modal_data": {"image": image}}
        for image, question in asked
    ]
    found = answers(llm, requests)
    model, processor = patched(settings)
    expected = [
        generated(model, processor, image, prompt(question.text)) for image, question in asked
    ]
    pairs = enumerate(zip(found, expected, strict=True))
    assert [number for number, (one, other) in pairs if one != other] == []
