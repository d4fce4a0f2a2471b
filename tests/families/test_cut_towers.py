"""What methods read of a tower whose tokens the host puts together, cuts or shrinks afterwards.

The oracle: in place of features the plain model's projector gives out what each token got and holds
in the tower, and the model's own pass puts that where features go.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from tests.families.hosts import REPEATS_SAMPLES
from tests.helpers import tiny
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.doors import TowerReader, view_of_the_tower
from tests.helpers.inputs import Inputs, real_mask
from tests.helpers.run import forward, generate, kept_of
from tests.seam.vision_cases import CASES, FILMS, KINDS, Case, groups, make, part_of, read

CUT = {case.name: case for case in CASES if case.name.startswith(("llava_next", "llava_onev"))}
TILE = 48
# Wide, tall, square, too flat to have a row of its own and too thin to have a column; and no
# picture at all. Several pictures of a sample are cut into tiles by LLaVA-NeXT alone.
SIZES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((60, 96), (1, 200), (70, 33)),
    (),
    ((50, 41),),
    ((200, 1), (96, 96)),
)


def _sized(model: Any, how: str) -> Inputs:
    """Pictures of these sizes, with as many placeholders as the host makes features."""
    padding, _, number = how.partition(" ")
    chosen = [int(number)] if number else range(len(SIZES))
    counts = [len(SIZES[b]) for b in chosen if SIZES[b]]
    ids, pixels, sizes = [], [], []
    for b in chosen:
        generator = torch.Generator().manual_seed(b)
        row = [tiny.BOS]
        for size in SIZES[b]:
            tiles = torch.randn(5, 3, TILE, TILE, generator=generator)
            given: Inputs = {"pixel_values": tiles[None], "image_sizes": torch.tensor([size])}
            if model.config.model_type == "llava_onevision":
                given["batch_num_images"] = torch.tensor([len(SIZES[b])] * len(SIZES[b]))
            (features,) = model.model.get_image_features(**given).pooler_output
            row += [tiny.IMAGE] * len(features)
            row += torch.randint(tiny.FIRST_WORD, tiny.VOCAB, (3,), generator=generator).tolist()
            pixels.append(tiles)
            sizes.append(size)
        row += torch.randint(tiny.FIRST_WORD, tiny.VOCAB, (4,), generator=generator).tolist()
        ids.append(torch.tensor(row))
    pad = {"batch_first": True, "padding_side": padding}
    made: Inputs = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, padding_value=tiny.PAD, **pad),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in ids], **pad
        ),
    }
    if pixels:
        made |= {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}
        if model.config.model_type == "llava_onevision":
            made["batch_num_images"] = torch.tensor(counts)
    return made


def _filmed(model: Any, how: str) -> Inputs:
    """One picture a sample, which LLaVA-OneVision shrinks, and a video."""
    padding, _, number = how.partition(" ")
    samples = [FILMS[int(number)]] if number else FILMS
    return make(KINDS["llava_onevision"], samples, padding).inputs


ROWS = {
    **CUT,
    "llava_next-sizes": replace(CUT["llava_next"], feed=_sized, count=len(SIZES)),
    "llava_onevision-sizes": replace(CUT["llava_onevision"], feed=_sized, count=len(SIZES)),
    "llava_onevision-films": replace(CUT["llava_onevision"], feed=_filmed, count=len(FILMS)),
}


def rows(*ordinary: str) -> Any:
    """A parametrization by ``row``, whose further rows are marked slow."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in ROWS if name not in ordinary]
    return pytest.mark.parametrize("row", [*ordinary, *slow])


def carried(case: Case, plain: Any, inputs: Inputs, tables: Sequence[Tensor]) -> Tensor:
    """(B, L, C) where the plain model puts the rows of tables (rows, C), one a projector's call."""
    twin, turn, seen = copy.deepcopy(plain), iter(tables), []

    def in_place_of_features(_: Any, args: Any, output: Tensor) -> Tensor:
        table = next(turn)
        wide = torch.zeros_like(output).flatten(0, -2)
        wide[:, : table.shape[1]] = table
        return wide.reshape(output.shape)

    twin.model.get_submodule(case.projector).register_forward_hook(in_place_of_features)
    twin.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    forward(twin, inputs)
    return seen[0][..., : tables[0].shape[1]]


def class_tokens(case: Case, plain: Any, inputs: Inputs) -> list[Tensor]:
    """For each call of the tower (G, Dt), the class token behind the block."""
    twin, seen = copy.deepcopy(plain), []
    block = part_of(twin, case.attentions[0].rpartition(".")[0])
    block.register_forward_hook(lambda _, args, output: seen.append(output))
    forward(twin, inputs)
    return [(made[0] if isinstance(made, tuple) else made)[:, 0] for made in seen]


@rows("llava_next-sizes", "llava_next_video", "llava_onevision-films")
def test_what_is_read_stands_where_the_tokens_do(row: str) -> None:
    case = ROWS[row]
    plain = case.build()
    inputs = case.feed(plain, "left")
    view = view_of_the_tower(case.build(), inputs, keep=0.5)
    assert view.slot_valid.any()
    calls = read(case, plain, inputs)
    tables = []
    for one in calls:
        made, _ = groups(case, one)
        paid, keys = (
            torch.cat([torch.from_numpy(getattr(group, name)).float() for group in made])
            for name in ("attention", "key")
        )
        tables.append(torch.cat([paid[:, None], keys], dim=1))
    batch = torch.arange(len(view.token))[:, None]
    wanted = carried(case, plain, inputs, tables)[batch, view.layout.position]
    wanted = wanted * view.slot_valid[..., None]
    seen = view.tower[-1]
    torch.testing.assert_close(seen.attention, wanted[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.key, wanted[..., 1:], rtol=1e-4, atol=1e-4)
    if not case.class_token:
        assert seen.class_token is None
        return
    tables = [
        tokens.repeat_interleave(one.features.shape[1], 0)
        for tokens, one in zip(class_tokens(case, plain, inputs), calls, strict=True)
    ]
    wanted = carried(case, plain, inputs, tables)[batch, view.layout.position]
    assert seen.class_token is not None
    torch.testing.assert_close(seen.class_token, wanted * view.slot_valid[..., None])


@rows("llava_onevision-films")
def test_a_method_that_reads_is_the_same_in_any_batch_and_with_beams(row: str) -> None:
    case = ROWS[row]
    model = atp_patch.patch_model(case.build(), method=TowerReader(), keep=0.5)
    inputs = case.feed(case.build(), "left")
    together, kept = forward(model, inputs).logits, kept_of(model)[0]
    real = real_mask(inputs)
    answers = generate(model, inputs, 3, num_beams=2) if REPEATS_SAMPLES else None
    for b in range(case.count):
        alone = case.alone(case.build(), b)
        assert_close(
            together[b, real[b]][None], forward(model, alone).logits, kept[b, real[b]][None]
        )
        if answers is not None:
            assert torch.equal(generate(model, alone, 3, num_beams=2)[0, -3:], answers[b, -3:])


def test_the_hosts_methods_come_back_and_serve_calls_outside_a_pass() -> None:
    case = ROWS["llava_onevision-films"]
    model = case.build()
    inputs = case.feed(model, "left")
    names = ("pixel_values", "image_sizes", "batch_num_images")
    pictures = {name: inputs[name] for name in names}
    plain = model.model.get_image_features(**pictures).pooler_output
    before = snapshot(model)
    atp_patch.patch_model(model, method=TowerReader(), keep=0.5)
    expected = forward(model, inputs).logits
    for one, other in zip(
        model.model.get_image_features(**pictures).pooler_output, plain, strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(forward(copy.deepcopy(model), inputs).logits, expected)
    atp_patch.unpatch_model(model)
    assert snapshot(model) == before
