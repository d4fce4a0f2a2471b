"""A budget before the decoder is shared out among a sample's images, with the minimum in it."""

from __future__ import annotations

import pytest
import torch

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers.run import forward
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("method", ["prumerge", "prumerge+", "downsample"])
@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
def test_a_minimum_is_the_samples_not_each_images(kind: str, method: str) -> None:
    samples = prompts.TWO_IMAGES
    if kind == "llava-llama":
        image = prompts.Image(4, 6)
        samples = (prompts.prompt(prompts.Words(3), image, prompts.Words(4), image, seed=2),)
    model = tiny_model(kind)
    for minimum, left in ((8, 10), (16, 16)):
        atp_patch.patch_model(model, method=method, target_tokens=10, min_tokens=minimum)
        forward(model, prompts.batch(model, samples))
        found = atp_patch.last_trace(model).average_tokens
        assert found == pytest.approx(left, abs=4 if method == "downsample" else 0)
        assert found >= minimum


@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl"])
def test_a_minimum_holds_where_counts_are_rounded_and_in_pairs(kind: str) -> None:
    model = tiny_model(kind)
    for minimum in (10, 13, 17):
        atp_patch.patch_model(model, method="downsample", target_tokens=6, min_tokens=minimum)
        forward(model, prompts.batch(model, prompts.SINGLE))
        assert minimum <= atp_patch.last_trace(model).average_tokens <= minimum + 7
    given = {"target_tokens": 12, "min_tokens": 12}
    atp_patch.patch_model(model, [2, 4], ["prumerge", "atp"], **given)
    forward(model, prompts.batch(model, prompts.SINGLE))
    assert int(atp_patch.last_trace(model).tokens_per_layer.min()) == 12


@pytest.mark.parametrize("method", ["prumerge", "downsample"])
def test_as_many_placeholders_of_videos_as_of_images(method: str) -> None:
    image, video = prompts.Image(4, 6), prompts.Video(2, 4, 6)
    words = prompts.Words(4)
    samples = (
        prompts.prompt(words, image, words, seed=1),
        prompts.prompt(words, image, words, video, words, seed=2),
    )
    model = atp_patch.patch_model(tiny_model("qwen2_vl"), method=method, target_tokens=12)
    alone = []
    for sample in samples:
        forward(model, prompts.batch(model, (sample,)))
        alone.append(atp_patch.last_trace(model).tokens_per_layer[0, 0])
    forward(model, prompts.batch(model, samples))
    assert torch.equal(atp_patch.last_trace(model).tokens_per_layer[:, 0], torch.stack(alone))
