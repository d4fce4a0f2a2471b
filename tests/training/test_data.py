"""Data in LLaVA's format: labels on the answers alone, and every bad sample by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atp_patch import train
from atp_patch.builtin import DYNAMIC, make_scene
from atp_patch.contract.errors import ConfigError, InputError, UnsupportedModelError
from atp_patch.training.dataset import SKIPPED, Samples, collate
from atp_patch.training.encode import IGNORED, Encoder, align
from atp_patch.training.records import Conversation, LlavaFile, Scenes, check_source
from tests.evaluation.conftest import build
from tests.training.conftest import Writer, record

TURNS = (("user", "<image>\nAnything red?"), ("assistant", "yes"))
MORE = (("user", "Anything blue?"), ("assistant", "no"))


@pytest.fixture(scope="module")
def processor() -> Any:
    return build()[1]


@pytest.fixture(scope="module")
def encode(processor: Any) -> Encoder:
    return Encoder(processor, [processor.tokenizer.convert_tokens_to_ids("<image>")], None)


def learned(processor: Any, sample: dict[str, torch.Tensor]) -> list[str]:
    labels = sample["labels"][0]
    return processor.tokenizer.convert_ids_to_tokens(labels[labels != IGNORED].tolist())


def source(file: Path, **changes: Any) -> LlavaFile:
    return LlavaFile(file, file.parent, **{"max_image_pixels": 50_000, **changes})


def test_labels_are_the_answers_and_their_ends(processor: Any, encode: Encoder) -> None:
    image = make_scene("train", 0).image
    sample = encode(Conversation(TURNS + MORE, (image,)))
    assert learned(processor, sample) == ["yes", "</s>", "no", "</s>"]
    assert sample["labels"].shape == sample["input_ids"].shape
    assert int((sample["input_ids"] == 4).sum()) == 36
    # The prompt before the answer is what inference gives.
    alone = encode(Conversation(TURNS, (image,)))
    first = int((sample["labels"][0] != IGNORED).nonzero()[0])
    assert torch.equal(alone["input_ids"][0, :first], sample["input_ids"][0, :first])
    text = Conversation((("user", "Anything red?"), ("assistant", "yes")), ())
    assert "pixel_values" not in encode(text)


def test_a_long_sample_is_cut_behind_an_answer_not_in_an_image(
    processor: Any, encode: Encoder
) -> None:
    conversation = Conversation(TURNS + MORE, (make_scene("train", 0).image,))
    whole = encode(conversation)["input_ids"].shape[1]
    short = Encoder(processor, encode.placeholders, whole - 3)(conversation)
    assert short["input_ids"].shape == short["attention_mask"].shape == (1, whole - 3)
    assert learned(processor, short) == ["yes", "</s>"]
    with pytest.raises(InputError, match="images alone are longer than max_length=20"):
        Encoder(processor, encode.placeholders, 20)(conversation)
    answer = int((encode(conversation)["labels"][0] != IGNORED).nonzero()[0])
    with pytest.raises(InputError, match="no answer begins"):
        Encoder(processor, encode.placeholders, answer)(conversation)


def test_align_finds_answers_behind_runs_of_any_length() -> None:
    plain, mark = [1, 9, 9, 5, 9, 7, 8], [False, False, False, False, False, True, True]
    full = [1, 9, 9, 9, 9, 5, 9, 9, 7, 8]
    assert align(plain, mark, full, {9}) == [False] * 8 + [True, True]
    for other in ([1, 9, 9, 5, 9, 7], [1, 9, 9, 6, 9, 7, 8], [1, 9, 5, 9, 3, 7, 8]):
        with pytest.raises(UnsupportedModelError, match="more than placeholders"):
            align(plain, mark, other, {9})


def test_a_template_without_an_end_gets_one_after_each_answer() -> None:
    _, processor = build()
    template = processor.chat_template
    processor.chat_template = template.replace(
        "{{ ' ' if message['role'] == 'user' else '</s>' }}", "{{ ' ' }}"
    )
    sample = Encoder(processor, [4], None)(Conversation(TURNS, (make_scene("train", 0).image,)))
    assert learned(processor, sample) == ["yes", "</s>"]
    processor.chat_template = template.replace("message['content'] is string", "not loop.last")
    with pytest.raises(UnsupportedModelError, match="differently once others follow"):
        Encoder(processor, [4], None)(Conversation(TURNS + MORE, (make_scene("train", 0).image,)))
    processor.chat_template = None
    with pytest.raises(UnsupportedModelError, match="chat template"):
        Encoder(processor, [4], None)


def test_batches_are_padded_on_the_right(encode: Encoder) -> None:
    image = make_scene("train", 0).image
    one, two = encode(Conversation(TURNS, (image,))), encode(Conversation(TURNS + MORE, (image,)))
    text = encode(Conversation((("user", "Anything red?"), ("assistant", "yes")), ()))
    batch = collate([one, two, text], pad_id=0)
    length = two["input_ids"].shape[1]
    assert batch["input_ids"].shape == (3, length)
    gap = length - one["input_ids"].shape[1]
    assert batch["attention_mask"][0, -gap:].sum() == 0
    assert bool((batch["labels"][0, -gap:] == IGNORED).all())
    assert batch["pixel_values"].shape[0] == 2
    odd = {**one, "pixel_values": one["pixel_values"][..., :-8]}
    with pytest.raises(ConfigError, match="micro_batch_size: 1"):
        collate([one, odd], pad_id=0)


HUMAN, GPT = {"from": "human", "value": "<image> Anything red?"}, {"from": "gpt", "value": "yes"}
BAD = {
    "no mapping": (["words"], "no mapping"),
    "no turns": (record(conversations=None), "conversations"),
    "empty turns": (record(conversations=[]), "alternate"),
    "answer first": (record(conversations=[GPT, HUMAN]), "alternate"),
    "no answer": (record(conversations=[HUMAN]), "alternate"),
    "unknown speaker": (record(conversations=[HUMAN, {"from": "cat", "value": "miau"}]), "from"),
    "no value": (record(conversations=[HUMAN, {"from": "gpt"}]), "value"),
    "empty answer": (record(conversations=[HUMAN, {"from": "gpt", "value": " "}]), "empty answer"),
    "empty question": (
        record(conversations=[{"from": "human", "value": "<image>"}, GPT]),
        "empty question",
    ),
    "image is a number": (record(image=3), "neither a path"),
    "no image": (
        record(image=None, conversations=[{"from": "human", "value": "Why?"}, GPT]),
        "text_only",
    ),
    "no mark": (record(conversations=[{"from": "human", "value": "Why?"}, GPT]), "0 times"),
    "two images, one mark": (record(image=["scene.png", "scene.png"]), "2 images"),
    "mark in an answer": (
        record(
            conversations=[
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "<image> because"},
            ]
        ),
        "after the first question",
    ),
    "missing file": (record(image="nothing.png"), "no image"),
}
UNREADABLE = {
    "broken file": (record(image="broken.png"), "cannot be read"),
    "no picture": (record(image="words.png"), "not an image"),
    "too large": (record(image="large.png"), "max_image_pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_named_before_the_training(name: str, data: Writer) -> None:
    bad, part = BAD[name]
    found = source(data([record(), record(), bad]))
    assert list(found.problems) == [2]
    with pytest.raises(InputError, match=r"1 of 3 samples of mix\.json") as caught:
        check_source(found, skip_bad=False)
    assert "sample 2: " in str(caught.value)
    assert part in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    check_source(found, skip_bad=True)
    with pytest.raises(InputError, match=r"sample 2 of mix\.json"):
        found[2]


@pytest.mark.parametrize("name", UNREADABLE)
def test_bad_images_are_named_when_they_are_opened(
    name: str, data: Writer, encode: Encoder
) -> None:
    bad, part = UNREADABLE[name]
    found = source(data([record(), bad, record()]))
    assert not found.problems
    with pytest.raises(InputError, match=r"sample 1 of mix\.json") as caught:
        Samples(found, encode, skip_bad=False)[1]
    assert part in str(caught.value)
    skipping = Samples(found, encode, skip_bad=True)
    assert skipping[1][SKIPPED].tolist() == [1]
    assert torch.equal(skipping[1]["input_ids"], skipping[2]["input_ids"])
    assert skipping[0][SKIPPED].tolist() == []


def test_lines_of_json(data: Writer) -> None:
    found = source(data([record(), "{", record()], "mix.jsonl"))
    assert len(found) == 3
    assert "not JSON" in found.problems[1]
    assert len(source(data([record()] * 5), samples=2)) == 2


@pytest.mark.parametrize("name", ["mix.json", "mix.jsonl"])
def test_separators_within_strings_and_a_mark_before_the_text(name: str, data: Writer) -> None:
    """What ``str.splitlines`` takes for line ends is none in JSON; some programs write a mark."""
    answer = "one\u2028two\u2029three\x85four"
    one = record()
    one["conversations"][-1]["value"] = answer
    file = data([one, record()], name)
    records = [one, record()]
    dumped = [json.dumps(r, ensure_ascii=False) for r in records]
    text = "\r\n".join(dumped) if name.endswith("l") else f"[{', '.join(dumped)}]"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = source(file)
    assert len(found) == 2
    assert not found.problems


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("mix.json", "{", "not JSON"),
        ("mix.json", "{}", ".jsonl"),
        ("mix.json", "[]", "no samples"),
        ("none.json", None, "cannot be read"),
    ],
)
def test_bad_files(
    name: str, text: str | None, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    out = str(tmp_path / "out")
    assert train.main(["--data", str(tmp_path / name), "--out", out]) == 2
    assert part in capsys.readouterr().err


def test_all_bad_is_an_error_also_when_skipping(data: Writer, encode: Encoder) -> None:
    found = source(data([record(image="nothing.png")] * 5))
    with pytest.raises(InputError, match=r"and 2 more\. Mend the data"):
        check_source(found, skip_bad=True)
    late = Samples(source(data([record(image="broken.png")] * 2)), encode, skip_bad=True)
    with pytest.raises(InputError, match="no sample that can be used"):
        late[0]


def test_text_alone_is_a_sample_where_it_is_asked_for(data: Writer) -> None:
    text = record(image=None, conversations=[{"from": "human", "value": "Why?"}, GPT])
    found = source(data([text]), text_only=True)
    assert not found.problems
    assert found[0].images == ()


def test_scenes_ask_each_kind_of_question_in_turn() -> None:
    scenes = Scenes(4)
    assert len(scenes) == 4
    assert len({scenes[i].turns[0][1] for i in range(4)}) > 1
    assert all("<image>" in scenes[i].turns[0][1] for i in range(4))


def test_scenes_are_as_large_as_their_model_is_shown_them() -> None:
    sizes = {Scenes(12, DYNAMIC)[i].images[0].size for i in range(12)}
    assert len(sizes) > 2
    assert all(width % 16 == height % 16 == 0 for width, height in sizes)
    assert {Scenes(12)[i].images[0].size for i in range(12)} == {(192, 192)}
