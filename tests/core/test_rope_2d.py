"""Visual tokens turned by row and column: against rotary tables made from angles, and exactness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.maths import rotary_frequencies, turn_by_place
from tests.core.test_learning import labelled
from tests.helpers import inputs as made
from tests.helpers.compare import assert_close, snapshot
from tests.helpers.oracle import masked_logits
from tests.helpers.run import forward, generate, kept_of
from tests.helpers.tiny import CLIP_SIDE, HEAD_DIM, LLAVA, tiny_model

LAYERS = [2, 4, 6]


def places(inputs: dict[str, Tensor]) -> Tensor:
    """(2, B, L): the row's and the column's position of each token, by walking over the ids."""
    ids = inputs["input_ids"].tolist()
    found = torch.arange(len(ids[0])).repeat(2, len(ids), 1)
    for b, sample in enumerate(ids):
        visual = [i for i, token in enumerate(sample) if token == 5]
        for number, i in enumerate(visual):
            first = visual[number - number % CLIP_SIDE**2]
            found[0, b, i] = first + (i - first) // CLIP_SIDE
            found[1, b, i] = first + (i - first) % CLIP_SIDE
    return found


def turning(inputs: dict[str, Tensor], theta: float) -> Any:
    """A rotary embedding of the whole prompt by its angles, for a plain model."""
    row, column = places(inputs)

    def tables(x: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        angles = torch.zeros(*row.shape, HEAD_DIM)
        for j in range(HEAD_DIM // 2):
            position = row if j % 2 == 0 else column
            angle = position * theta ** (-2 * j / HEAD_DIM)
            angles[..., j] = angles[..., j + HEAD_DIM // 2] = angle
        return angles.cos(), angles.sin()

    return tables


def turned_plain(kind: str, inputs: dict[str, Tensor], attention: str = "sdpa") -> Any:
    model = tiny_model(kind, attention)
    decoder = model.get_decoder()
    theta = decoder.config.rope_parameters["rope_theta"]
    decoder.rotary_emb.forward = turning(inputs, theta)
    return model


@pytest.mark.parametrize("kind", LLAVA)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pruned_is_masked_with_turned_tokens(kind: str, padding: str, attention: str) -> None:
    model = tiny_model(kind, attention)
    inputs = made.batch(model, made.MIXED, padding)
    plain = turned_plain(kind, inputs, attention)
    atp_patch.patch_model(model, LAYERS, "fastv", keep=1.0, rope_2d=True)
    real = inputs["attention_mask"].bool()
    straight = forward(tiny_model(kind, attention), inputs).logits
    whole = forward(model, inputs).logits
    assert_close(whole, forward(plain, inputs).logits, real)
    assert float((whole - straight)[real].abs().max()) > 1e-2
    atp_patch.patch_model(model, LAYERS, "fastv", keep=0.5, rope_2d=True)
    logits = forward(model, inputs).logits
    kept = kept_of(model)
    assert_close(logits, masked_logits(plain, inputs, kept), kept[6])


def test_a_batch_is_its_samples_and_text_is_as_before() -> None:
    model = atp_patch.patch_model(
        tiny_model("llava-llama"), LAYERS, "fastv", keep=0.5, rope_2d=True
    )
    together = forward(model, made.batch(model, made.SAME_SIZE)).logits
    for b, prompt in enumerate(made.SAME_SIZE):
        alone = forward(model, made.batch(model, (prompt,))).logits
        torch.testing.assert_close(together[b : b + 1, -5:], alone[:, -5:], rtol=0, atol=1e-5)
    text = made.batch(model, made.NO_IMAGE)
    assert torch.equal(forward(model, text).logits, forward(tiny_model("llava-llama"), text).logits)


def test_cached_is_uncached() -> None:
    model = atp_patch.patch_model(
        tiny_model("llava-llama"), LAYERS, "fastv", keep=0.5, rope_2d=True
    )
    inputs = made.batch(model, made.SINGLE)
    cached = generate(model, inputs)
    assert torch.equal(cached, generate(model, inputs, use_cache=False))


def test_unpatching_and_disabling_leave_the_hosts_positions() -> None:
    model = tiny_model("llava-llama")
    inputs = made.batch(model, made.SINGLE)
    expected, before = forward(model, inputs).logits, snapshot(model)
    atp_patch.patch_model(model, LAYERS, "fastv", keep=1.0, rope_2d=True)
    assert not torch.equal(forward(model, inputs).logits, expected)
    with atp_patch.disabled(model):
        assert torch.equal(forward(model, inputs).logits, expected)
    atp_patch.unpatch_model(model)
    assert torch.equal(forward(model, inputs).logits, expected)
    assert snapshot(model) == before


def test_masked_training_is_gathered_inference() -> None:
    model = tiny_model("llava-llama")
    atp_patch.patch_model(model, LAYERS, thresholds="learned", reference_grid=6, rope_2d=True)
    inputs = made.batch(model, made.MIXED, "right")
    expected = forward(model, inputs).logits
    kept = kept_of(model)[6]
    got = forward(model.train(), inputs).logits
    torch.testing.assert_close(got[kept], expected[kept], rtol=0, atol=1e-5)
    model(**labelled(model)).loss.backward()
    assert float(model.get_decoder().layers[0].self_attn.q_proj.weight.grad.abs().max()) > 0


def test_it_travels_with_the_adapter(tmp_path: Path) -> None:
    model = tiny_model("llava-llama")
    atp_patch.patch_model(model, LAYERS, "fastv", keep=0.5, rope_2d=True)
    inputs = made.batch(model, made.SINGLE)
    expected = forward(model, inputs).logits
    atp_patch.save_pretrained(model, tmp_path)
    again = tiny_model("llava-llama").requires_grad_(False)
    atp_patch.patch_model(again, weights=tmp_path)
    assert torch.equal(forward(again, inputs).logits, expected)
    file = tmp_path / "atp_config.json"
    older = file.read_text(encoding="utf-8").replace(',\n  "rope_2d": true', "")
    file.write_text(older, encoding="utf-8")
    atp_patch.patch_model(again, weights=tmp_path)
    assert not torch.equal(forward(again, inputs).logits, expected)


def test_where_it_cannot_work_it_is_refused() -> None:
    frozen = tiny_model("llava-llama").requires_grad_(False)
    with pytest.raises(atp_patch.ConfigError, match='rope_2d="force"'):
        atp_patch.patch_model(frozen, LAYERS, keep=0.5, rope_2d=True)
    atp_patch.patch_model(frozen, LAYERS, keep=0.5, rope_2d="force")
    with pytest.raises(atp_patch.ConfigError, match="rope_2d='both'"):
        atp_patch.patch_model(frozen, LAYERS, keep=0.5, rope_2d="both")
    for kind in ("qwen2_vl", "qwen2_5_vl"):
        with pytest.raises(atp_patch.UnsupportedModelError, match=r"qwen2_vl models .* \(M-RoPE\)"):
            atp_patch.patch_model(tiny_model(kind), LAYERS, keep=0.5, rope_2d=True)
    late = tiny_model("llava-llama")
    atp_patch.patch_model(late, LAYERS, thresholds="learned", rope_2d=True)
    late.get_decoder().requires_grad_(False)
    with pytest.raises(atp_patch.ConfigError, match="it is frozen"):
        late.train()(**labelled(late))


def test_tables_of_both_kinds() -> None:
    angle = torch.arange(5.0)[None, :, None] * torch.tensor([1.0, 0.5, 0.1])
    apart, beside = torch.cat([angle, angle], 2), angle.repeat_interleave(2, 2)
    row, column = torch.tensor([[0, 1, 1, 2, 4]]), torch.tensor([[0, 1, 2, 3, 4]])
    for table, expected in ((apart, [0, 1, 2, 0, 1, 2]), (beside, [0, 0, 1, 1, 2, 2])):
        frequency = rotary_frequencies(table.cos()[:, -1:])
        assert frequency is not None
        assert frequency.tolist() == expected
        got = turn_by_place(table.cos(), row, column, frequency)
        for token in range(5):
            for d in range(6):
                place = (row if expected[d] % 2 == 0 else column)[0, token]
                assert got[0, token, d] == table[0, place, d].cos()
    assert rotary_frequencies(torch.rand(1, 2, 6)) is None
    assert rotary_frequencies(torch.rand(1, 2, 5)) is None
