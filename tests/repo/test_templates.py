"""Tiny models are copied from templates: every copy is whole, equal and on its own."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import shape_of
from tests.helpers.copies import Template
from tests.helpers.inputs import batch
from tests.helpers.run import forward


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_a_copy_is_as_deepcopy_makes_it(kind: str) -> None:
    model = tiny.tiny_model(kind)
    twin, deep = Template(model).copy(), copy.deepcopy(model)
    assert shape_of(twin) == shape_of(deep)
    tensors, expected = twin.state_dict(), deep.state_dict()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in deep.parameters()
    ]
    inputs = batch(model, prompts.MIXED)
    assert torch.equal(forward(twin, inputs).logits, forward(model, inputs).logits)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_copies_share_nothing(kind: str) -> None:
    model = tiny.tiny_model(kind)
    template = Template(model)
    first, second = template.copy(), template.copy()
    shared = [{t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (model, first)]
    assert not shared[0] & shared[1]
    before = {name: value.clone() for name, value in second.state_dict().items()}
    with torch.no_grad():
        for one in (model, first):
            for tensor in (*one.parameters(), *one.buffers()):
                tensor.zero_()
            one.config.get_text_config().vocab_size = 1
            one.generation_config.max_length = 3
    third = template.copy()
    for one in (second, third):
        assert all(torch.equal(one.state_dict()[name], value) for name, value in before.items())
        assert one.config.get_text_config().vocab_size == tiny.VOCAB
        assert one.generation_config.max_length != 3


def test_tied_weights_stay_tied() -> None:
    model = tiny.tiny_model("llava-llama")
    model.lm_head.weight = model.get_input_embeddings().weight
    twin = Template(model).copy()
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    assert twin.lm_head.weight is not model.lm_head.weight
