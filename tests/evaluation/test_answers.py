"""Answers: forced equals generated, a batch equals its samples, tokens are those in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from atp_patch.evaluation.answers import forced, generated
from atp_patch.evaluation.prepare import Batch, Sample, collate
from atp_patch.evaluation.runner import Bench, answered, prepared
from atp_patch.evaluation.settings import BLIND, UNPRUNED, Setting, applied
from atp_patch.evaluation.tasks import Example, choose_tasks, exact_match
from atp_patch.methods import untrained_methods
from atp_patch.patching.api import is_patched
from tests.evaluation.conftest import LAYERS, TOKENS
from tests.helpers.run import INSIDE

TASKS = ("exist", "relation", "ocr")  # questions of different lengths
PLACES = (2, 4, 6)
REFERENCES = (Setting(UNPRUNED), Setting(BLIND))
METHODS = tuple(
    Setting(name, layers=PLACES, budget=0.5, seed=1 if name == "random" else None)
    for name in ("atp", "fastv", "random")
)
settings = pytest.mark.parametrize("setting", [*REFERENCES, *METHODS], ids=lambda s: s.name)


@pytest.fixture(scope="module")
def samples(bench: Bench) -> list[Sample]:
    """Questions about several images, some about the same one."""
    return [
        prepared(bench, task, "development", example)
        for task in choose_tasks(TASKS)
        for example in task.examples("development", 6)
    ]


def batch_of(samples: Sequence[Sample], setting: Setting) -> Batch:
    return collate(samples, 0, setting.name == BLIND, positions=True)


def test_pictures_of_fewer_tiles_get_empty_ones() -> None:
    def sample(tiles: int) -> Sample:
        ids = torch.arange(4)[None]
        pictures = torch.full((1, tiles, 3, 2, 2), float(tiles))
        inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1, "pixel_values": pictures}
        inputs["pixel_attention_mask"] = torch.ones(1, tiles, 2, 2)
        return Sample(Example("exist", tiles, "?", "yes"), inputs, ids[0] > 2)

    inputs = collate([sample(3), sample(5)], 0, False, False).inputs
    pictures = inputs["pixel_values"]
    assert pictures.shape == (2, 5, 3, 2, 2)
    assert inputs["pixel_attention_mask"].sum((2, 3)).tolist() == [[4, 4, 4, 0, 0], [4] * 5]
    assert bool((pictures[0, :3] == 3).all())
    assert bool((pictures[0, 3:] == 0).all())
    assert bool((pictures[1] == 5).all())


def claiming(bench: Bench, samples: Sequence[Sample], answer: str) -> list[Sample]:
    """The same questions as if this were the true answer."""
    ids = bench.processor.tokenizer.encode(answer, add_special_tokens=False)
    end = bench.model.generation_config.eos_token_id
    return [replace(sample, answer=(*ids, end)) for sample in samples]


@settings
def test_forced_answers_are_those_of_generate(
    bench: Bench, samples: list[Sample], setting: Setting
) -> None:
    hits = 0
    with applied(bench.model, setting, TOKENS):
        texts = generated(bench.model, bench.processor, batch_of(samples, setting), 8)
        for claim in [*dict.fromkeys(texts), "yes", "no", "yes no", "red", "K 2 5"]:
            if len(claim.split()) > 6:
                continue  # cut off by the limit of tokens, not ended by the model
            expected = [exact_match(text, claim) for text in texts]
            batch = batch_of(claiming(bench, samples, claim), setting)
            assert forced(bench.model, batch) == [bool(x) for x in expected], claim
            hits += int(sum(expected))
    assert 0 < hits < 5 * len(samples)


@settings
def test_answers_of_different_lengths_share_a_batch(
    bench: Bench, samples: list[Sample], setting: Setting
) -> None:
    claims = ["yes", "no yes", "yes yes yes"]
    with applied(bench.model, setting, TOKENS):
        texts = generated(bench.model, bench.processor, batch_of(samples, setting), 8)
        mixed = [
            claiming(bench, [sample], text if at % 2 else claims[at % 3])[0]
            for at, (sample, text) in enumerate(zip(samples, texts, strict=True))
        ]
        together = forced(bench.model, batch_of(mixed, setting))
        alone = [forced(bench.model, batch_of([sample], setting))[0] for sample in mixed]
    assert together == alone


@settings
@pytest.mark.parametrize("answers", ["forced", "generate"])
def test_batching_does_not_change_answers(
    bench: Bench, samples: list[Sample], setting: Setting, answers: str
) -> None:
    given = samples if answers == "forced" else [replace(s, answer=()) for s in samples]
    registry = {task.name: task for task in choose_tasks(TASKS)}
    found = []
    with applied(bench.model, setting, TOKENS):
        for size in (1, 7):
            several = replace(bench, batch_size=size, answers=answers, max_new_tokens=4)
            found.append(dict_of(answered(several, setting, registry, given)))
    assert found[0] == found[1]


def dict_of(answers: object) -> dict[tuple[str, int], object]:
    """By question."""
    return {(s.example.task, s.example.number): a for s, a in answers}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", untrained_methods())
def test_tokens_are_those_in_the_cache(bench: Bench, samples: list[Sample], name: str) -> None:
    places = PLACES if name in INSIDE else ()
    setting = Setting(name, layers=places, budget=0.4)
    registry = {task.name: task for task in choose_tasks(TASKS)}
    sample = samples[0]
    with applied(bench.model, setting, TOKENS):
        [(_, answer)] = list(answered(bench, setting, registry, [sample]))
        cache = DynamicCache(config=bench.model.config.get_text_config())
        with torch.inference_mode():
            bench.model(**batch_of([sample], setting).inputs, past_key_values=cache)
    text = sample.visual.numel() - TOKENS
    held = [cache.layers[layer].keys.shape[2] - text for layer in range(LAYERS)]
    assert answer.entering == tuple(held[layer] for layer in (0, *places))
    assert held == [held[max(p for p in (0, *places) if p <= i)] for i in range(LAYERS)]
    near = 2 if name == "downsample" else 1  # a grid has whole sides
    assert abs(sum(held) / LAYERS - 0.4 * TOKENS) <= near


def test_the_unpruned_model_is_the_plain_one(bench: Bench, samples: list[Sample]) -> None:
    registry = {task.name: task for task in choose_tasks(TASKS)}
    setting = Setting(UNPRUNED)
    with applied(bench.model, setting, TOKENS):
        answers = [answer for _, answer in answered(bench, setting, registry, samples)]
    assert {answer.entering for answer in answers} == {(TOKENS,)}
    assert not is_patched(bench.model)


def test_without_the_image_nothing_of_it_is_left(bench: Bench, samples: list[Sample]) -> None:
    batch = batch_of(samples, Setting(BLIND))
    placeholder = bench.model.config.image_token_id
    assert "pixel_values" not in batch.inputs
    assert not (batch.inputs["input_ids"] == placeholder).any()
    with_image = batch_of(samples, Setting(UNPRUNED))
    for row, sample in enumerate(samples):
        text = batch.inputs["attention_mask"][row].bool()
        kept = with_image.inputs["attention_mask"][row].bool()
        kept &= with_image.inputs["input_ids"][row] != placeholder
        for name in ("input_ids", "position_ids"):
            assert batch.inputs[name][row][text].equal(with_image.inputs[name][row][kept]), name
        assert int(batch.inputs["position_ids"][row, -1]) == sample.visual.numel() - 1
