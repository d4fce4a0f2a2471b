"""The plugin in the real vLLM, against transformers with the same method and budget.

`make test-vllm` installs vLLM's CPU build into an environment of its own and runs these there.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3000)]
pytest.importorskip("vllm", reason="vLLM is not installed: make serve-env")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import atp_patch  # noqa: E402
from atp_patch.builtin import builtin_path, load_builtin, make_scene, prompt  # noqa: E402
from atp_patch.integrations.vllm.plugin import register  # noqa: E402
from atp_patch.integrations.vllm.settings import VARIABLE, Settings  # noqa: E402
from tests.helpers.vllm_models import (  # noqa: E402
    export_internvl,
    export_llava,
    export_llava_onevision,
    export_qwen2_5_vl,
    export_qwen2_vl,
)

QUESTIONS = int(os.environ.get("ATP_PATCH_TEST_QUESTIONS", "20"))
ANSWER_TOKENS = 8
SETTINGS = [
    ("llava", "method=divprune,keep=1"),  # the plain model
    ("llava", "method=divprune,keep=0.25"),
    ("llava", "method=uniform,tokens_per_image=64"),
    ("llava", "method=random,keep=0.25,seed=1"),
    ("llava", "method=visionzip,keep=0.25"),
    ("llava", "method=scope,keep=0.1"),
    ("llava", "method=prumerge+,keep=0.25"),
    ("llava", "method=hiprune,keep=0.25"),
    ("llava", "method=vispruner,keep=0.25"),
    ("llava", "method=fastervlm,keep=0.25"),
    ("llava", "method=prunesid,keep=0.25"),
    ("llava", "method=prumerge,keep=0.25"),
    ("qwen2_vl", "method=divprune,keep=1"),
    ("qwen2_vl", "method=divprune,keep=0.25"),
    ("qwen2_vl", "method=prunesid,keep=0.3"),
    ("qwen2_vl", "method=scope,alpha=0,keep=0.25"),
    ("qwen2_vl", "method=uniform,tokens_per_image=30"),
    ("qwen2_5_vl", "method=divprune,keep=1"),
    ("qwen2_5_vl", "method=divprune,keep=0.25"),
    ("qwen2_5_vl", "method=prunesid,keep=0.3"),
    ("llava_onevision", "method=divprune,keep=1"),
    ("llava_onevision", "method=divprune,keep=0.25"),
    ("llava_onevision", "method=scope,alpha=0,keep=0.3"),
    ("llava_onevision", "method=uniform,tokens_per_image=50"),
    ("internvl", "method=divprune,keep=1"),
    ("internvl", "method=divprune,keep=0.25"),
    ("internvl", "method=visionzip,keep=0.3"),
    ("internvl", "method=scope,keep=0.25"),
    ("internvl", "method=prumerge+,keep=0.25"),
    ("internvl", "method=uniform,tokens_per_image=30"),
    ("dynamic", "method=divprune,keep=1"),
    ("dynamic", "method=divprune,keep=0.25"),
]
TINY = {
    "qwen2_vl": export_qwen2_vl,
    "qwen2_5_vl": export_qwen2_5_vl,
    "llava_onevision": export_llava_onevision,
    "internvl": export_internvl,
}
LLAVA_PROMPTS = ("llava", "internvl")
# Widths and heights that give one tile, few and many.
SIZES = [(192, 192), (192, 96), (48, 48), (100, 190), (40, 180), (300, 20)]
# LLaVA-OneVision's rows have no columns where a picture is as thin as the last ones. InternVL makes
# tokens of them that are nearly equal, so that rounding would choose among them.
TILED = {"internvl": SIZES, "llava_onevision": [*SIZES, (400, 4), (4, 400)]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By kind, a function that writes a model's folder and returns it; each is written once."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def made(kind: str) -> Path:
        if kind == "dynamic":
            return builtin_path(kind)
        return {"llava": export_llava, **TINY}[kind](root / kind)

    return made


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
    for llm in started:
        # The traceback of a failed test keeps its engine, whose later end would end the next one's.
        llm.llm_engine.engine_core.shutdown()
    started.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


def finished(llm: Any, requests: list[Any]) -> list[Any]:
    from vllm import SamplingParams

    found: list[Any] = llm.generate(
        requests, SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, logprobs=0)
    )
    return found


def answers(llm: Any, requests: list[Any]) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in finished(llm, requests)]


def words(question: str, kind: str) -> str:
    """The prompt of a question about one picture."""
    return prompt(question, "llava" if kind in LLAVA_PROMPTS else "dynamic")


def grainy(image: Any, seed: int) -> Any:
    """A picture with noise.

    The random towers make nearly equal tokens of an even ground. What `scope` gains by one of them
    differs by less than the rounding, in which the two programs differ.
    """
    pixels = torch.as_tensor(numpy.array(image), dtype=torch.float32)
    noise = 40 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels + noise).clamp(0, 255).byte().numpy())


def patched(folder: Path, kind: str, settings: str) -> tuple[Any, Any]:
    """The model of transformers under the same method and budget, and its processor."""
    found = Settings.parse(settings)
    if kind in TINY:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(folder)
    else:
        model, processor = load_builtin(kind)
    method, keep, tokens = found.method, found.keep, found.tokens_per_image
    if keep != 1:
        atp_patch.patch_model(model, method=method, keep=keep, target_tokens=tokens)
    return model, processor


def generated(model: Any, processor: Any, images: Any, text: str) -> tuple[list[int], float]:
    """The ids of the answer, and the logarithm of its probability."""
    inputs = processor(images=images, text=text, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(
            **inputs,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    ids: list[int] = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    steps = [logits[0].log_softmax(-1) for logits in made.logits]
    return ids, sum(float(step[token]) for step, token in zip(steps, ids, strict=True))


def differing(found: list[list[int]], expected: list[list[int]]) -> list[int]:
    """The numbers of the questions whose answers differ."""
    pairs = enumerate(zip(found, expected, strict=True))
    return [number for number, (one, other) in pairs if one != other]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_answers_are_those_of_transformers(
    engine: Any, folders: Any, asked: Any, kind: str, settings: str
) -> None:
    llm = engine(folders(kind), settings)
    texts = [words(question.text, kind) for _, question in asked]
    images = [image for image, _ in asked]
    if kind in TILED:
        sizes = itertools.cycle(TILED[kind])
        images = [image.resize(next(sizes)) for image in images]
    if kind in TINY and "scope" in settings:
        images = [grainy(image, number) for number, image in enumerate(images)]
    requests = [
        {"prompt": text, "multi_modal_data": {"image": image}}
        for text, image in zip(texts, images, strict=True)
    ]
    done = [one.outputs[0] for one in finished(llm, requests)]
    model, processor = patched(folders(kind), kind, settings)
    pairs = zip(images, texts, strict=True)
    expected = [generated(model, processor, image, text) for image, text in pairs]
    assert differing([list(one.token_ids) for one in done], [ids for ids, _ in expected]) == []
    # A random model may answer alike from wrong places; how sure it is shows them.
    for one, (_, log_probability) in zip(done, expected, strict=True):
        assert one.cumulative_logprob == pytest.approx(log_probability, abs=2e-3)


@pytest.mark.parametrize("kind", ["llava", *TINY])
def test_two_pictures_in_chunks_and_from_the_prefix_cache(
    engine: Any, folders: Any, asked: Any, kind: str
) -> None:
    """A step reads 48 tokens, so that pictures are cut; the second time most are in the cache."""
    settings = "method=divprune,keep=0.25"
    llm = engine(
        folders(kind),
        settings,
        max_num_batched_tokens=48,
        enable_prefix_caching=True,
        block_size=32,
    )
    shown = [(asked[n][0], asked[n + 1][0]) for n in range(4)]
    one = "<image>" if kind in LLAVA_PROMPTS else "<|vision_start|><|image_pad|><|vision_end|>"
    texts = [
        words(asked[n][1].text, kind).replace(one, f"{one} and {one}") for n in range(len(shown))
    ]
    requests = [
        {"prompt": text, "multi_modal_data": {"image": list(images)}}
        for text, images in zip(texts, shown, strict=True)
    ]
    first, again = answers(llm, requests), finished(llm, requests)
    model, processor = patched(folders(kind), kind, settings)
    pairs = zip(shown, texts, strict=True)
    expected = [generated(model, processor, list(images), text)[0] for images, text in pairs]
    assert differing(first, expected) == []
    assert differing([list(each.outputs[0].token_ids) for each in again], expected) == []
    assert all(each.num_cached_tokens >= 32 for each in again)
    if kind == "llava":
        text_tokens = len(processor.tokenizer(texts[0])["input_ids"]) - 2
        assert len(again[0].prompt_token_ids) == text_tokens + 2 * 144


def test_the_decoder_of_llava_gets_the_places_of_what_stays(
    engine: Any, folders: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built-in model hardly looks at positions, so its answers would not show wrong ones."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    seen: list[list[int]] = []
    forward = LlavaForConditionalGeneration.forward

    def noted(self: Any, input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(positions.tolist())
        return forward(self, input_ids, positions, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", noted)
    settings = "method=divprune,keep=0.25"
    llm = engine(folders("llava"), settings)
    image, question = asked[0]
    text = prompt(question.text)
    seen.clear()
    (answer,) = answers(llm, [{"prompt": text, "multi_modal_data": {"image": image}}])
    model, processor = patched(folders("llava"), "llava", settings)
    ids, _ = generated(model, processor, image, text)
    kept = atp_patch.last_trace(model).layers[0].kept[0]
    assert answer == ids
    assert seen[0] == kept.nonzero()[:, 0].tolist()
    assert seen[1] == [len(kept)]
