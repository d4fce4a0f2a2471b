"""The second shipped folder: its shape, its size, that it sees at any size and can be pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration

import atp_patch
from atp_patch.builtin import (
    SceneConfig,
    as_shown,
    builtin_path,
    load_builtin,
    make_scene,
    prompt,
)
from atp_patch.builtin.dynamic.processing import SizedProcessor
from atp_patch.builtin.dynamic.sizes import TOKEN_PX, at_size
from atp_patch.builtin.dynamic.tokens import IMAGE_PAD, token_ids
from atp_patch.builtin.tokens import UNK, encode
from atp_patch.commands import demo
from atp_patch.evaluation import command
from atp_patch.evaluation.answers import forced, generated
from atp_patch.evaluation.prepare import collate
from atp_patch.evaluation.runner import Bench, prepared
from atp_patch.evaluation.settings import BLIND, UNPRUNED, Setting, applied
from atp_patch.evaluation.tasks import choose_tasks
from tests.helpers.compare import assert_close
from tests.helpers.oracle import masked_logits
from tests.helpers.run import forward, kept_of
from workshop.dynamic.processing import build_processor
from workshop.score import score

FOLDER = builtin_path("dynamic")
SETTINGS = (
    Setting(UNPRUNED),
    Setting(BLIND),
    Setting("atp", layers=(2, 4), budget=0.5),
    Setting("prumerge+", budget=0.5),
)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "scenes"
Loaded = tuple[Qwen3VLForConditionalGeneration, SizedProcessor]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_builtin("dynamic")


@pytest.fixture(params=["built", "shipped"])
def processor(request: pytest.FixtureRequest, loaded: Loaded) -> SizedProcessor:
    return build_processor() if request.param == "built" else loaded[1]


def asked(processor: SizedProcessor, *numbers: int, question: str) -> Any:
    """A batch of one question about some scenes."""
    return processor(
        images=[as_shown(make_scene("test", number), "dynamic").image for number in numbers],
        text=[prompt(question, "dynamic")] * len(numbers),
        padding=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_forced_answers_are_those_of_generate(loaded: Loaded, setting: Setting) -> None:
    bench = Bench(*loaded, speaks=True, answers="forced", sized=True)
    samples = [
        prepared(bench, task, "development", example)
        for task in choose_tasks(["exist", "count", "ocr"])
        for example in task.examples("development", 5)
    ]
    alike = [s for s in samples if s.visual_tokens == samples[0].visual_tokens]
    assert len({len(s.inputs["input_ids"][0]) for s in alike}) > 1  # some are padded
    batch = collate(alike, bench.processor.tokenizer.pad_token_id, setting.name == BLIND, False)
    with applied(bench.model, setting, alike[0].visual_tokens):
        texts = generated(bench.model, bench.processor, batch, 6)
        hits = forced(bench.model, batch)
    assert hits == [text == s.example.answer for text, s in zip(texts, alike, strict=True)]
    assert any(hits)


def test_weights_are_small_and_bfloat16() -> None:
    file = FOLDER / "model.safetensors"
    assert file.stat().st_size <= 10_000_000
    with safe_open(file, "pt") as weights:
        assert {weights.get_slice(n).get_dtype() for n in list(weights.keys())} == {"BF16"}


def test_everyone_may_read_the_files() -> None:
    names = {file.name for file in FOLDER.iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= names
    for file in FOLDER.iterdir():
        assert file.stat().st_mode & 0o044 == 0o044, file


def test_auto_class_loads_it() -> None:
    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    assert len(model.model.language_model.layers) == 8
    assert "mrope_section" in model.config.text_config.rope_parameters


def test_unknown_names_are_named() -> None:
    with pytest.raises(ValueError, match=r"'qwen'.*llava, dynamic"):
        load_builtin("qwen")


def test_words_are_the_first_models(processor: SizedProcessor) -> None:
    assert processor.tokenizer.get_vocab() == token_ids()
    for question in make_scene("development", 3).questions:
        ids = processor.tokenizer.encode(question.text, add_special_tokens=False)
        assert ids == encode(question.text)
        assert token_ids()[UNK] not in ids


def test_prompt_is_what_the_chat_template_writes(processor: SizedProcessor) -> None:
    question = "How many red shapes are there?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    written = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert written == prompt(question, "dynamic")


def test_images_keep_their_sizes(processor: SizedProcessor) -> None:
    counts = set()
    for number in range(6):
        image = as_shown(make_scene("test", number), "dynamic").image
        inputs = processor(images=image, text=prompt("?", "dynamic"), return_tensors="pt")
        grid = [1, image.height // TOKEN_PX * 2, image.width // TOKEN_PX * 2]
        assert inputs["image_grid_thw"].tolist() == [grid]
        count = int((inputs["input_ids"] == token_ids()[IMAGE_PAD]).sum())
        assert count == image.height * image.width // TOKEN_PX**2
        counts.add(count)
    assert len(counts) > 3


@pytest.mark.parametrize("size", [(192, 192), (240, 208)])
def test_held_out_scenes_are_answered(loaded: Loaded, size: tuple[int, int]) -> None:
    model, processor = loaded
    right = []
    for number in range(10):
        scene = at_size(make_scene("test", number), size, SceneConfig().noise)
        for asked_for in scene.questions[:2]:
            inputs = processor(
                images=scene.image, text=prompt(asked_for.text, "dynamic"), return_tensors="pt"
            )
            ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
            right.append(processor.decode(ids, skip_special_tokens=True) == asked_for.answer)
    assert len(right) >= 18
    assert sum(right) / len(right) >= 0.85


def test_score_says_the_same_as_greedy_generation(loaded: Loaded) -> None:
    from tests.builtin.test_model import make_first

    model, processor = loaded
    scores = {s.task: s for s in score(model, "development", 1, first_scene=200)}
    for task in ("exist", "background"):
        image, question, answer = make_first(task, 200)
        scene = next(
            s for s in (make_scene("development", k) for k in range(200, 240)) if s.image == image
        )
        inputs = processor(
            images=as_shown(scene, "dynamic").image,
            text=prompt(question, "dynamic"),
            return_tensors="pt",
        )
        ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        assert scores[task].asked == 1
        assert scores[task].right == int(processor.decode(ids, skip_special_tokens=True) == answer)


@pytest.mark.parametrize("method", ["atp", "fastv", "random"])
def test_pruned_is_masked(method: str) -> None:
    plain, processor = load_builtin("dynamic")
    inputs = asked(processor, 0, 1, question="How many shapes are there?")
    visual = inputs["input_ids"] == token_ids()[IMAGE_PAD]
    assert len(set(visual.sum(1).tolist())) == 2
    model, _ = load_builtin("dynamic")
    options = {"seed": 0} if method == "random" else {}
    atp_patch.patch_model(model, [2, 4, 6], method, target_tokens=60, **options)
    logits, kept = forward(model, inputs).logits, kept_of(model)
    average = atp_patch.last_trace(model).average_tokens
    assert average == pytest.approx(60, abs=1)
    assert_close(logits, masked_logits(plain, dict(inputs), kept), kept[6], tolerance=1e-4)


def test_grids_are_read_off_the_positions(loaded: Loaded) -> None:
    model, processor = load_builtin("dynamic")
    scenes = [make_scene("test", number) for number in (0, 1)]
    inputs = asked(processor, 0, 1, question="Read the sign.")
    atp_patch.patch_model(model, [2, 4, 6], target_tokens=60)
    forward(model, inputs)
    grids = atp_patch.last_trace(model).grids
    sizes = [as_shown(scene, "dynamic").image.size for scene in scenes]
    assert [(g.width * TOKEN_PX, g.height * TOKEN_PX) for (g,) in grids] == sizes


def test_the_demo_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    image = EXAMPLES / "02.png"
    argv = [str(image), "How many red shapes are there?", "--model", "builtin-dynamic", "--json"]
    assert demo.main([*argv, "--target-tokens", "60"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    data = json.loads(out)
    assert data["visual_tokens"] == 144
    assert data["average_tokens"] == pytest.approx(60, abs=1)
    assert [layer["layer"] for layer in data["layers"]] == [1, 4, 6]
    assert "generated scenes only" in data["note"]


def test_the_evaluation_takes_it_with_shares(tmp_path: Path) -> None:
    argv = "--methods uniform --budgets 0.5 --tasks background,exist --questions 8 --seeds 1"
    given = ["--model", "builtin-dynamic", *argv.split(), "--split", "development"]
    assert command.main([*given, "--layers", "2,4", "--no-plots", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / command.SUMMARY).read_text(encoding="utf-8").splitlines()
    found = {row["method"]: row for row in map(json.loads, lines)}
    whole, half = found["unpruned"], found["uniform"]
    for task in ("background", "exist"):
        assert whole["accuracy"][task] >= 0.75, whole
    assert half["average_tokens"] == pytest.approx(whole["average_tokens"] / 2, abs=1)
    sizes = {as_shown(make_scene("development", k), "dynamic").image.size for k in range(8)}
    assert len(sizes) > 3
