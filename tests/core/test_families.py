"""Where visual tokens lie, from a family's own metadata, against an independent derivation."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlavaConfig

import atp_patch
from atp_patch.contract import GridQuery, Layout, Span, VisualGrid
from atp_patch.families import FAMILIES, Family, family_of
from tests.helpers import inputs as made
from tests.helpers import tiny
from tests.helpers.tiny import tiny_model


def traced(model: Any, prompts: Any, padding: str = "left") -> tuple[atp_patch.PruningTrace, Any]:
    atp_patch.patch_model(model, [2, 4, 6], "uniform", keep=0.5)
    inputs = made.batch(model, prompts, padding)
    with torch.no_grad():
        model(**inputs)
    return atp_patch.last_trace(model), inputs


def expected_grids(model: Any, prompts: Any) -> list[list[tuple[int, int, int]]]:
    """(frames, height, width) of each sample's images as the prompt asks for them."""
    llava = tiny.is_llava(model)
    result = []
    for prompt in prompts:
        sample = []
        for piece in prompt.pieces:
            if isinstance(piece, made.Image):
                side = tiny.CLIP_SIDE
                sample.append((1, side, side) if llava else (1, piece.height, piece.width))
            elif isinstance(piece, made.Video):
                sample.append((piece.frames, piece.height, piece.width))
        result.append(sample)
    return result


@pytest.mark.parametrize("kind", ["llava-llama", "qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["SINGLE", "TWO_IMAGES", "MIXED", "RAGGED", "VIDEO"])
def test_grids_are_the_prompts(kind: str, padding: str, name: str) -> None:
    if name == "VIDEO" and kind.startswith("llava"):
        pytest.skip("llava has no video input")
    model, prompts = tiny_model(kind), getattr(made, name)
    trace, inputs = traced(model, prompts, padding)
    found = [[(g.frames, g.height, g.width) for g in sample] for sample in trace.grids]
    assert found == expected_grids(model, prompts)
    assert torch.equal(trace.visual, made.visual_mask(inputs))
    layout = trace.layout
    for b in range(len(prompts)):
        positions = torch.nonzero(made.visual_mask(inputs)[b])[:, 0]
        assert torch.equal(layout.position[b][layout.valid[b]], positions)


def test_images_without_text_between_are_told_apart() -> None:
    model = tiny_model("llava-llama")
    trace, _ = traced(model, (made.prompt(made.Image(), made.Image(), made.Words(5), seed=1),))
    assert [(g.start, g.height, g.width) for g in trace.grids[0]] == [(1, 6, 6), (37, 6, 6)]


def test_strided_grids_leave_their_gaps_alone() -> None:
    # Two rows of three tokens with a newline after each; then two frames behind a class token.
    rows = VisualGrid(start=4, frames=1, height=2, width=3, row_stride=4)
    frames = VisualGrid(start=20, frames=2, height=1, width=2, frame_stride=3)
    layout = Layout.from_grids([[rows, frames], []], 30, torch.device("cpu"))
    assert layout.totals == (10, 0)
    assert layout.position[0].tolist() == [4, 5, 6, 8, 9, 10, 20, 21, 23, 24]
    assert layout.image[0].tolist() == [0] * 6 + [1] * 4
    assert layout.frame[0].tolist() == [0] * 8 + [1, 1]
    assert layout.row[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert layout.column[0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1]
    assert layout.mask[0].nonzero()[:, 0].tolist() == layout.position[0].tolist()
    assert not layout.mask[1].any()


def test_full_selection_keeps_the_class_token_out_of_the_grid() -> None:
    config = LlavaConfig(vision_feature_select_strategy="full")
    config.vision_config.image_size, config.vision_config.patch_size = 48, 8
    query = GridQuery(config, [[Span(3, 40, 5)]], None)
    assert family_of(config).grids(query) == [[VisualGrid(4, 1, 6, 6)]]


def test_images_of_fast_vlm_are_of_the_usual_size_or_one_square() -> None:
    config = SimpleNamespace(model_type="fast_vlm", image_seq_length=16)
    for length, sides in ((64, [4, 4, 4, 4]), (16, [4]), (36, [6])):
        grids = family_of(config).grids(GridQuery(config, [[Span(3, 3 + length, 5)]], None))[0]
        assert [(grid.height, grid.width) for grid in grids] == [(side, side) for side in sides]
        assert grids[-1].start == 3 + length - sides[-1] ** 2
    with pytest.raises(atp_patch.UnsupportedModelError, match="35 visual tokens"):
        family_of(config).grids(GridQuery(config, [[Span(0, 35, 5)]], None))


def test_perception_lm_asks_for_the_number_of_its_patches() -> None:
    vision = SimpleNamespace(model_args={})
    config = SimpleNamespace(
        model_type="perception_lm",
        vision_config=vision,
        projector_pooling_ratio=2,
        video_token_id=8,
    )
    query = GridQuery(config, [[Span(0, 8, 5), Span(9, 17, 8)]], None)
    with pytest.raises(atp_patch.UnsupportedModelError, match="ref_feat_shape"):
        family_of(config).grids(query)
    vision.model_args["ref_feat_shape"] = [4, 4]
    assert family_of(config).grids(query) == [
        [VisualGrid(0, 1, 2, 2), VisualGrid(4, 1, 2, 2), VisualGrid(9, 2, 2, 2)]
    ]


def test_runs_of_molmo2_without_marks_are_squares() -> None:
    config = SimpleNamespace(model_type="molmo2")
    rows = [Span(20, 23, 5), Span(24, 27, 5)]
    found = family_of(config).grids(GridQuery(config, [[Span(0, 16, 5), *rows]], None))
    assert found == [[VisualGrid(0, 1, 4, 4), VisualGrid(20, 1, 2, 3, row_stride=4)]]
    for wrong, match in (([Span(0, 15, 5)], "no square"), ([*rows, Span(28, 30, 5)], "different")):
        with pytest.raises(atp_patch.InputError, match=match):
            family_of(config).grids(GridQuery(config, [wrong], None))


def test_rows_that_are_counted_slower_than_they_come_still_make_frames() -> None:
    """Transformers 5.4 repeats each row's number for all frames of a video in a row."""
    h = torch.arange(2).repeat_interleave(9)
    w = torch.arange(3).repeat(6)
    thw = torch.stack([torch.zeros_like(h), h, w])[:, None]
    config = tiny_model("qwen2_vl").config
    found = family_of(config).grids(GridQuery(config, [[Span(0, 18, 8)]], thw))
    assert found == [[VisualGrid(0, 3, 2, 3)]]


def test_a_run_of_placeholders_that_is_no_image_is_refused() -> None:
    config = LlavaConfig()
    config.vision_config.image_size, config.vision_config.patch_size = 48, 8
    with pytest.raises(atp_patch.UnsupportedModelError, match="35 visual tokens"):
        family_of(config).grids(GridQuery(config, [[Span(0, 35, 5)]], None))


def test_qwen_without_its_position_ids_says_what_to_pass() -> None:
    config = tiny_model("qwen2_vl").config
    with pytest.raises(atp_patch.InputError, match="pass image_grid_thw"):
        family_of(config).grids(GridQuery(config, [[Span(0, 8, 5)]], None))
    ragged = torch.tensor([[[0] * 7], [[0, 0, 0, 1, 1, 1, 2]], [[0, 1, 2, 0, 1, 2, 0]]])
    with pytest.raises(atp_patch.InputError, match="do not show the grids"):
        family_of(config).grids(GridQuery(config, [[Span(0, 7, 5)]], ragged))


@pytest.mark.parametrize("model_type", ["mllama", "bert", None])
def test_unknown_models_are_refused_with_the_known_ones(model_type: str | None) -> None:
    with pytest.raises(atp_patch.UnsupportedModelError, match=r"supported.*llava.*qwen2_vl"):
        family_of(SimpleNamespace(model_type=model_type))


def test_images_of_pixtral_are_told_apart_by_what_ends_them() -> None:
    config = LlavaConfig(vision_config={"model_type": "pixtral"}, image_token_index=5)
    brk, end = 6, 7
    one, two = [5, 5, brk, 5, 5, end], [5, 5, 5, end]  # 2 x 2 and 1 x 3, nothing between
    ids = torch.tensor([[1, *one, *two, *one, 9, *two, 9]])
    visual = (ids == 5).long()
    edges = visual[0].diff(prepend=torch.zeros(1, dtype=torch.long)).nonzero().flatten().tolist()
    spans = [Span(a, b, 5) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    grids = family_of(config).grids(GridQuery(config, [spans], None, ids))[0]
    found = [(grid.start, grid.height, grid.width, grid.row_stride) for grid in grids]
    assert found == [(1, 2, 2, 3), (7, 1, 3, 4), (11, 2, 2, 3), (18, 1, 3, 4)]
    with pytest.raises(atp_patch.InputError, match="input_ids"):
        family_of(config).grids(GridQuery(config, [spans], None))


def test_models_without_images_are_refused() -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, vocab_size=50, **small))
    bert = BertModel(BertConfig(num_hidden_layers=2, vocab_size=50, **small))
    for model in (llama, bert, torch.nn.Linear(2, 2)):
        with pytest.raises(atp_patch.UnsupportedModelError):
            atp_patch.patch_model(model, [2])
        assert not model._forward_pre_hooks


def test_supported_families_lists_model_types() -> None:
    listed = atp_patch.supported_families()
    assert listed["llava"] == ("llava", "vipllava")
    assert listed["qwen2_vl"] == ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_are_pickled_as_their_names(family: Family) -> None:
    """So that a patched model of any family can be saved whole and handed to other processes."""
    assert pickle.loads(pickle.dumps(family)) is family
    assert copy.deepcopy(family) is family


def _no_tower(config: Any) -> None:
    return None


def test_a_family_of_ones_own_is_pickled_as_it_is() -> None:
    own = replace(FAMILIES[0], name="own", model_types=("own",), tower=_no_tower)
    assert pickle.loads(pickle.dumps(own)) == own
