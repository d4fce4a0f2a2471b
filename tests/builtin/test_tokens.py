"""The shipped tokenizer knows every word, and agrees with the one that training uses."""

from __future__ import annotations

import pytest
from transformers import AutoProcessor, LlavaProcessor

from atp_patch.builtin import builtin_path, make_scene, prompt
from atp_patch.builtin.tokens import SPECIALS, UNK, VOCABULARY_SIZE, encode, word_ids
from atp_patch.builtin.vocabulary import words
from workshop.processing import build_processor


@pytest.fixture(scope="module", params=["built", "shipped"])
def processor(request: pytest.FixtureRequest) -> LlavaProcessor:
    if request.param == "built":
        return build_processor()
    loaded: LlavaProcessor = AutoProcessor.from_pretrained(builtin_path())
    return loaded


def test_vocabulary_fits() -> None:
    assert len(word_ids()) == len(SPECIALS) + len(words()) <= VOCABULARY_SIZE


def test_every_word_comes_back(processor: LlavaProcessor) -> None:
    for word in words():
        ids = processor.tokenizer.encode(word, add_special_tokens=False)
        assert ids == [word_ids()[word]]
        assert processor.tokenizer.decode(ids) == word


def test_questions_and_answers_have_no_unknown_word(processor: LlavaProcessor) -> None:
    unknown = word_ids()[UNK]
    for k in range(200):
        for question in make_scene("development", k).questions:
            for text in (question.text, question.answer):
                ids = processor.tokenizer.encode(text, add_special_tokens=False)
                assert unknown not in ids, text
                assert ids == encode(text)
            assert processor.tokenizer.decode(encode(question.answer)) == question.answer


def test_unknown_words_do_not_crash(processor: LlavaProcessor) -> None:
    ids = processor.tokenizer.encode("Describe the zebra, please", add_special_tokens=False)
    assert word_ids()[UNK] in ids


def test_prompt_is_what_the_chat_template_writes(processor: LlavaProcessor) -> None:
    question = "How many red shapes are there?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    written = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert written == prompt(question)


def test_image_becomes_576_tokens(processor: LlavaProcessor) -> None:
    image = make_scene("test", 0).image
    for sized in (image, image.resize((400, 300))):
        inputs = processor(images=sized, text=prompt("Read the sign."), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 192, 192)
        assert int((inputs["input_ids"] == word_ids()["<image>"]).sum()) == 576
        assert inputs["input_ids"][0, 0] == word_ids()["<s>"]
        assert inputs["input_ids"][0, 1] != word_ids()["<s>"]
