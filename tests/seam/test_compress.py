"""Images compressed ahead of any question: the same answers as in one pass, saved or not."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Image, Inputs, Prompt, Video, Words, batch, extended, prompt
from tests.helpers.run import forward, generate, new_ids, positioned, words
from tests.helpers.voco import reference, voco_model

families = pytest.mark.parametrize("kind", tiny.FAMILIES)
# Up to the question; of different lengths, with one image or two, padded on the left.
READ = (
    prompt(Words(3), Image(4, 6), seed=1),
    prompt(Words(2), Image(4, 6), Words(4), Image(6, 8), Words(2), seed=6),
)
QUESTION = words(2, 5, seed=3)


def answer(model: Any, cache: atp_patch.VisualCache, question: Tensor, **kwargs: Any) -> Tensor:
    """The generated part after a question about what was compressed."""
    beams = kwargs.get("num_beams", kwargs.get("num_return_sequences", 1))
    asked = cache.inputs(model, question, beams)
    return generate(model, asked, **kwargs)[:, question.shape[1] :]


@families
def test_a_question_after_is_the_question_within(kind: str) -> None:
    model = voco_model(kind)
    inputs = batch(model, READ)
    whole = positioned(model, extended(inputs, QUESTION))
    cache = atp_patch.compress(model, inputs)
    asked = cache.inputs(model, QUESTION)
    assert_close(forward(model, asked).logits, forward(model, whole).logits[:, -5:])
    expected, known = reference(
        tiny.tiny_model(kind, "eager"), whole, model.atp_patch_heads.embedding.detach()
    )
    assert_close(forward(model, cache.inputs(model, QUESTION)).logits, expected[:, -5:])
    assert known[:, -5:].all()
    together = generate(model, extended(inputs, QUESTION))
    got = answer(model, cache, QUESTION)
    assert torch.equal(got, new_ids(extended(inputs, QUESTION), together))
    assert torch.equal(got, answer(model, cache, QUESTION)), "asking changed the cache"
    for many in (
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        together = generate(model, extended(inputs, QUESTION), **many)
        expected_ids = new_ids(extended(inputs, QUESTION), together)
        assert torch.equal(answer(model, cache, QUESTION, **many), expected_ids)


@families
def test_it_holds_text_and_voco_tokens_alone(kind: str) -> None:
    model = voco_model(kind, num_tokens=3)
    inputs = batch(model, READ)
    cache = atp_patch.compress(model, inputs)
    visual, real = prompts.visual_mask(inputs), prompts.real_mask(inputs)
    text = (real & ~visual).sum(1).tolist()
    assert cache.tokens == (text[0] + 3, text[1] + 6)
    assert cache.batch == 2
    size = 2 * tiny.LAYERS * tiny.KV_HEADS * tiny.HEAD_DIM * 4  # bytes of a token
    assert cache.nbytes == 2 * max(cache.tokens) * size
    assert cache.nbytes < int(visual.sum()) * size / 2


@families
def test_one_image_takes_any_number_of_questions(kind: str) -> None:
    """Of different lengths, padded on the left."""
    model = voco_model(kind)
    inputs = batch(model, READ[:1])
    cache = atp_patch.compress(model, inputs)
    questions = [words(1, count, seed=count) for count in (2, 5, 3)]
    ids, mask = (torch.full((3, 5), value) for value in (tiny.PAD, 0))
    for b, question in enumerate(questions):
        ids[b, 5 - question.shape[1] :] = question[0]
        mask[b, 5 - question.shape[1] :] = 1
    asked = cache.inputs(model, {"input_ids": ids, "attention_mask": mask})
    together = generate(model, asked)[:, 5:]
    for b, question in enumerate(questions):
        assert torch.equal(together[b], answer(model, cache, question)[0])
        whole = extended(inputs, question)
        assert torch.equal(together[b], new_ids(whole, generate(model, whole))[0])


@families
def test_a_file_gives_the_same_answers(kind: str, tmp_path: Path) -> None:
    model = voco_model(kind)
    cache = atp_patch.compress(model, batch(model, READ))
    file = tmp_path / "images.safetensors"
    cache.save(file)
    again = atp_patch.VisualCache.load(file, voco_model(kind))
    first, second = (forward(model, one.inputs(model, QUESTION)).logits for one in (cache, again))
    assert torch.equal(first, second)
    assert torch.equal(answer(model, cache, QUESTION), answer(model, again, QUESTION))
    assert (again.tokens, again.nbytes, again.batch) == (cache.tokens, cache.nbytes, cache.batch)


@families
def test_images_one_after_the_other(kind: str) -> None:
    """As if they stood in one prompt: each one's VoCo tokens attend to the earlier ones."""
    model = voco_model(kind)
    first = (Words(3), Image(4, 6), Words(2))
    whole = batch(model, (prompt(*first, Image(6, 8), Words(1), seed=6),))
    # The same words and pixels, cut in two.
    parts = cut(model, whole, first)
    cache = atp_patch.compress(model, parts[0])
    cache = atp_patch.compress(model, parts[1], after=cache)
    asked = cache.inputs(model, QUESTION[:1])
    expected = forward(model, positioned(model, extended(whole, QUESTION[:1]))).logits
    assert_close(forward(model, asked).logits, expected[:, -5:])
    third = atp_patch.compress(model, parts[1], after=cache)
    assert third.tokens[0] == cache.tokens[0] + cut_text(parts[1]) + 2
    assert forward(model, third.inputs(model, QUESTION[:1])).logits.isfinite().all()


def cut(model: Any, whole: Inputs, first: tuple[Any, ...]) -> list[Inputs]:
    """A prompt with two images, cut behind the pieces ``first``."""
    length = batch(model, (Prompt(first, 6),))["input_ids"].shape[1]
    parts = []
    for number, part in enumerate((slice(0, length), slice(length, None))):
        piece = {
            name: value[:, part]
            for name, value in whole.items()
            if value.shape == whole["input_ids"].shape
        }
        if tiny.is_llava(model):
            piece["pixel_values"] = whole["pixel_values"][number : number + 1]
        else:
            grids = whole["image_grid_thw"]
            sizes = grids.prod(1).tolist()
            piece["pixel_values"] = whole["pixel_values"].split(sizes)[number]
            piece["image_grid_thw"] = grids[number : number + 1]
        parts.append(piece)
    return parts


def cut_text(inputs: Inputs) -> int:
    return int((prompts.real_mask(inputs) & ~prompts.visual_mask(inputs)).sum())


@pytest.mark.parametrize("frames", [1, 2])
def test_a_video_is_compressed_in_segments(frames: int) -> None:
    """Each segment's tokens see its own frames and the VoCo tokens of the earlier ones."""
    kind = "qwen2_vl"
    model = voco_model(kind, num_tokens=2, segment_frames=frames)
    inputs = batch(model, (prompt(Words(3), Video(3, 4, 4), Words(5), seed=11),))
    start = int(prompts.visual_mask(inputs)[0].nonzero()[0])
    cuts = [{start + 16 * frame for frame in range(frames, 3, frames)}]
    expected, known = reference(
        tiny.tiny_model(kind, "eager"), inputs, model.atp_patch_heads.embedding.detach(), cuts
    )
    assert_close(forward(model, inputs).logits, expected, known)
    segments = -(-3 // frames)
    assert atp_patch.last_trace(model).average_tokens == 2 * segments
    cache = atp_patch.compress(model, inputs)
    assert cache.tokens == (cut_text(inputs) + 2 * segments,)


@families
def test_a_video_as_successive_segments(kind: str) -> None:
    """Hours of video: each piece is read on top of the few tokens of all before it."""
    model = voco_model(kind)
    piece = Image(4, 6) if kind == "llava-llama" else Video(2, 4, 4)
    cache = atp_patch.compress(model, batch(model, (prompt(piece, seed=0),)))
    sizes = [cache.tokens[0]]
    for seed in (1, 2, 3):
        cache = atp_patch.compress(model, batch(model, (prompt(piece, seed=seed),)), after=cache)
        sizes.append(cache.tokens[0])
    assert len({later - earlier for earlier, later in pairwise(sizes)}) == 1
    assert sizes[3] < 24
    other = atp_patch.compress(model, batch(model, (prompt(piece, seed=3),)))
    question = words(1, 4)
    with_past, alone = (
        forward(model, one.inputs(model, question)).logits for one in (cache, other)
    )
    assert not torch.allclose(with_past, alone, atol=1e-3)


@families
def test_another_model_or_adapter_is_refused(kind: str, tmp_path: Path) -> None:
    model = voco_model(kind)
    cache = atp_patch.compress(model, batch(model, READ))
    file = tmp_path / "images.safetensors"
    cache.save(file)
    tuned = voco_model(kind)
    with torch.no_grad():
        tuned.model.language_model.layers[5].mlp.up_proj.weight.mul_(1.01)
    seeing = voco_model(kind)
    tower = (
        p for name, p in seeing.named_parameters() if "vision_tower" in name or "visual" in name
    )
    with torch.no_grad():
        next(tower).mul_(1.01)
    adapter = voco_model(kind)
    with torch.no_grad():
        adapter.atp_patch_heads.embedding.mul_(1.01)
    more = atp_patch.patch_model(tiny.tiny_model(kind), method="voco", num_tokens=3)
    for wrong in (tuned, seeing, adapter, more):
        with pytest.raises(atp_patch.WeightsError, match="another model"):
            cache.inputs(wrong, QUESTION)
        with pytest.raises(atp_patch.WeightsError, match="another model"):
            atp_patch.VisualCache.load(file, wrong)
        with pytest.raises(atp_patch.WeightsError, match="another model"):
            atp_patch.compress(wrong, batch(model, READ), after=cache)
    plain = tiny.tiny_model(kind)
    with pytest.raises(atp_patch.NotPatchedError):
        atp_patch.compress(plain, batch(model, READ))
    atp_patch.patch_model(plain, method="fastv", layers=[2], keep=0.5)
    with pytest.raises(atp_patch.ConfigError, match="fastv, which does not compress"):
        cache.inputs(plain, QUESTION)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = voco_model("llava-llama")
    cache = atp_patch.compress(model, batch(model, READ))
    with pytest.raises(atp_patch.InputError, match="3 questions about 2"):
        cache.inputs(model, words(3, 4))
    with pytest.raises(atp_patch.InputError, match="1 prompts cannot continue 2"):
        atp_patch.compress(model, batch(model, READ[:1]), after=cache)
    with pytest.raises(atp_patch.InputError, match="holds no image"):
        atp_patch.compress(model, batch(model, prompts.NO_IMAGE))
    qwen = voco_model("qwen2_vl")
    untyped = {k: v for k, v in batch(qwen, READ).items() if k != "mm_token_type_ids"}
    with pytest.raises(atp_patch.InputError, match="mm_token_type_ids"):
        atp_patch.compress(qwen, untyped)


@pytest.mark.parametrize("fault", ["missing", "text", "foreign", "version", "tensor"])
def test_broken_files_are_refused(fault: str, tmp_path: Path) -> None:
    model = voco_model("llava-llama")
    file = tmp_path / "images.safetensors"
    if fault != "missing":
        atp_patch.compress(model, batch(model, READ)).save(file)
    if fault == "text":
        file.write_text("no tensors")
    elif fault == "foreign":
        save_file(load_file(file), file)
    elif fault == "version":
        rewrite(file, version=99)
    elif fault == "tensor":
        rewrite(file, without="keys.1")
    with pytest.raises(atp_patch.WeightsError, match=r"images\.safetensors"):
        atp_patch.VisualCache.load(file, model)


def rewrite(file: Path, *, version: int | None = None, without: str | None = None) -> None:
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["atp_patch"])
    if version is not None:
        about["version"] = version
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != without}
    save_file(tensors, file, metadata={"atp_patch": json.dumps(about)})
