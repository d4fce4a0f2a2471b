"""Calls that need one argument more: the error names it, and with it the call works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import atp_patch
from tests.families import gemma4, latents, mrope
from tests.families.kinds import MIXED, SINGLE, TWO, Batch, Kind, make
from tests.families.tables import ROTARY_PLACES, every_kind, one_of_each_table, with_rotary_places
from tests.families.test_every_family import patched, placed
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Inputs, real_mask
from tests.helpers.oracle import masked_logits
from tests.helpers.run import forward, generate, kept_of

ROWS_BY_IDS = ("llava-pixtral", "mistral3")
WITHOUT_FEATURES = "granite4_vision"  # its pictures enter as zeros
ROWS_BY_POSITIONS = tuple(kind.name for kind in ROTARY_PLACES)
GRIDS = (
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "image_attention_mask",
    "image_merge_sizes",
    "video_merge_sizes",
    "image_position_ids",
    "spatial_shapes",
    "target_sizes",
    "target_sizes_videos",
)


def placeholders(model: Any, inputs: Inputs) -> Tensor:
    """(B, L) bool: every id of an image or video, grid or not."""
    names = ("image_token_id", "video_token_id", "image_token_index")
    configs = (model.config, getattr(model.config, "vision_config", None))
    ids = [getattr(config, name, None) for config in configs for name in names]
    wanted = torch.tensor([token_id for token_id in ids if token_id is not None])
    return torch.isin(inputs["input_ids"], wanted)


def layout(model: Any) -> Tensor:
    """(6, B, V): position, image, frame, row and column of each visual token, and its slot."""
    found = atp_patch.last_trace(model).layout
    table = (found.position, found.image, found.frame, found.row, found.column, found.valid)
    return torch.stack([part.long() for part in table])


def embedded(model: Any, inputs: Inputs) -> Inputs:
    """The same call with the embeddings that the plain model's decoder gets in place of ids."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Phi-4's decoder makes its embeddings itself, and hands them to its first layer.
        seen.append(args[0] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"])

    # Early versions of Qwen's Omni models name themselves as their decoder.
    decoder = model.get_decoder() if model.get_decoder() is not model else model.model
    inside = model.config.model_type == "phi4_multimodal"
    watched = decoder.layers[0] if inside else decoder
    handle = watched.register_forward_pre_hook(note, with_kwargs=True)
    forward(model, inputs)
    handle.remove()
    return {"inputs_embeds": seen[0], "attention_mask": inputs["attention_mask"]}


def flat_positions(inputs: Inputs) -> Tensor:
    """(B, L): each token's number in its prompt, as for a model of text."""
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


# -- Position ids that show no grid ---------------------------------------------------------------


@with_rotary_places
@pytest.mark.parametrize("videos", [False, True], ids=["images", "videos"])
def test_flat_positions_are_taken_as_the_plain_model_takes_them(kind: Kind, videos: bool) -> None:
    if videos and not kind.videos:
        pytest.skip("the model takes no videos")
    plain, model = kind.build(), patched(kind, keep=1.0)
    batch = make(kind, kind.video_samples if videos else MIXED)
    given = {**batch.inputs, "position_ids": flat_positions(batch.inputs)}
    assert torch.equal(forward(model, given).logits, forward(plain, given).logits)
    assert torch.equal(generate(model, given, 3), generate(plain, given, 3))
    pruned = patched(kind)
    forward(pruned, batch.inputs)
    wanted = layout(pruned)
    logits, kept = forward(pruned, given).logits, kept_of(pruned)
    assert torch.equal(layout(pruned), wanted)
    assert (placed(batch) & ~kept[max(kept)]).any(), "nothing was pruned: this shows nothing"
    assert_close(logits, masked_logits(plain, given, kept), kept[max(kept)])


@with_rotary_places
def test_flat_positions_of_beams_are_placed_sample_by_sample(kind: Kind) -> None:
    if kind.name in ("qwen3_vl", "qwen3_vl-flat", "qwen3_vl_moe"):
        pytest.skip("the plain model cannot search with beams without features of deepstack")
    model, inputs = patched(kind), make(kind, TWO + SINGLE).inputs
    given = {**inputs, "position_ids": flat_positions(inputs)}
    forward(model, given)
    wanted = layout(model)
    generate(model, given, 2, num_beams=2)
    assert torch.equal(layout(model), wanted.repeat_interleave(2, 1))


@with_rotary_places
def test_embeddings_need_the_grids(kind: Kind) -> None:
    model = patched(kind)
    batch = make(kind, TWO)
    given = embedded(kind.build(), batch.inputs)
    given["visual_mask"] = placeholders(model, batch.inputs)
    forward(model, batch.inputs)
    wanted = layout(model)
    grids = {name: batch.inputs[name] for name in GRIDS if name in batch.inputs}
    runs: list[Any] = [forward]
    if kind.name != "ernie4_5_vl_moe":  # which the plain model cannot generate from
        runs.append(lambda model, inputs: generate(model, inputs, 2))
    for run in runs:
        with pytest.raises(atp_patch.InputError, match="pass image_grid_thw"):
            run(model, given)
        run(model, {**given, **grids})
        assert torch.equal(layout(model), wanted)


def test_grids_of_other_prompts_are_named() -> None:
    kind = next(kind for kind in mrope.KINDS if kind.name == "qwen2_vl")
    model, inputs = patched(kind), make(kind, TWO).inputs
    given = embedded(kind.build(), inputs)
    given["visual_mask"] = placeholders(model, inputs)
    thw = inputs["image_grid_thw"]
    for wrong, message in (
        (torch.cat([thw, thw[:1]]), "image_grid_thw has 1 pictures more"),
        (thw[:1], "are not the pictures that image_grid_thw says"),
        (thw.flip(0), "are not the pictures that image_grid_thw says"),
    ):
        with pytest.raises(atp_patch.InputError, match=message):
            forward(model, {**given, "image_grid_thw": wrong})
    both = {**given, "image_grid_thw": thw, "video_grid_thw": thw}
    with pytest.raises(atp_patch.InputError, match="do not tell images from videos"):
        forward(model, both)
    base = model.model
    positions = base.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=thw,
        attention_mask=inputs["attention_mask"],
    )[0]
    forward(model, {**given, "position_ids": positions})
    assert atp_patch.last_trace(model).layout.totals == (24 + 35,)


# -- Embeddings in place of ids -------------------------------------------------------------------


@every_kind
def test_embeddings_need_a_visual_mask(kind: Kind) -> None:
    if kind.name == gemma4.SHARED:
        pytest.skip("the plain model finds the words of embeddings, for inputs of each layer")
    model = patched(kind)
    batch = make(kind, TWO)
    given = embedded(kind.build(), batch.inputs)
    forward(model, batch.inputs)
    wanted = layout(model)
    with pytest.raises(atp_patch.InputError, match="visual_mask="):
        forward(model, given)
    given["visual_mask"] = placeholders(model, batch.inputs)
    if kind.name in ROWS_BY_IDS:
        with pytest.raises(atp_patch.InputError, match="pass input_ids in place"):
            forward(model, given)
        return
    given.update({name: batch.inputs[name] for name in GRIDS if name in batch.inputs})
    if kind.name == WITHOUT_FEATURES:
        with pytest.raises(atp_patch.InputError, match="the features that the model itself makes"):
            forward(model, given)
        return
    forward(model, given)
    assert torch.equal(layout(model), wanted)
    given["visual_mask"] = torch.zeros_like(given["visual_mask"])
    plain = {name: value for name, value in given.items() if name != "visual_mask"}
    expected = forward(kind.build(), plain).logits
    assert torch.equal(forward(patched(kind), given).logits, expected)


@one_of_each_table
def test_generate_knows_embeddings_by_the_ids_beside_them(kind: Kind) -> None:
    if kind.name == WITHOUT_FEATURES:
        pytest.skip("its embeddings hold no features of pictures")
    plain, model = kind.build(), patched(kind)
    batch = make(kind, TWO)
    forward(model, batch.inputs)
    wanted = layout(model)
    given = {**embedded(plain, batch.inputs), "input_ids": batch.inputs["input_ids"]}
    given.update({name: batch.inputs[name] for name in GRIDS if name in batch.inputs})
    try:
        expected = generate(plain, given, 2)
    except (ValueError, RuntimeError) as error:  # an early Gemma 4 raises the second
        pytest.skip(f"the plain model takes no embeddings: {error}")
    generate(model, given, 2)
    assert torch.equal(layout(model), wanted)
    assert torch.equal(generate(patched(kind, keep=1.0), given, 2), expected)


@one_of_each_table
def test_random_embeddings_beside_ids_are_no_puzzle(kind: Kind) -> None:
    """Where ids say what is visual, embeddings may be anything but lack the ends of rows."""
    plain, model = kind.build(), patched(kind)
    batch = make(kind, SINGLE)
    given = {**embedded(plain, batch.inputs), "input_ids": batch.inputs["input_ids"]}
    given.update({name: batch.inputs[name] for name in GRIDS if name in batch.inputs})
    generator = torch.Generator().manual_seed(0)
    given["inputs_embeds"] = torch.randn(given["inputs_embeds"].shape, generator=generator)
    try:
        generate(plain, given, 2)
    except (ValueError, RuntimeError) as error:  # an early Gemma 4 raises the second
        pytest.skip(f"the plain model takes no embeddings: {error}")
    if kind.name.startswith(("llava_next", "llava_onevision", WITHOUT_FEATURES)):
        with pytest.raises(atp_patch.InputError, match="the features that the model itself makes"):
            generate(model, given, 2)
        return
    generate(model, given, 2)
    assert (placed(batch) & ~kept_of(model)[max(kind.layers)]).any()


# -- Attention masks that hide a part of an image -------------------------------------------------


def hidden(batch: Batch, where: Tensor) -> Inputs:
    return {**batch.inputs, "attention_mask": (real_mask(batch.inputs) & ~where).long()}


@every_kind
def test_a_mask_hides_whole_images_or_none(kind: Kind) -> None:
    if kind.name in (*ROWS_BY_POSITIONS, "hunyuan_vl", "minicpmv4_7"):
        pytest.skip("the plain model itself needs position ids for what a mask hides")
    if kind in latents.KINDS:
        pytest.skip("learned queries have no places, so any of them are an image")
    plain, model = kind.build(), patched(kind)
    batch = make(kind, TWO)
    visual = placeholders(model, batch.inputs)
    places = visual[0].nonzero().flatten()
    part = torch.zeros_like(visual)
    part[0, places[3:5]] = True
    with pytest.raises(atp_patch.InputError, match="attention_mask hides a part of an image"):
        forward(model, hidden(batch, part))
    forward(model, batch.inputs)
    everything = hidden(batch, visual)
    assert torch.equal(forward(model, everything).logits, forward(plain, everything).logits)
