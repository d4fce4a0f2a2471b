"""The third model's training parts: its forward passes are the model's own, its labels are true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from atp_patch.builtin.documents import KINDS
from atp_patch.builtin.documents.fonts import FIRST
from atp_patch.builtin.scenes import PATCH_PX
from tests.helpers.stand_in import save_stand_in
from workshop.labels import IGNORE
from workshop.smol import train_decoder, train_tower
from workshop.smol.labels import FIELDS
from workshop.smol.low_rank import LowRank, add_low_rank
from workshop.smol.masters import Masters
from workshop.smol.pictures import SCENE, make_picture
from workshop.smol.pieces import BLANK, UNKNOWN, Pieces, by_token, ideal_tokens
from workshop.smol.rows import RowSpec, make_row, packed_mask, task_names
from workshop.smol.tower import build_projector, build_tower, projector_forward, tower_forward
from workshop.smol.train_tower import model_config
from workshop.smol.windows import WindowSpec, pieces_of, window_batch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pieces(base: Path) -> Pieces:
    return pieces_of(base)


def test_tower_and_projector_compute_what_transformers_does(base: Path) -> None:
    torch.manual_seed(0)
    tower, projector = build_tower(), build_projector(model_config(base))
    pixels = torch.rand(2, 3, 48, 96)
    with torch.inference_mode():
        found = tower_forward(tower, pixels)
        sizes = torch.tensor([[48, 96]] * 2)
        wanted = tower(pixels, image_sizes=sizes).last_hidden_state.reshape(2, 72, -1)
        assert torch.allclose(found, wanted, atol=1e-4)
        tokens = projector_forward(projector, found, 6, 12)
        wanted = projector(wanted.flatten(0, 1), sizes).reshape(2, 18, -1)
        assert torch.allclose(tokens, wanted, atol=1e-5)


def test_an_untrained_tower_sees_a_neighbour_with_each_head() -> None:
    torch.manual_seed(0)
    tower = build_tower()
    page = torch.full((1, 3, 40, 40), 0.9)
    rotations = tower.patch_positional_embedding
    at = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    cos, sin = rotations(torch.zeros(1), at)
    patches = torch.nn.functional.unfold(page, PATCH_PX, stride=PATCH_PX).mT
    x = tower.ln_pre(patches @ tower.patch_conv.weight.flatten(1).mT)
    attention = tower.transformer.layers[0].attention
    q, k = (
        p(tower.transformer.layers[0].attention_norm(x)).unflatten(-1, (6, -1)).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj)
    )

    def turned(t: torch.Tensor) -> torch.Tensor:
        one, other = t.chunk(2, -1)
        return t * cos + torch.cat([-other, one], -1) * sin

    best = (turned(q) @ turned(k).mT)[0, :, 12].argmax(-1)  # of the patch in the middle
    seen = [(int(place) // 5 - 2, int(place) % 5 - 2) for place in best]
    assert seen == [(0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (1, 1)]


@pytest.mark.parametrize("kind", ["page", "table"])
def test_labels_name_the_characters_at_each_place(kind: str, pieces: Pieces) -> None:
    picture = make_picture(kind, "development", 3)
    height, width = picture.clean.shape[:2]
    left, top, size = 8, 11, (width // 16 * 16 - 16, height // 16 * 16 - 16)
    labels = picture.labels(pieces, left, top, size)
    shown, told = 0, 0
    for writing in picture.writings:
        for place, character in enumerate(writing.text):
            x = (writing.edges[place] + writing.edges[place + 1]) / 2 - left
            y = (writing.top + writing.bottom) / 2 - top
            narrow = writing.edges[place + 1] - writing.edges[place] < PATCH_PX // 2 + 1
            if character == " " or narrow or not (8 < x < size[0] - 30 and 16 < y < size[1] - 30):
                continue
            row, half = int(y // PATCH_PX), int(x // (PATCH_PX // 2))
            found = labels.patches[row, half // 2, half % 2]
            assert found != BLANK
            near = [ord(c) - FIRST + 1 for c in writing.text[max(place - 1, 0) : place + 2]]
            assert found == UNKNOWN or found in near
            shown += 1
            told += found == ord(character) - FIRST + 1
    assert shown > 20
    assert told > 0.8 * shown


def test_pieces_are_the_tokens_of_the_words(pieces: Pieces) -> None:
    text = "zebra"
    ids = [pieces.ids[number - 1] for number in pieces.of(text)]
    assert pieces.tokenizer.decode(ids) == text
    assert pieces.number[pieces.ids[4]] == 5
    assert pieces.tokenizer.decode([pieces.ids[pieces.space - 1]]) == " "


@pytest.mark.parametrize("kind", [*KINDS, SCENE])
def test_every_kind_of_picture_has_pieces_and_questions(kind: str, pieces: Pieces) -> None:
    picture = make_picture(kind, "development", 5, rounds=1)
    height, width = (side // 16 * 16 for side in picture.clean.shape[:2])
    labels = picture.labels(pieces, 0, 0, (width, height))
    assert (labels.pieces > BLANK).any()
    assert labels.pieces.shape == (height // PATCH_PX, width // PATCH_PX)
    for number, classes in enumerate(FIELDS.values()):
        assert labels.patches[..., number].max() < classes
    assert picture.questions
    clean, noisy = picture.clean[:16, :16], picture.pixels(np.random.default_rng(0), 0, 0, (16, 16))
    assert 0 < np.abs(clean - noisy).mean() < 12


def test_ideal_tokens_weigh_what_the_four_patches_show() -> None:
    embeddings = torch.eye(5)
    grid = torch.tensor([[1, 2, 0, 0], [3, 4, 0, UNKNOWN], [0, 5, 2, 2], [0, 5, 2, 2]])
    tokens = by_token(grid.reshape(1, -1), 4, 4)
    assert tokens[0].tolist() == [[1, 2, 3, 4], [0, 0, 0, UNKNOWN], [0, 5, 0, 5], [2, 2, 2, 2]]
    first, blank, right, same = ideal_tokens(tokens, embeddings, space=4)[0]
    assert first.tolist() == pytest.approx([0.4, 0.25, 0.22, 0.13, 0])
    assert blank.tolist() == pytest.approx([0, 0, 0, 1, 0])
    assert right.tolist() == pytest.approx([0, 0, 0, 0, 1])
    assert same.tolist() == pytest.approx([0, 1, 0, 0, 0])


def test_questions_of_a_row_see_the_picture_and_themselves() -> None:
    sees = packed_mask(2, np.array([0, 0, 1]))[0, 0]
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_targets_of_a_row_are_its_answers(base: Path, pieces: Pieces) -> None:
    row = make_row(RowSpec(base, questions=4, sides_px=(192,), kinds=("icons",)), 1)
    for number, task in enumerate(row["task"]):
        mine = row["question"] == number
        targets = row["targets"][mine]
        answer = pieces.tokenizer.decode(targets[targets != IGNORE])
        assert answer.endswith("<|im_end|>")
        asked = pieces.tokenizer.decode(row["ids"][mine])
        assert asked.endswith("assistant\n" + answer.removesuffix("<|im_end|>"))
        assert row["place"][mine].tolist() == list(range(int(mine.sum())))
        assert task_names()[task].startswith("icons/")


def test_low_rank_additions_change_nothing_at_first() -> None:
    torch.manual_seed(0)
    block = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 4, bias=False)})
    decoder = torch.nn.Sequential(block)
    x, plain = torch.randn(3, 6), decoder[0]["q_proj"].weight.clone()
    (added,) = add_low_rank(decoder, rank=2).values()
    assert isinstance(block["q_proj"], LowRank)
    assert torch.equal(added(x), x @ plain.mT)
    with torch.no_grad():
        added.up.normal_()
    assert torch.allclose(added(x), x @ (plain + added.up @ added.down).mT, atol=1e-5)


def test_rotary_frequencies_stay_exact_in_bfloat16(base: Path) -> None:
    reader = train_decoder.Reader(base, seeing=True)
    buffers = [b for name, b in reader.named_buffers() if "inv_freq" in name]
    assert buffers
    assert all(b.dtype == torch.float32 for b in buffers)
    assert {p.dtype for p in reader.parameters()} == {torch.bfloat16}


def test_a_training_goes_on_where_it_stopped() -> None:
    def steps(masters: Masters, module: torch.nn.Module, numbers: range) -> None:
        for number in numbers:
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(number))
            module(x.to(torch.bfloat16)).float().square().mean().backward()
            masters.step(1.0)

    def fresh() -> tuple[torch.nn.Module, Masters]:
        torch.manual_seed(1)
        module = torch.nn.Linear(5, 4).to(torch.bfloat16)
        return module, Masters(module, ["weight"], 0.02, 0.01)

    module, masters = fresh()
    steps(masters, module, range(6))
    begun, first = fresh()
    steps(first, begun, range(3))
    later, second = fresh()
    second.load(first.tensors())
    steps(second, later, range(3, 6))
    assert torch.equal(later.weight, module.weight)
    assert torch.equal(later.bias, module.bias)
    assert not torch.equal(begun.weight, module.weight)


def test_a_few_steps_of_the_tower_learn_its_batch(base: Path, pieces: Pieces) -> None:
    tower = train_tower.start(base, pieces, torch.float32, compiled=False)
    batch = window_batch(WindowSpec(base, windows=2, per_picture=2, shapes_px=((64, 48),)), 2)
    losses = [tower.step(batch, 3.0)["loss"] for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_few_steps_of_the_decoder_learn_its_row(base: Path, pieces: Pieces) -> None:
    reader, masters = train_decoder.start(base, tower=None, seeing=False)
    row = make_row(RowSpec(base, questions=2, sides_px=(192,), kinds=("table",)), 2)
    losses = []
    for _ in range(12):
        loss = train_decoder.row_loss(reader, row, pieces, train_decoder.Tally.empty())
        loss.backward()
        masters.step(10.0)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = {name.rpartition(".")[2] for name in masters.weights}
    assert trained == {"down", "up"}


@pytest.mark.slow
def test_the_command_trains_the_decoder_on_ideal_tokens(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    argv = ["--work", str(tmp_path), "--base", str(base)]
    train_decoder.main([*argv, "--steps", "1"])
    train_decoder.main([*argv, "--examine", "2"])
    torch.set_num_threads(threads)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[-1]["step"] == 1
    assert {"loss", "mean"} <= said[-1].keys()
