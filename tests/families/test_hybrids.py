"""Decoders some of whose layers keep a state in place of keys: what becomes of the state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import cache_utils

import atp_patch
from atp_patch.evaluation.layers_once import LayersOnce
from tests.families import hybrids
from tests.families.hosts import REPEATS_SAMPLES, skip_where_states_take_one_token_at_a_time
from tests.families.kinds import MIXED, SINGLE, Kind, Picture, Sample, Words, make, sample
from tests.families.tables import rows
from tests.families.test_every_family import check_masked, patched, placed
from tests.helpers import tiny
from tests.helpers.compare import assert_close, assert_same_choice
from tests.helpers.doors import TowerReader
from tests.helpers.inputs import Inputs, extended, real_mask
from tests.helpers.oracle import Kept, decoder_layers, unseen_logits
from tests.helpers.run import forward, generate, kept_of, words
from tests.seam.vision_cases import FILMS, NEIGHBOURS, QWEN, Case
from tests.seam.vision_cases import expected as merged_logits

KINDS = [kind for kind in hybrids.KINDS if kind.name in ("qwen3_5", "lfm2_vl")]
MORE = [kind for kind in hybrids.KINDS if kind not in KINDS]
TOWERS = [kind for kind in hybrids.KINDS if kind.name.startswith("qwen")]
hybrid = rows(KINDS, MORE)
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
ALIKE = (
    sample(Words(3), Picture(0), Words(9), seed=1),
    sample(Words(3), Picture(0), Words(9), seed=9),
)


def unseen(kind: Kind, inputs: Inputs, kept: Kept, more: Tensor) -> Tensor:
    """(B, n, vocabulary) logits at the last n of the places that ``more`` (B, n) words fill."""
    longer = extended(inputs, more)
    grown = {
        layer: torch.nn.functional.pad(mask, (0, more.shape[1]), value=True)
        for layer, mask in kept.items()
    }
    return unseen_logits(kind.build(), longer, grown)[:, -more.shape[1] :]


def feed(
    model: Any, cache: Any, inputs: Inputs, ids: Tensor, rows: list[int] | None = None
) -> Tensor:
    """(B, n, vocabulary) logits of n more words behind what the cache holds.

    ``rows`` are the samples that the rows of the cache were in the first pass.
    """
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    given = {"input_ids": ids, "attention_mask": mask}
    deltas = getattr(model.model, "rope_deltas", None)
    if deltas is not None:  # as ``generate`` gives them
        text = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
        deltas = deltas if rows is None else deltas[rows]
        given["position_ids"] = torch.cat([text[None], (text + deltas).expand(3, -1, -1)])
    return forward(model, given, past_key_values=cache, use_cache=True).logits


def even(kind: Kind) -> tuple[Sample, Sample]:
    """Two samples of as many tokens, whose pictures are not as large."""
    longer, shorter = (make(kind, [MIXED[b]]).inputs["input_ids"].shape[1] for b in (3, 0))
    return sample(Words(3), Picture(0), Words(9 + longer - shorter), seed=1), MIXED[3]


# -- The state is that of the survivors -----------------------------------------------------------


@hybrid
def test_a_batch_that_pruning_makes_ragged_gets_the_mask_that_it_needed_none_of(kind: Kind) -> None:
    batch = make(kind, even(kind))
    assert real_mask(batch.inputs).all()
    for attention in ("sdpa", "eager"):
        model = patched(kind)
        model.set_attn_implementation(attention)
        check_masked(kind, model, kind.build(), batch)


@hybrid
def test_a_ragged_batch_decodes_as_if_the_pruned_tokens_were_never_seen(kind: Kind) -> None:
    """Every sample keeps another number of tokens, so that padding stands before the shorter."""
    model, inputs = patched(kind), make(kind, MIXED).inputs
    answer = generate(model, inputs, 5, **LOGITS)
    kept = kept_of(model)
    assert len(set(kept[max(kept)].sum(1).tolist())) > 2, "not ragged: this shows little"
    ids = answer.sequences[:, -5:]
    expected = unseen(kind, inputs, kept, ids)[:, :-1]
    assert_close(torch.stack(answer.logits, 1)[:, 1:], expected)


def states_of(layer: Any) -> list[Tensor]:
    """The states of a cache's layer, of which a version of transformers may hold several."""
    found: list[Tensor] = []
    for name in ("conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        found += held.values() if isinstance(held, dict) else [held]
    return [state for state in found if state is not None]


@hybrid
def test_a_state_holds_what_the_layer_makes_of_the_survivors_alone(kind: Kind) -> None:
    model, inputs = patched(kind), make(kind, MIXED).inputs
    cache = forward(model, inputs, use_cache=True).past_key_values
    for b, one in enumerate(MIXED):
        alone = forward(model, make(kind, [one]).inputs, use_cache=True).past_key_values
        for together, single in zip(cache.layers, alone.layers, strict=True):
            for all_rows, state in zip(states_of(together), states_of(single), strict=True):
                assert_close(all_rows[b], state[0])


@hybrid
def test_padding_behind_the_prompts_is_dropped_before_a_state(kind: Kind) -> None:
    """From the first pruning layer on; the host's own earlier layers are left as they are."""
    model = patched(kind, layers=(2,))
    states = []
    for padding in ("left", "right"):
        inputs = make(kind, MIXED, padding).inputs
        cache = forward(model, inputs, use_cache=True).past_key_values
        states.append([states_of(layer) for layer in cache.layers[2:]])
    for left, right in zip(*states, strict=True):
        for one, other in zip(left, right, strict=True):
            assert_close(other, one)


# -- Which layer is heard -------------------------------------------------------------------------


def heard(kind: Kind, inputs: Inputs, layers: tuple[int, ...], keep: float) -> dict[int, Tensor]:
    """FastV's choice for one sample without padding, greedily, layer by layer.

    Before each pruning layer the last layer that attends is heard; its probabilities count among
    the tokens that are left.
    """
    model = kind.build()
    model.set_attn_implementation("eager")
    found: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> probabilities, places of its tokens
    kept: dict[int, Tensor] = {}
    visual = inputs["input_ids"][0] == 5
    alive = torch.ones_like(visual)
    for layer in layers:
        hear(model, inputs, kept, found)
        source = max(number for number in found if number < layer)
        weights, places = found[source]
        left = alive[places].nonzero().flatten()
        row = weights[0, :, -1][:, left]
        row = (row / row.sum(-1, keepdim=True)).mean(0)
        scores = torch.full(visual.shape, -1.0)
        scores[places[left]] = row
        count = round(int((visual & alive).sum()) * keep)
        best = scores.masked_fill(~visual, -1).argsort(descending=True)[:count]
        alive = alive & ~visual
        alive[best] = True
        kept[layer] = alive[None].clone()
    return kept


def hear(model: Any, inputs: Inputs, kept: Kept, found: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Run the plain model as in the oracle, and note the attention of the layers that attend."""
    copied = copy.deepcopy(model)
    length = inputs["input_ids"].shape[1]
    for number, layer in enumerate(decoder_layers(copied)):
        if not hasattr(layer, "self_attn"):
            continue
        passed = [step for step in kept if step <= number]
        alive = kept[max(passed)][0] if passed else torch.ones(length, dtype=torch.bool)

        def note(*given: Any, number: int = number, alive: Tensor = alive) -> None:
            found[number] = (given[-1][1], alive.nonzero().flatten())

        layer.self_attn.register_forward_hook(note)
    unseen_logits(copied, inputs, kept)


@hybrid
def test_scores_come_from_the_last_layer_that_attends(kind: Kind) -> None:
    """Layers 2 and 4 both hear layer 1, the second among those that the first has left."""
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    forward(model, inputs)
    kept = kept_of(model)
    expected = heard(kind, inputs, kind.layers, 0.5)
    assert not torch.equal(expected[2], expected[4])
    for layer, mask in expected.items():
        assert_same_choice(kept[layer], mask)


@hybrid
@pytest.mark.parametrize("method", ["sparsevlm", "fixed"])
def test_other_methods_hear_it_too(kind: Kind, method: str) -> None:
    more = {"recycle_share": 0.0} if method == "sparsevlm" else {}
    check_masked(kind, patched(kind, method=method, **more), kind.build(), make(kind, MIXED))


@hybrid
def test_scores_before_rotary_embedding_are_of_the_layer_that_is_heard(kind: Kind) -> None:
    model = patched(kind, rope="before")
    check_masked(kind, model, kind.build(), make(kind, MIXED))


@hybrid
def test_a_method_prunes_before_any_layer_that_it_can_score(kind: Kind) -> None:
    model = patched(kind, method="uniform", layers=(1, 3))
    check_masked(kind, model, kind.build(), make(kind, MIXED))
    with pytest.raises(atp_patch.ConfigError, match="first layer of this model that attends is 1"):
        patched(kind, layers=(1, 3))


@hybrid
def test_attentions_that_are_asked_for_are_those_of_the_layers_that_attend(kind: Kind) -> None:
    model, inputs = patched(kind), make(kind, MIXED).inputs
    model.set_attn_implementation("eager")
    out = forward(model, inputs, output_attentions=True, output_hidden_states=True)
    length = inputs["input_ids"].shape[1]
    assert all(weights.shape[-2:] == (length, length) for weights in out.attentions)
    kept = {0: real_mask(inputs), **kept_of(model)}
    layers = enumerate(decoder_layers(model))
    attending = [number for number, layer in layers if hasattr(layer, "self_attn")]
    for weights, layer in zip(out.attentions, attending, strict=True):
        gone = real_mask(inputs) & ~kept[max(step for step in kept if step <= layer)]
        assert not weights[gone.nonzero()[:, 0], :, gone.nonzero()[:, 1]].any()


# -- Caches ---------------------------------------------------------------------------------------


@hybrid
@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0, 0, 1, 1]])
def test_rows_of_a_cache_are_reordered_and_repeated(kind: Kind, order: list[int]) -> None:
    model, inputs = patched(kind), make(kind, ALIKE).inputs
    cache = forward(model, inputs, use_cache=True).past_key_values
    kept = kept_of(model)
    ids = words(2, 1)
    expected = unseen(kind, inputs, kept, ids)
    if len(order) == 2:
        kept_again = feed(model, copy.deepcopy(cache), inputs, ids)
        assert_close(kept_again, expected)
    cache.reorder_cache(torch.tensor(order))
    chosen = {"attention_mask": inputs["attention_mask"][order]}
    assert_close(feed(model, cache, chosen, ids[order], order), expected[order])


@hybrid
def test_beams_are_those_of_the_samples_alone(kind: Kind) -> None:
    model, samples = patched(kind), MIXED[:2] if REPEATS_SAMPLES else ALIKE
    together = generate(model, make(kind, samples).inputs, 4, num_beams=2)
    for answer, one in zip(together, samples, strict=True):
        alone = generate(model, make(kind, [one]).inputs, 4, num_beams=2)
        assert torch.equal(answer[-4:], alone[0, -4:])


@hybrid
def test_a_static_cache_answers_alike(kind: Kind) -> None:
    if hybrids.slides(kind):
        pytest.skip("static sliding windows are refused")
    model, inputs = patched(kind), make(kind, MIXED[:2]).inputs
    expected = generate(model, inputs, 3)
    assert torch.equal(generate(model, inputs, 3, cache_implementation="static"), expected)


@hybrid
def test_a_conversation_goes_on(kind: Kind) -> None:
    """Several words at a time, on the cache of a ragged batch, and on a copy of it."""
    skip_where_states_take_one_token_at_a_time(kind.build())
    model, inputs = patched(kind), make(kind, MIXED).inputs
    cache = forward(model, inputs, use_cache=True).past_key_values
    kept = kept_of(model)
    ids = words(4, 6)
    expected = unseen(kind, inputs, kept, ids)
    twin = copy.deepcopy(cache)
    first = feed(model, cache, inputs, ids[:, :4])
    again = {"attention_mask": extended(inputs, ids[:, :4])["attention_mask"]}
    rest = feed(model, cache, again, ids[:, 4:])
    assert_close(torch.cat([first, rest], 1), expected)
    assert_close(feed(model, twin, inputs, ids), expected)
    length = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == length + 6
    assert twin.get_seq_length() == length + 6


@hybrid
def test_a_model_without_a_patch_cannot_go_on(kind: Kind) -> None:
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    cache = forward(model, inputs, use_cache=True).past_key_values
    with pytest.raises(atp_patch.CacheError, match="not patched"):
        feed(kind.build(), cache, inputs, words(1, 1))


@hybrid
def test_a_reset_cache_is_a_fresh_one(kind: Kind) -> None:
    model, inputs = patched(kind), make(kind, MIXED).inputs
    cache = forward(model, make(kind, SINGLE).inputs, use_cache=True).past_key_values
    cache.reset()
    if hasattr(cache.layers[0], "conv_states"):
        cache = type(cache)(config=model.config)  # the host's states keep the old batch
    expected = forward(model, inputs, use_cache=True).logits
    assert torch.equal(forward(model, inputs, past_key_values=cache).logits, expected)


def later_turn(kind: Kind, model: Any, samples: Any, filler: int = 0) -> Tensor:
    """Logits of a turn of pictures behind a turn of words, which ``filler`` words pad in front."""
    turn = make(kind, samples).inputs
    people, length = turn["input_ids"].shape
    first = {
        "input_ids": words(people, 5),
        "attention_mask": torch.ones(people, 5, dtype=torch.long),
    }
    cache = forward(model, first, use_cache=True).past_key_values
    mask = torch.cat([first["attention_mask"], turn["attention_mask"]], 1)
    mask[:, 5 : 5 + filler] = 0
    places = (torch.arange(length) + 5).expand(people, -1)
    given = {**turn, "attention_mask": mask, "position_ids": places}
    return forward(model, given, past_key_values=cache, use_cache=True).logits


@hybrid
def test_a_picture_in_a_later_turn(kind: Kind) -> None:
    if not hybrids.counts_tokens(kind) or hybrids.slides(kind):
        pytest.skip("its positions or its window are another test's affair")
    model, plain = patched(kind), kind.build()
    skip_where_states_take_one_token_at_a_time(plain)
    logits = later_turn(kind, model, SINGLE)
    kept = {
        layer: torch.nn.functional.pad(mask, (5, 0), value=True)
        for layer, mask in kept_of(model).items()
    }
    turn = make(kind, SINGLE).inputs
    whole = {
        **turn,
        "input_ids": torch.cat([words(1, 5), turn["input_ids"]], 1),
        "attention_mask": torch.ones(1, 5 + turn["input_ids"].shape[1], dtype=torch.long),
    }
    expected = unseen_logits(plain, whole, kept)[:, 5:]
    assert_close(logits, expected, kept[max(kept)][:, 5:])


@hybrid
def test_padding_between_two_turns_is_refused(kind: Kind) -> None:
    if hybrids.slides(kind):
        pytest.skip("a later turn that fills the window is refused for that")
    model = patched(kind)
    uneven = (MIXED[0], MIXED[3])
    with pytest.raises(atp_patch.CacheError, match="padding in a later turn"):
        later_turn(kind, model, uneven)
    # As many tokens before pruning, another number after it.
    with pytest.raises(atp_patch.CacheError, match="between two turns"):
        later_turn(kind, model, even(kind))


@hybrid
def test_padding_behind_a_prompt_is_refused_where_it_would_stay_in_a_state(kind: Kind) -> None:
    model, inputs = patched(kind), make(kind, MIXED, "right").inputs
    with pytest.raises(atp_patch.CacheError, match="padding_side = 'left'"):
        generate(model, inputs, 2)
    forward(model, inputs)


@hybrid
def test_guessed_tokens_are_cropped_again(kind: Kind) -> None:
    """Where transformers itself can take a state back."""
    skip_where_states_take_one_token_at_a_time(kind.build())
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -8:-4]
    expected = generate(model, inputs, 8)
    if type(model)._is_stateful:
        with pytest.raises(ValueError, match="stateful"):
            generate(kind.build(), inputs, 8, prompt_lookup_num_tokens=3)
        return
    kept = kept_of(model)
    assert torch.equal(generate(model, inputs, 8, prompt_lookup_num_tokens=3), expected)
    for layer, mask in kept_of(model).items():
        assert_same_choice(mask[:, : kept[layer].shape[1]], kept[layer])


@hybrid
def test_a_version_whose_caches_hold_no_states_beside_keys_is_refused(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kind.build()
    monkeypatch.delattr(cache_utils, "LinearAttentionCacheLayerMixin")
    with pytest.raises(atp_patch.UnsupportedModelError, match=r"transformers >= 5\.5"):
        atp_patch.patch_model(model, kind.layers, "fastv", keep=0.5)


# -- Learning -------------------------------------------------------------------------------------


@hybrid
def test_thresholds_do_not_learn_where_a_state_would_hold_what_they_drop(kind: Kind) -> None:
    learns = {"method": "atp", "thresholds": "learned", "target_tokens": 12, "keep": None}
    model = patched(kind, **learns).train()
    inputs = make(kind, SINGLE).inputs
    labels = inputs["input_ids"].clone()
    with pytest.raises(atp_patch.UnsupportedModelError, match="no keys that a mask could weigh"):
        model(**inputs, labels=labels)
    fixed = patched(kind, method="fixed").train()
    fixed(**inputs, labels=labels).loss.backward()
    last = decoder_layers(fixed)[5]
    assert all(weight.grad is not None for weight in last.parameters())


# -- Costs ----------------------------------------------------------------------------------------


@hybrid
def test_bytes_of_keys_are_those_of_the_cache(kind: Kind) -> None:
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    cache = forward(model, inputs, use_cache=True).past_key_values
    held = sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if hasattr(layer, "keys")
    )
    trace = atp_patch.last_trace(model)
    outside = inputs["input_ids"].shape[1] - tiny.WINDOW + 1 if hybrids.slides(kind) else 0
    assert trace.kv_bytes == held + outside * 2 * tiny.KV_HEADS * tiny.HEAD_DIM * 4
    assert placed(make(kind, SINGLE)).sum() > trace.layers[6].kept_counts[0]


@hybrid
def test_flops_are_those_of_the_matrices_and_of_the_layers_that_attend(kind: Kind) -> None:
    if kind.name.endswith("_moe"):
        pytest.skip("routers are left out, see the costs of other mixtures")
    model, inputs = kind.build(), make(kind, SINGLE).inputs
    model.set_attn_implementation("eager")
    atp_patch.patch_model(model, [2], "uniform", keep=1.0)
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        model(**inputs, logits_to_keep=1)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    counted = 2 * tiny.HIDDEN * tiny.VOCAB  # one row of logits
    layers = model.get_decoder().layers
    start = next(name for name in counts if name.endswith(".language_model.layers.0"))[:-1]
    for number, layer in enumerate(layers):
        counted += counts[f"{start}{number}"]
        for state in {"conv", "linear_attn"} & set(dict(layer.named_children())):
            mixer = f"{start}{number}.{state}"  # without its convolution and its recurrence
            linear = (f"{mixer}.{n}" for n in dict(getattr(layer, state).named_children()))
            matrices = sum(counts.get(n, 0) for n in linear if "proj" in n)
            counted += matrices - counts[mixer]
    assert atp_patch.last_trace(model).flops_plain == counted


@hybrid
def test_an_evaluation_gives_no_layer_again_that_keeps_a_state(kind: Kind) -> None:
    model = patched(kind)
    with LayersOnce().given_again(model, ()):
        assert not any("forward" in vars(layer) for layer in decoder_layers(model))


# -- The vision tower -----------------------------------------------------------------------------


def films(kind: Kind) -> Case:
    """Pictures and a video, of different numbers of tokens a sample."""

    def feed(model: Any, how: str) -> Inputs:
        padding, _, number = how.partition(" ")
        return make(kind, [FILMS[int(number)]] if number else FILMS, padding).inputs

    return Case(kind.name, kind.build, feed, len(FILMS), ("visual.blocks.1.attn",), **QWEN)


@rows(TOWERS[:1], TOWERS[1:])
def test_what_the_tower_merges_enters_and_nothing_else(kind: Kind) -> None:
    case, plain = films(kind), kind.build()
    model = atp_patch.patch_model(kind.build(), method="prumerge+", keep=0.3, neighbours=NEIGHBOURS)
    inputs = case.feed(plain, "left")
    logits, kept = forward(model, inputs).logits, kept_of(model)[0]
    wanted, reference = merged_logits(case, plain, inputs, True, 0.3)
    assert torch.equal(kept, wanted)
    assert (real_mask(inputs) & ~kept).any(), "nothing was pruned: this shows nothing"
    assert_close(logits, reference, kept)
    answers = generate(model, inputs, 3)
    assert torch.equal(generate(model, inputs, 3, use_cache=False), answers)


@rows(TOWERS[:1], TOWERS[1:])
@pytest.mark.parametrize("method", ["downsample", TowerReader()], ids=["picture", "reader"])
def test_methods_that_shrink_or_read_the_tower(kind: Kind, method: Any) -> None:
    case = films(kind)
    model = atp_patch.patch_model(kind.build(), method=method, keep=0.5)
    inputs = case.feed(model, "left")
    together, kept = forward(model, inputs).logits, kept_of(model)[0]
    assert (real_mask(inputs) & ~kept).any(), "nothing was pruned: this shows nothing"
    real = real_mask(inputs)
    for b in range(case.count):
        alone = forward(model, case.alone(model, b)).logits
        assert_close(together[b, real[b]][None], alone, kept[b, real[b]][None])
