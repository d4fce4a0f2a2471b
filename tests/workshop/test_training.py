"""The training program's parts: its forward pass is the model's own, growth changes nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atp_patch.builtin.scenes import make_scene
from atp_patch.builtin.silent import shallow
from atp_patch.builtin.tokens import ASSISTANT, BOS, EOS, IMAGE, PAD, USER, encode, word_ids
from atp_patch.builtin.vocabulary import RELATIONS
from workshop.architecture import DECODER_LAYERS, ORIGINALS, build, grow
from workshop.batches import TEXT_LENGTH, BatchSpec, make_batch
from workshop.forward import (
    PREFIX,
    decoder_forward,
    to_pixel_values,
    tower_forward,
    window_order,
)
from workshop.labels import IGNORE, NOTHING, side_labels
from workshop.learner import (
    Learner,
    load_checkpoint,
    make_heads,
    make_optimizers,
    save_checkpoint,
)
from workshop.objectives import decoder_loss, tower_loss, visible_places
from workshop.optim import Muon, orthogonalize
from workshop.processing import build_processor
from workshop.stages import STAGES

EVERYTHING = torch.arange(576)


def plain_logits(model: torch.nn.Module, pixel_values: Tensor, text: Tensor) -> Tensor:
    """The model's own forward on one question, logits at its text."""
    prefix = torch.tensor([word_ids()[t] for t in PREFIX])
    image = torch.full((576,), word_ids()[IMAGE])
    ids = torch.cat([prefix, image, text])[None]
    output = model(
        input_ids=ids, pixel_values=pixel_values[None], attention_mask=torch.ones_like(ids)
    )
    logits: Tensor = output.logits[0, len(PREFIX) + 576 :]
    return logits


@torch.no_grad()
def test_packed_questions_equal_single_ones() -> None:
    torch.manual_seed(0)
    model = build(3).eval()
    batch = make_batch(BatchSpec(2), 0)
    pixel_values, ids = to_pixel_values(batch["pixels"]), torch.tensor(batch["ids"])
    features = tower_forward(model, pixel_values)
    logits = decoder_forward(model, features, EVERYTHING, ids)
    for row, question in ((0, 0), (0, 5), (1, 3)):
        text = ids[row, question]
        text = text[text != word_ids()[PAD]]
        expected = plain_logits(model, pixel_values[row], text)
        torch.testing.assert_close(
            logits[row, question, : len(text)], expected, atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_growth_keeps_the_function() -> None:
    torch.manual_seed(0)
    original = build(len(ORIGINALS)).eval()
    deep = grow(original).eval()
    assert len(deep.model.language_model.layers) == DECODER_LAYERS == 32
    batch = make_batch(BatchSpec(1), 0)
    pixel_values = to_pixel_values(batch["pixels"])
    text = torch.tensor(encode("How many red shapes are there?"))
    torch.testing.assert_close(
        plain_logits(deep, pixel_values[0], text),
        plain_logits(original, pixel_values[0], text),
        atol=1e-5,
        rtol=1e-5,
    )


@torch.no_grad()
def test_silent_layers_left_out_change_no_bit() -> None:
    torch.manual_seed(0)
    deep = grow(build(len(ORIGINALS)).eval())
    layers = deep.model.language_model.layers
    batch = make_batch(BatchSpec(1), 0)
    ids = torch.tensor(batch["ids"])
    features = tower_forward(deep, to_pixel_values(batch["pixels"]))[:, :40]
    expected = decoder_forward(deep, features, EVERYTHING[:40], ids)
    with shallow(deep):
        assert len(deep.model.language_model.layers) == len(ORIGINALS)
        assert decoder_forward(deep, features, EVERYTHING[:40], ids).equal(expected)
    assert deep.model.language_model.layers is layers


def test_layers_that_are_scored_are_originals() -> None:
    assert {3, 13, 23} <= set(ORIGINALS)


@torch.no_grad()
def test_windows_do_not_see_each_other() -> None:
    model = build(1).eval()
    order = window_order((5, 7))
    assert order.sort().values.equal(EVERYTHING)
    pixels = to_pixel_values(make_batch(BatchSpec(1), 0)["pixels"])
    changed = pixels.clone()
    first = int(order[0])
    row, column = first // 24 * 8, first % 24 * 8
    changed[..., row : row + 8, column : column + 8] = 0
    moved = (tower_forward(model, pixels, order) - tower_forward(model, changed, order))[0]
    touched = moved.abs().amax(-1) > 0
    assert touched[order[:144]].any()
    assert not touched[order[144:]].any()


def test_no_question_is_longer_than_a_row() -> None:
    for k in range(200):
        for question in make_scene("train", k).questions:
            tokens = len(encode(question.text)) + 1 + len(encode(question.answer)) + 1
            assert tokens <= TEXT_LENGTH


def test_pairs_are_two_turns_of_one_conversation() -> None:
    spec = BatchSpec(2, questions=6, pair_share=1.0, split="development")
    first, second = make_batch(spec, 0), make_batch(replace(spec, first_counts=False), 0)
    ids = word_ids()
    for row in range(2):
        for words, all_targets, last in zip(
            first["ids"][row], first["targets"][row], second["targets"][row], strict=True
        ):
            ends = np.flatnonzero(words == ids[EOS])
            assert len(ends) in (0, 1, 2)
            if len(ends) < 2:  # nothing was left to follow
                continue
            middle = int(ends[0]) + 1
            assert words[middle] == ids[USER]
            turns = [words[:middle], words[middle + 1 : ends[1] + 1]]
            for turn in turns:
                assert (turn == ids[ASSISTANT]).sum() == 1
            told = all_targets != IGNORE
            shifted = words[1:][told[:-1]]
            assert (all_targets[told] == shifted).all()
            assert told[:middle].any()
            assert not (last[:middle] != IGNORE).any()
            assert (last[middle:] == all_targets[middle:]).all()


def test_a_conversation_is_what_the_chat_template_writes() -> None:
    processor = build_processor()
    scene = make_scene("development", 3)
    one, two = scene.questions[:2]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.text}]},
        {"role": "assistant", "content": one.answer},
        {"role": "user", "content": two.text},
    ]
    written = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = processor.tokenizer.encode(written, add_special_tokens=False)
    ids = word_ids()
    wanted = [ids[BOS], ids[USER], ids[IMAGE], *encode(one.text), ids[ASSISTANT]]
    wanted += [*encode(one.answer), ids[EOS], ids[USER], *encode(two.text), ids[ASSISTANT]]
    assert given == wanted


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 32, 16), (2, 16, 32)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_steps_as_torchs_own_would_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    torch.manual_seed(0)
    starts = [torch.randn(12, 5), torch.randn(5, 12), torch.randn(12, 5), torch.randn(7, 7)]
    given: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    ours, theirs = ([start.clone().requires_grad_() for start in starts] for _ in range(2))
    optimizers = Muon([{"params": ours}], **given), torch.optim.Muon(theirs, **given)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, mine, other in zip(starts, ours, theirs, strict=True):
        assert (mine - start).norm() > 0.05
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


def test_batches_are_the_same_every_time() -> None:
    spec = BatchSpec(2, views=2, with_patch_labels=True)
    first, again = make_batch(spec, 3), make_batch(spec, 3)
    for name, values in first.items():
        assert (values == again[name]).all()


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_training_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    stage = replace(STAGES[0], batch=replace(STAGES[0].batch, images=1))

    def fresh() -> Learner:
        torch.manual_seed(0)
        model, heads = build(1), make_heads()
        return Learner(model, heads, make_optimizers(model, heads, stage))

    def advance(learner: Learner, steps: range) -> None:
        for step in steps:
            loss, _ = tower_loss(learner, make_batch(stage.batch, step), stage, step, False)
            loss.backward()
            for optimizer in learner.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    whole, cut = fresh(), fresh()
    advance(whole, range(3))
    advance(cut, range(stop))
    save_checkpoint(tmp_path / "c.safetensors", cut, stop)
    resumed = fresh()
    done = load_checkpoint(tmp_path / "c.safetensors", resumed, with_optimizers=True)
    advance(resumed, range(done, 3))
    for (name, a), (_, b) in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("stride", [1, 2])
def test_shown_patches_are_those_that_show_something(stride: int) -> None:
    batch = make_batch(BatchSpec(4, with_owners=True), 0)
    owners = torch.as_tensor(batch["owners"])
    stage = next(s for s in STAGES if s.name == "sides")
    stage = replace(stage, visual_tokens=100, stride=stride)
    places = visible_places(stage, 3, owners)
    assert places.shape == (4, 100)
    assert (places.diff(dim=1) > 0).all()
    grid = torch.zeros(4, 576, dtype=torch.bool).scatter(1, places, True)
    if stride == 1:
        something = owners != NOTHING
        few = something.sum(1) <= 100
        assert few.any()
        assert grid[few][something[few]].all()
    else:
        assert len((places[0] // 24 % 2).unique()) == len((places[0] % 2).unique()) == 1


def test_every_auxiliary_loss_of_a_decoder_stage_reaches_the_decoder() -> None:
    torch.manual_seed(0)
    model, heads = build(len(ORIGINALS)), make_heads()
    stage = replace(
        next(s for s in STAGES if s.name == "sides"),
        visual_tokens=64,
        batch=BatchSpec(2, with_owners=True),
    )
    loss, shares = decoder_loss(
        Learner(model, heads, []), make_batch(stage.batch, 1), stage, 0, False
    )
    assert {"noun_loss", "gaze_loss_0", "gaze_loss_1", "side_loss", "back_loss"} <= set(shares)
    loss.backward()
    for name in ("noun", "side"):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads[name].parameters())


def test_side_labels_say_where_the_second_object_lies() -> None:
    asked = 0
    for index in range(60):
        scene = make_scene("development", index)
        for question in scene.questions:
            found = side_labels(question.text, scene.layout)
            if question.task != "relation":
                assert found is None
                continue
            asked += 1
            assert found is not None
            first, second, (below, right, told, holds) = found
            words = re.findall(r"\w+", question.text)
            relation = words[first + 1 + (words[first + 1] == "lie")]
            axis, positive = {
                "above": (below, 1),
                "below": (below, 0),
                "left": (right, 1),
                "right": (right, 0),
            }[relation]
            assert words[second] == words[-1]
            assert RELATIONS[told].split()[0] == relation
            assert holds == (question.answer == "yes")
            # "A above B" holds where B is below A.
            assert (axis == positive) == (question.answer == "yes")
    assert asked > 10
