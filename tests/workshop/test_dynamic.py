"""The second model's training parts: its forward pass is the model's own, targets are true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from atp_patch.builtin import load_builtin
from atp_patch.builtin.dynamic.sizes import (
    SIDES_PX,
    TOKEN_PX,
    at_size,
    laid_out,
    scene_size,
)
from atp_patch.builtin.dynamic.tokens import IMAGE_PAD, PREFIX, VISION_END, token_ids
from atp_patch.builtin.scenes import PATCH_PX, SceneConfig, make_scene
from atp_patch.builtin.tokens import PAD, VOCABULARY_SIZE, word_ids
from atp_patch.builtin.vocabulary import MAX_OBJECTS
from workshop.batches import BatchSpec, make_batch
from workshop.dynamic.architecture import build, start_from, trained_layers
from workshop.dynamic.batches import SizedSpec, sized_batch
from workshop.dynamic.forward import (
    decoder_forward,
    merged,
    tower_forward,
)
from workshop.dynamic.labels import token_middles, token_owners
from workshop.dynamic.objectives import distil_loss, questions_loss
from workshop.dynamic.stages import STAGES
from workshop.forward import to_pixel_values
from workshop.labels import NOTHING
from workshop.learner import Learner, make_heads, make_optimizers
from workshop.stage import Stage

SHORT = (192, 240)
OBLONG = next(k for k in range(99) if len(set(scene_size("train", k, SHORT))) == 2)


def lively() -> Qwen3VLForConditionalGeneration:
    """A random model whose every part matters."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.5 * weight[0].numel() ** -0.5)
            if "pos_embed" in name or "embed_tokens" in name:
                weight.normal_()
    return model


def cells(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the processor gives for (images, 3, height, width), written out by hand."""
    images, _, height, width = pixels.shape
    found = []
    for image in pixels:
        for top in range(0, height, TOKEN_PX):
            for left in range(0, width, TOKEN_PX):
                for y in range(top, top + TOKEN_PX, PATCH_PX):
                    for x in range(left, left + TOKEN_PX, PATCH_PX):
                        patch = image[:, y : y + PATCH_PX, x : x + PATCH_PX]
                        found.append(torch.stack([patch, patch], dim=1).flatten())
    grid = [1, height // PATCH_PX, width // PATCH_PX]
    return torch.stack(found), torch.tensor([grid] * images)


@torch.no_grad()
def test_packed_questions_equal_single_ones() -> None:
    model, known = lively(), token_ids()
    batch = sized_batch(SizedSpec(2, offset=OBLONG, sides_px=SHORT), 0)
    pixels, ids = to_pixel_values(batch["shown"]), torch.as_tensor(batch["ids"])
    rows, columns = (side // TOKEN_PX for side in pixels.shape[-2:])
    assert rows != columns
    visual = merged(model, tower_forward(model, pixels), rows, columns)
    logits = decoder_forward(model, visual, rows, columns, ids)
    patches, grids = cells(pixels)
    features = model.model.get_image_features(patches, grids).pooler_output
    torch.testing.assert_close(visual, torch.stack(features), atol=1e-4, rtol=1e-4)
    for row, question in ((0, 0), (1, 3)):
        text = ids[row, question]
        text = text[text != known[PAD]]
        image = torch.full((rows * columns,), known[IMAGE_PAD])
        before = torch.tensor([known[token] for token in PREFIX])
        whole = torch.cat([before, image, torch.tensor([known[VISION_END]]), text])[None]
        output = model(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            mm_token_type_ids=(whole == known[IMAGE_PAD]).int(),
            pixel_values=patches.unflatten(0, (2, -1))[row],
            image_grid_thw=grids[row : row + 1],
        )
        torch.testing.assert_close(
            logits[row, question, : len(text)],
            output.logits[0, -len(text) :],
            atol=1e-4,
            rtol=1e-4,
        )


def test_sizes_are_a_scenes_own() -> None:
    sizes = [scene_size("test", k) for k in range(300)]
    assert sizes == [scene_size("test", k) for k in range(300)]
    assert sizes != [scene_size("development", k) for k in range(300)]
    assert {side for size in sizes for side in size} == set(SIDES_PX)
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_at_its_first_size_a_scene_is_itself() -> None:
    for number in range(5):
        scene = make_scene("test", number)
        same = at_size(scene, (192, 192), SceneConfig().noise)
        assert same.layout == scene.layout
        assert same.image.tobytes() == scene.image.tobytes()


@pytest.mark.parametrize("size", [(208, 240), (240, 192)])
def test_a_larger_canvas_keeps_all_apart_and_all_answers_true(size: tuple[int, int]) -> None:
    for number in range(30):
        scene = make_scene("test", number)
        layout = laid_out(scene.layout, size)
        boxes = []
        for before, item in zip(scene.layout.objects, layout.objects, strict=True):
            assert (before.radius_px, before.shape) == (item.radius_px, item.shape)
            assert item.x_px / size[0] == pytest.approx(before.x_px / 192, abs=0.003)
            assert item.y_px / size[1] == pytest.approx(before.y_px / 192, abs=0.003)
            r = item.radius_px
            boxes.append((item.x_px - r, item.y_px - r, item.x_px + r, item.y_px + r))
        for plate in (layout.sign, layout.plate):
            if plate is not None:
                assert plate.x_px % PATCH_PX == plate.y_px % PATCH_PX == 0
                x, y = plate.x_px, plate.y_px
                boxes.append((x, y, x + plate.width_px, y + plate.height_px))
        for k, one in enumerate(boxes):
            assert min(one) >= 0
            assert one[2] <= size[0]
            assert one[3] <= size[1]
            for other in boxes[:k]:
                apart = max(
                    one[0] - other[2], other[0] - one[2], one[1] - other[3], other[1] - one[3]
                )
                assert apart > -PATCH_PX // 2


def test_signs_off_the_grid_stay_off_it() -> None:
    config = SceneConfig(sign_share=1.0, sign_step_px=1)
    places = [laid_out(make_scene("test", k, config).layout, (240, 208)).sign for k in range(20)]
    assert any(sign.x_px % PATCH_PX and sign.y_px % PATCH_PX for sign in places if sign)


@pytest.mark.parametrize("size", [(192, 192), (208, 240)])
def test_what_tokens_show(size: tuple[int, int]) -> None:
    for number in range(5):
        layout = laid_out(make_scene("train", number, tasks=()).layout, size)
        owners = token_owners(layout, size)
        near, shares = token_middles(layout, size)
        assert owners.shape == near.shape == shares.shape == (size[1] // 16, size[0] // 16)
        for k, item in enumerate(layout.objects):
            assert owners[item.y_px // TOKEN_PX, item.x_px // TOKEN_PX] == k
            assert shares[near == k].sum() == pytest.approx(4, abs=0.5)
            middle = (np.argwhere(owners == k).mean(0) + 0.5) * TOKEN_PX
            assert middle == pytest.approx((item.y_px, item.x_px), abs=12)
        assert not shares[near == NOTHING].any()
        sign = layout.sign
        characters = range(len(sign.text) if sign else 0)
        assert {k for k in owners.flat if k >= MAX_OBJECTS} - {NOTHING} <= {
            MAX_OBJECTS + k for k in characters
        }


def test_first_tokens_keep_their_numbers() -> None:
    ids = token_ids()
    assert {word: ids[word] for word in word_ids()} == word_ids()
    assert sorted(ids.values()) == list(range(len(ids)))
    assert len(ids) <= VOCABULARY_SIZE


@pytest.fixture(scope="module")
def begun() -> tuple[Qwen3VLForConditionalGeneration, Learner]:
    """The model before its first step, and the first model as its teacher."""
    first, _ = load_builtin()
    batch = make_batch(BatchSpec(1, questions=4), 0)
    torch.manual_seed(0)
    pixels, ids = to_pixel_values(batch["pixels"]), torch.as_tensor(batch["ids"])
    return start_from(first, pixels, ids), Learner(first, make_heads(), [])


def test_it_starts_as_the_first_model(
    begun: tuple[Qwen3VLForConditionalGeneration, Learner],
) -> None:
    model, first = begun
    layers = model.model.language_model.layers
    for layer, old in zip(layers, trained_layers(first.model), strict=True):
        assert torch.equal(layer.self_attn.o_proj.weight, old.self_attn.o_proj.weight)
        assert torch.equal(layer.mlp.up_proj.weight, old.mlp.up_proj.weight)
        assert len(layer.self_attn.q_norm.weight.unique()) == 1
    batch = sized_batch(replace(STAGES[0].batch, images=1), 0)
    learner = Learner(model, make_heads(), [])
    loss, shares = distil_loss(learner, first.model, batch, 0)
    assert loss.requires_grad
    assert all(shares[f"layer_error_{k}"] < 0.5 for k in range(4)), shares
    assert shares["token_error"] < 0.7


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_a_stage_trains_what_it_should(
    stage: Stage, begun: tuple[Qwen3VLForConditionalGeneration, Learner]
) -> None:
    model, first = begun
    heads = make_heads()
    learner = Learner(model, heads, make_optimizers(model, heads, stage))
    batch = sized_batch(replace(stage.batch, images=1), 0)
    if stage.kind == "distil":
        loss, _ = distil_loss(learner, first.model, batch, 0)
    else:
        loss, _ = questions_loss(learner, stage, batch, 0)
    loss.backward()
    groups = [group for optimizer in learner.optimizers for group in optimizer.param_groups]
    trained = {id(p) for group in groups for p in group["params"]}
    moved = {n for n, p in model.named_parameters() if p.grad is not None and id(p) in trained}
    model.zero_grad()
    assert any(".merger." in name for name in moved)
    assert any(".blocks." in name for name in moved) == (stage.tower_rate > 0)
    assert any("language_model" in name for name in moved) == (stage.kind == "shallow")


def test_the_log_is_of_all_stages() -> None:
    log = Path(__file__).parents[2] / "workshop" / "dynamic" / "training.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    last = {line["stage"]: line["step"] for line in lines}
    assert list(last) == [stage.name for stage in STAGES]
    assert all(stage.steps - 20 < last[stage.name] <= stage.steps for stage in STAGES)
