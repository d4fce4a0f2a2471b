"""family="generic": a decoder that no family knows, told by each call which tokens are visual."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import atp_patch
from tests.families.kinds import MIXED, TEXT, make
from tests.families.towers import KINDS as TOWERS
from tests.helpers import tiny
from tests.helpers.compare import assert_close, assert_same_choice, snapshot
from tests.helpers.copies import Template
from tests.helpers.oracle import masked
from tests.helpers.run import kept_of

GENERIC: dict[str, Any] = {"family": "generic", "layers": [2, 4, 6], "method": "fastv", "keep": 0.5}
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
# Of each sample its pieces: numbers are words, tuples the (frames, height, width) of images. Behind
# each row of the third sample's image stands a mark that is not visual.
SAMPLES = ((3, (1, 4, 6), 9), (2, (2, 3, 4), 4, (1, 5, 5), 5), (13,), (4, (1, 4, 7), 3))
MARKED = 3  # the sample whose rows end in a mark

decoders = pytest.mark.parametrize("name", CLASSES)
paddings = pytest.mark.parametrize("padding", ["left", "right"])


@cache
def _built(name: str) -> Template:
    model, config = CLASSES[name]
    torch.manual_seed(0)
    made = model._from_config(config(**TEXT), attn_implementation="sdpa")
    tiny._scale_weights(made)
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = tiny.PAD
    return Template(made.float().eval())


def plain(name: str = "llama") -> Any:
    return _built(name).copy()


def patched(name: str = "llama", **options: Any) -> Any:
    return atp_patch.patch_model(plain(name), **{**GENERIC, **options})


def _row(number: int) -> tuple[Tensor, list[bool], list[tuple[int, int, int, int]]]:
    """Embeddings, visual places and (image, frame, row, column) of one sample's visual tokens."""
    generator = torch.Generator().manual_seed(50 + number)
    visual: list[bool] = []
    places = []
    images = 0
    for piece in SAMPLES[number]:
        if isinstance(piece, int):
            visual += [False] * piece
            continue
        for frame in range(piece[0]):
            for row in range(piece[1]):
                for column in range(piece[2]):
                    visual.append(True)
                    places.append((images, frame, row, column))
                if number == MARKED:
                    visual.append(False)
        images += 1
    return torch.randn(len(visual), tiny.HIDDEN, generator=generator), visual, places


def given(numbers: tuple[int, ...] = (0, 1, 2, 3), padding: str = "left") -> dict[str, Any]:
    """Keyword arguments of a call: padded embeddings, masks and grids."""
    rows = [_row(number) for number in numbers]
    length = max(len(visual) for _, visual, _ in rows)
    embeds = torch.zeros(len(rows), length, tiny.HIDDEN)
    real, marked = (torch.zeros(len(rows), length, dtype=torch.bool) for _ in range(2))
    for b, (states, visual, _) in enumerate(rows):
        at = length - len(visual) if padding == "left" else 0
        own = slice(at, at + len(visual))
        embeds[b, own], real[b, own], marked[b, own] = states, True, torch.tensor(visual)
    grids = [[piece for piece in SAMPLES[n] if isinstance(piece, tuple)] for n in numbers]
    return {
        "inputs_embeds": embeds,
        "attention_mask": real.long(),
        "visual_mask": marked,
        "visual_grids": grids,
    }


def ordinary(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if not name.startswith("visual")}


def forward(model: Any, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**call).logits


def generate(model: Any, call: dict[str, Any], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(**call, max_new_tokens=4, do_sample=False, **kwargs)


@decoders
def test_keeping_all_is_plain_bit_for_bit(name: str) -> None:
    call, model = given(), patched(name, keep=1.0)
    assert torch.equal(forward(model, call), forward(plain(name), ordinary(call)))
    expected = generate(plain(name), ordinary(call))
    assert torch.equal(generate(model, call), expected)


@paddings
@decoders
def test_gathered_is_masked_and_what_is_generated_follows(name: str, padding: str) -> None:
    call, model = given(padding=padding), patched(name)
    logits, kept = forward(model, call), kept_of(model)
    real, last = call["attention_mask"].bool(), kept[6]
    assert not last[~real].any()
    assert last[real & ~call["visual_mask"]].all()
    assert last.sum() < real.sum() - 40
    with torch.no_grad(), masked(plain(name), real, kept) as reference:
        expected = reference(**ordinary(call), use_cache=False).logits
        assert_close(logits, expected, last)
        if padding == "right":
            return
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        answer = generate(model, call, **wanted)
        words = reference.get_input_embeddings()(answer.sequences)
        grown = {
            "inputs_embeds": torch.cat([call["inputs_embeds"], words], 1),
            "attention_mask": torch.cat([call["attention_mask"], torch.ones(4, 4).long()], 1),
        }
        grown["position_ids"] = (grown["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with (
        torch.no_grad(),
        masked(
            plain(name),
            grown["attention_mask"].bool(),
            {
                layer: torch.nn.functional.pad(mask, (0, 4), value=True)
                for layer, mask in kept.items()
            },
        ) as reference,
    ):
        followed = reference(**grown, use_cache=False).logits[:, -5:-1]
    assert_close(torch.stack(answer.logits, 1), followed)


@paddings
def test_a_batch_is_its_samples_alone(padding: str) -> None:
    call, model = given(padding=padding), patched()
    together, kept = forward(model, call), kept_of(model)[6]
    for b in range(len(SAMPLES)):
        real = call["attention_mask"][b].bool()
        alone = forward(model, given((b,)))
        if call["visual_mask"][b].any():
            assert_same_choice(kept[b, real][None], kept_of(model)[6])
        assert_close(together[b, real][None], alone, kept[b, real][None])


def test_beams_of_a_batch_are_its_samples_beams() -> None:
    model = patched()
    together = generate(model, given((0, 1)), num_beams=2)
    for b, answer in enumerate(together):
        assert torch.equal(answer[None], generate(model, given((b,)), num_beams=2))


@paddings
def test_grids_are_those_given(padding: str) -> None:
    call, model = given(padding=padding), patched(method="uniform")
    forward(model, call)
    layout = atp_patch.last_trace(model).layout
    for b in range(len(SAMPLES)):
        table = torch.stack([layout.image, layout.frame, layout.row, layout.column])
        assert [*map(tuple, table[:, b, layout.valid[b]].T.tolist())] == _row(b)[2]
        places = call["visual_mask"][b].nonzero().flatten()
        assert torch.equal(layout.position[b, layout.valid[b]], places)


def test_without_grids_each_run_is_an_image_of_one_row() -> None:
    call, model = given((1, 3)), patched()
    del call["visual_grids"]
    forward(model, call)
    found = [
        [(g.frames, g.height, g.width) for g in sample]
        for sample in atp_patch.last_trace(model).grids
    ]
    assert found == [[(1, 1, 24), (1, 1, 25)], [(1, 1, 7)] * 4]


def test_a_known_model_gives_what_its_own_family_gives() -> None:
    kind = next(kind for kind in TOWERS if kind.name == "llava")
    inputs = make(kind, MIXED).inputs
    options = {"layers": [2, 4, 6], "method": "atp", "keep": 0.5}
    own = atp_patch.patch_model(kind.build(), **options)
    generic = atp_patch.patch_model(kind.build(), family="generic", **options)
    mask = inputs["input_ids"] == tiny.IMAGE
    grids = [[(1, 6, 6)] * (int(row.sum()) // 36) for row in mask]
    call = {**inputs, "visual_mask": mask, "visual_grids": grids}
    kept = kept_of_both(own, inputs, generic, call)
    assert_close(forward(generic, call), forward(own, inputs), kept)
    assert torch.equal(generate(generic, call), generate(own, inputs))


def kept_of_both(own: Any, inputs: Any, generic: Any, call: Any) -> Tensor:
    forward(own, inputs)
    forward(generic, call)
    for layer, mask in kept_of(own).items():
        assert_same_choice(kept_of(generic)[layer], mask)
    return kept_of(own)[6]


def test_unpatching_leaves_nothing() -> None:
    model, call = plain(), given()
    expected, before = forward(model, ordinary(call)), snapshot(model)
    atp_patch.patch_model(model, **GENERIC)
    forward(model, call)
    generate(model, call)
    atp_patch.unpatch_model(model)
    assert snapshot(model) == before
    assert torch.equal(forward(model, ordinary(call)), expected)


def test_adapters_come_back(tmp_path: Path) -> None:
    model, call = patched(method="atp"), given()
    expected = forward(model, call)
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(plain(), weights=tmp_path, family="generic")
    assert torch.equal(forward(again, call), expected)


def test_what_the_caller_leaves_out_is_named() -> None:
    model, call = patched(), given()
    with pytest.raises(atp_patch.InputError, match="pass visual_mask="):
        forward(model, ordinary(call))
    ids = torch.full(call["visual_mask"].shape, tiny.FIRST_WORD)
    with pytest.raises(atp_patch.InputError, match="inputs_embeds=model"):
        forward(model, {"input_ids": ids, "visual_mask": call["visual_mask"]})
    forward(model, {"input_ids": ids})  # ids alone are text
    nothing = torch.zeros_like(call["visual_mask"])
    forward(model, {**ordinary(call), "visual_mask": nothing})


@pytest.mark.parametrize(
    ("grids", "match"),
    [
        ([[(1, 4, 6)]], "1 lists for 2 samples"),
        ([[(1, 4, 6)], [(1, 4, 6)]], r"marks 28 .* hold 24"),
        ([[(1, 4, 6)], [(1, 2, 14)]], "too unevenly"),
    ],
)
def test_grids_that_do_not_fit_are_refused(grids: Any, match: str) -> None:
    with pytest.raises(atp_patch.InputError, match=match):
        forward(patched(), {**given((0, 3)), "visual_grids": grids})


def test_grids_belong_to_this_family_alone() -> None:
    kind = next(kind for kind in TOWERS if kind.name == "llava")
    model = atp_patch.patch_model(kind.build(), [2, 4, 6], "fastv", keep=0.5)
    with pytest.raises(atp_patch.InputError, match="visual_grids belongs"):
        forward(model, {**make(kind, MIXED[:1]).inputs, "visual_grids": [[(1, 6, 6)]]})
    with pytest.raises(atp_patch.ConfigError, match="is of the family 'llava'"):
        atp_patch.patch_model(kind.build(), [2], "fastv", keep=0.5, family="gemma3")
    with pytest.raises(atp_patch.UnsupportedModelError, match='family="generic"'):
        atp_patch.patch_model(plain(), [2], "fastv", keep=0.5)
