"""PruMerge before the decoder: the paper's algorithm, masked from layer 0, batches, caches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import atp_patch
from tests.families.kinds import VIDEOS, make
from tests.families.test_mends import embedded
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.inputs import real_mask
from tests.helpers.pairing import in_turn, name_of, pairs
from tests.helpers.run import Session, forward, generate, kept_of, words
from tests.seam.vision_cases import CASES, KINDS, MORE, NEIGHBOURS, SMALL, Case, expected

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
both = pytest.mark.parametrize("method", ["prumerge", "prumerge+"])
LLAVA = CASES[0]
ONLY_READ = ("gemma3", "qwen3_vl", "llava-pixtral", "mistral3", "lighton_ocr", "lfm2_vl")
ONLY_READ += ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
LATER = [case for case in MORE if case.name not in ONLY_READ]
WHOLE = [case for case in CASES if "next" not in case.name and "onevision" not in case.name]


def patched(case: Case, method: str = "prumerge+", **options: Any) -> Any:
    return atp_patch.patch_model(
        case.build(), method=method, **{"neighbours": NEIGHBOURS, **options}
    )


@pairs(case=CASES, method=["prumerge", "prumerge+"], share=[None, 0.3])
def test_the_decoder_gets_what_the_algorithm_says(
    case: Case, method: str, share: float | None
) -> None:
    plain, model = case.build(), patched(case, method, keep=share)
    inputs = case.feed(plain, "left")
    logits, kept = forward(model, inputs).logits, kept_of(model)[0]
    wanted, reference = expected(case, plain, inputs, method == "prumerge+", share)
    assert torch.equal(kept, wanted)
    assert (real_mask(inputs) & ~kept).any(), "nothing was pruned: this shows nothing"
    assert_close(logits, reference, kept)


@pytest.mark.parametrize(
    ("case", "setting"), in_turn(LATER, [("prumerge", 0.3), ("prumerge+", None)]), ids=name_of
)
def test_later_families_get_what_the_algorithm_says(
    case: Case, setting: tuple[str, float | None]
) -> None:
    method, share = setting
    test_the_decoder_gets_what_the_algorithm_says(case, method, share)
    plain, model = case.build(), patched(case, keep=1.0)
    inputs = case.feed(plain, "left")
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)


@every_case
def test_keeping_all_is_plain_bit_for_bit(case: Case) -> None:
    plain, model = case.build(), patched(case, keep=1.0)
    inputs = case.feed(plain, "left")
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
    assert torch.equal(generate(model, inputs, 3), generate(plain, inputs, 3))


@every_case
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_batch_is_its_samples_alone(case: Case, padding: str) -> None:
    model = patched(case)
    inputs = case.feed(model, padding)
    together, kept = forward(model, inputs).logits, None
    kept = kept_of(model)[0]
    counts = set()
    for b in range(case.count):
        real, single = real_mask(inputs)[b], case.alone(model, b)
        alone = forward(model, single).logits
        if not kept[b][real].all():
            assert torch.equal(kept[b, real], kept_of(model)[0][0])
        counts.add(int(kept[b].sum()))
        assert_close(together[b, real][None], alone, kept[b, real][None])
    assert len(counts) > 1, "every sample keeps as many: this shows nothing of ragged batches"


@every_case
def test_the_cache_changes_no_answer(case: Case) -> None:
    model = patched(case)
    inputs = case.feed(model, "left")
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (
        generate(model, inputs, 5, use_cache=use, **wanted) for use in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(uncached.logits))
    layer = cached.past_key_values.layers[0]
    assert layer.keys.shape[2] < inputs["input_ids"].shape[1]
    assert layer.get_seq_length() == inputs["input_ids"].shape[1] + 4


@every_case
def test_unpatching_leaves_nothing(case: Case) -> None:
    model = case.build()
    inputs = case.feed(model, "left")
    plain, before = forward(model, inputs).logits, snapshot(model)
    atp_patch.patch_model(model, method="prumerge")
    forward(model, inputs)
    generate(model, inputs, 2)
    atp_patch.unpatch_model(model)
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs).logits, plain)


def test_a_static_cache_and_a_copied_model_answer_alike(tmp_path: Path) -> None:
    model = patched(LLAVA)
    torch.save(model, tmp_path / "model.pt")
    inputs = LLAVA.feed(model, "left")
    expected = generate(model, inputs, 5)
    assert torch.equal(generate(model, inputs, 5, cache_implementation="static"), expected)
    twin = copy.deepcopy(model)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    atp_patch.unpatch_model(model)
    plain = generate(model, inputs, 5)
    for other in (twin, loaded):
        assert torch.equal(generate(other, inputs, 5), expected)
        atp_patch.unpatch_model(other)
        assert torch.equal(generate(other, inputs, 5), plain)


def test_later_turns_see_the_kept_tokens_alone() -> None:
    """Feeding on by hand equals the uncached pass over everything."""
    model = patched(LLAVA)
    inputs = LLAVA.feed(model, "left")
    session = Session(model, inputs)
    fork = session.fork()
    one = session.feed(words(4, 3))
    several = torch.cat([fork.feed(ids) for ids in words(4, 3).split(1, dim=1)], 1)
    assert_close(several, one)
    whole = forward(model, session.inputs, use_cache=False).logits[:, -3:]
    assert_close(one, whole)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_of_a_batch_are_its_samples_beams(options: dict[str, int]) -> None:
    for case in (LLAVA, CASES[1]):
        model = patched(case)
        together = generate(model, case.feed(model, "left"), 4, **options)
        times = options.get("num_return_sequences", 1)
        for b in range(case.count):
            alone = generate(model, case.alone(model, b), 4, **options)
            assert torch.equal(together[b * times : (b + 1) * times, -4:], alone[:, -4:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_may_change_after_patching(attention: str) -> None:
    case = CASES[1]
    model = patched(case)
    inputs = case.feed(model, "left")
    logits = forward(model, inputs).logits
    kept = kept_of(model)[0]
    model.set_attn_implementation(attention)
    assert_close(forward(model, inputs).logits, logits, kept)
    assert torch.equal(kept_of(model)[0], kept)


@both
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_target_tokens_are_met_by_every_sample(case: Case, method: str) -> None:
    model = patched(case, method, target_tokens=9)
    inputs = case.feed(model, "left")
    forward(model, inputs)
    trace = atp_patch.last_trace(model)
    assert set(trace.tokens_per_layer.flatten().tolist()) <= {0, 9}
    generate(model, inputs, 2, num_beams=2 if case.beams else 1)
    assert atp_patch.last_trace(model).average_tokens == 9
    assert trace.average_tokens == 9


def test_every_image_tile_and_frame_keeps_its_minimum() -> None:
    for case in (LLAVA, CASES[1]):
        model = patched(case, "prumerge", min_tokens_per_image=4)
        forward(model, case.feed(model, "left"))
        trace = atp_patch.last_trace(model)
        layout, kept = trace.layout, trace.layers[0].kept
        for b, total in enumerate(layout.totals):
            stays = kept[b, layout.position[b, :total]]
            for image in layout.image[b, :total].unique():
                for frame in layout.frame[b, :total].unique():
                    here = (layout.image[b, :total] == image) & (layout.frame[b, :total] == frame)
                    assert not here.any() or stays[here].sum() >= 4


def test_outputs_hold_no_tombstones() -> None:
    model = patched(LLAVA)
    inputs = LLAVA.feed(model, "left")
    out = forward(model, inputs, output_hidden_states=True, return_dict=True)
    kept = kept_of(model)[0]
    for states in (*out.hidden_states, out.logits, *out.image_hidden_states):
        assert not states.isnan().any()
    assert not out.hidden_states[0][real_mask(inputs) & ~kept].any()


def test_features_asked_for_by_themselves_are_the_plain_ones() -> None:
    plain, model = LLAVA.build(), patched(LLAVA)
    inputs = LLAVA.feed(model, "left")
    forward(model, inputs)
    pixels = inputs["pixel_values"]
    expected, actual = (
        m.get_image_features(pixels, vision_feature_layer=-2).pooler_output for m in (plain, model)
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    with atp_patch.disabled(model):
        assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)


@pytest.mark.parametrize("method", ["prumerge+", "downsample"])
def test_features_in_place_of_pictures_are_refused(method: str) -> None:
    """The tower does not run, so nothing would be pruned."""
    plain = LLAVA.build()
    model = atp_patch.patch_model(LLAVA.build(), method=method, keep=0.5)
    inputs = LLAVA.feed(plain, "left")
    given = {**embedded(plain, inputs), "input_ids": inputs["input_ids"]}
    with pytest.raises(atp_patch.InputError, match="features in place of pictures"):
        generate(model, given, 2)
    with atp_patch.disabled(model):
        assert torch.equal(generate(model, given, 2), generate(plain, given, 2))


def test_gradients_reach_the_projector_through_the_kept_tokens() -> None:
    model = patched(LLAVA)
    inputs = LLAVA.feed(model, "left")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [p.grad for p in model.model.multi_modal_projector.parameters()]
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("samples", [SMALL, VIDEOS], ids=["pictures", "videos"])
def test_grids_that_the_model_resizes_later_are_refused(samples: Any) -> None:
    kind = KINDS["llava_onevision"]
    model = atp_patch.patch_model(kind.build(), method="prumerge")
    with pytest.raises(atp_patch.InputError, match="pictures of fewer tiles"):
        forward(model, make(kind, samples).inputs)


def test_deepstack_is_refused() -> None:
    for method in ("prumerge", "downsample"):
        with pytest.raises(atp_patch.UnsupportedModelError, match=r"qwen2_vl, qwen3_5, .*internvl"):
            atp_patch.patch_model(KINDS["qwen3_vl"].build(), method=method)


def test_models_that_cannot_are_refused_by_name() -> None:
    able = "llava_next, video_llava, qwen2_vl, qwen3_vl, qwen3_5, exaone4_5, internvl"
    # A family is not named to its own model, whose tower is another one.
    for name, others in (("paligemma", f"llava, {able}"), ("llava-pixtral", f"do: {able}")):
        with pytest.raises(atp_patch.UnsupportedModelError, match=others):
            atp_patch.patch_model(KINDS[name].build(), method="prumerge")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "leave layers out"),
        ({"neighbours": -1}, "at least 0"),
        ({"keep": [0.5, 0.5]}, "2 shares"),
        ({"keep": 0.0}, "above 0"),
        ({"target_tokens": 0}, "above 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    model = LLAVA.build()
    before = snapshot(model)
    with pytest.raises(atp_patch.ConfigError, match=message):
        atp_patch.patch_model(model, method="prumerge", **options)
    assert snapshot(model) == before


def test_tiles_take_no_target_and_embeddings_none() -> None:
    with pytest.raises(atp_patch.ConfigError, match="give keep="):
        patched(next(c for c in CASES if c.name == "llava_next"), target_tokens=9)
    model = patched(LLAVA, target_tokens=9)
    inputs = LLAVA.feed(model, "left")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(atp_patch.InputError, match="pass input_ids"):
        forward(model, {**inputs, "inputs_embeds": embeds})
