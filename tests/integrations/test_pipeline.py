"""Patched models in transformers' own pipeline."""

from __future__ import annotations

import pytest
import transformers

import atp_patch
from atp_patch.builtin import load_builtin, make_scene
from atp_patch.tools.trained import find_trained


@pytest.mark.parametrize(
    "asked",
    [
        {"target_tokens": 144},
        {"method": "divprune", "keep": 0.3},
        pytest.param({"method": "downsample", "keep": 0.3}, marks=pytest.mark.slow),
        pytest.param({"method": "prumerge+", "keep": 0.3}, marks=pytest.mark.slow),
        pytest.param({"method": ["divprune", "atp"], "target_tokens": 100}, marks=pytest.mark.slow),
        pytest.param({"weights": find_trained("voco8").adapter}, marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_answers_in_batches_as_single_calls_do(asked):
    model, processor = load_builtin()
    atp_patch.patch_model(model, **asked)
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    processor.tokenizer.padding_side = "left"
    scenes = [make_scene("development", number) for number in range(3)]
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": scene.image},
                    {"type": "text", "text": scene.questions[0].text},
                ],
            }
        ]
        for scene in scenes
    ]
    greedy = {"do_sample": False, "max_new_tokens": 4}
    together = pipe(chats, batch_size=3, return_full_text=False, generate_kwargs=greedy)
    assert atp_patch.last_trace(model).average_tokens < 180
    alone = [pipe(chat, return_full_text=False, generate_kwargs=greedy) for chat in chats]
    texts = [found[0]["generated_text"] for found in together]
    assert texts == [found[0]["generated_text"] for found in alone]
    assert all(texts)
