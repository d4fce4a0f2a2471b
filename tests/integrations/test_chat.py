"""A loaded model that answers batches of chats and scores continuations."""

from __future__ import annotations

import math

import pytest
import torch

from atp_patch import last_trace, patch_model
from atp_patch.builtin import load_builtin, make_scene, prompt
from atp_patch.contract.errors import ConfigError
from atp_patch.integrations.chat import ChatModel, Generation, Usage


@pytest.fixture(scope="module")
def builtin():
    return load_builtin()


def scenes(count):
    return [make_scene("development", number) for number in range(count)]


def chat_of(scene, number=0):
    question = scene.questions[number].text
    content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_answers_are_those_of_single_calls(builtin):
    model, processor = builtin
    patch_model(model, target_tokens=144)
    chats = [chat_of(scene) for scene in scenes(2)]
    chats.append([{"role": "user", "content": [{"type": "text", "text": "How many?"}]}])
    chat = ChatModel(model, processor)
    together = chat.answer(chats, Generation(max_new_tokens=4))
    alone = [chat.answer([one], Generation(max_new_tokens=4))[0] for one in chats]
    assert together == alone
    assert [answer.visual_tokens for answer in together] == [576, 576, None]
    assert together[0].average_visual_tokens == pytest.approx(144, abs=1)


def test_an_answer_ends_before_its_stop_text(builtin):
    model, processor = builtin
    chat = ChatModel(model, processor)
    asked = [chat_of(scene) for scene in scenes(1)]
    whole = chat.answer(asked, Generation(max_new_tokens=4))[0]
    letter = whole.text[1]
    cut = chat.answer(asked, Generation(max_new_tokens=4, stop=("#", letter)))[0]
    assert cut.text == whole.text.partition(letter)[0]
    assert cut.output_tokens < whole.output_tokens or whole.output_tokens == 1


def test_a_continuation_scores_what_the_model_says_token_by_token(builtin):
    model, processor = builtin
    patch_model(model, method="fastv", layers=[2], keep=0.3)
    scene = make_scene("development", 1)
    question = scene.questions[0]
    chat = ChatModel(model, processor)
    wanted = ["yes no", "no"]
    found = chat.score([chat_of(scene)] * 2, wanted)
    for score, text in zip(found, wanted, strict=True):
        inputs = processor(images=scene.image, text=prompt(question.text), return_tensors="pt").to(
            model.device
        )
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        expected, likeliest = 0.0, True
        with torch.inference_mode():
            out = model(**inputs, use_cache=True)
            for token in ids:
                logits = out.logits[0, -1].double()
                expected += float(logits[token] - logits.logsumexp(0))
                likeliest &= int(logits.argmax()) == token
                out = model(
                    input_ids=torch.tensor([[token]]),
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
        assert score.log_probability == pytest.approx(expected, abs=1e-4)
        assert (score.greedy, score.tokens) == (likeliest, len(ids))


def test_an_empty_continuation_is_refused(builtin):
    chat = ChatModel(*builtin)
    with pytest.raises(ConfigError, match="at least one token"):
        chat.score([chat_of(make_scene("development", 0))], [""])


def test_usage_is_the_sum_of_the_traces(builtin):
    model, processor = builtin
    patch_model(model, method="random", keep=0.5, seed=0)
    chat = ChatModel(model, processor)
    traces = []
    for scene in scenes(2):
        chat.answer([chat_of(scene)], Generation(max_new_tokens=1))
        traces.append(last_trace(model))
    chat.answer(
        [[{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]],
        Generation(max_new_tokens=1),
    )
    usage = Usage.from_tensor(chat.usage.as_tensor(torch.device("cpu")))
    assert usage.requests == 3
    assert usage.samples_with_images == 2
    kept = usage.kept()
    assert kept["visual_tokens"] == 576
    mean = sum(trace.average_tokens for trace in traces) / 2
    assert math.isclose(kept["visual_tokens_over_layers"], mean)
    assert math.isclose(kept["prefill_gflops"], sum(trace.flops for trace in traces) / 2e9)
    assert math.isclose(kept["kv_megabytes_plain"], traces[0].kv_bytes_plain / 1e6, rel_tol=0.01)


def test_nothing_is_said_about_tokens_of_a_plain_model():
    assert Usage(requests=3, seconds=1.0).kept() == {}
