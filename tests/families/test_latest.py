"""What Granite 4 Vision, Gemma 3n and Phi-4 multimodal alone have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import atp_patch
from tests.families import gemma3n, granite4, phi4
from tests.families.kinds import SINGLE, Kind, make
from tests.families.test_every_family import patched
from tests.helpers import tiny
from tests.helpers.compare import assert_close
from tests.helpers.doors import Asked
from tests.helpers.run import forward, kept_of


def row(table: Any) -> Kind:
    """The one row of a family that the installed version of transformers may lack."""
    if not table.KINDS:
        pytest.skip("this version of transformers has no such model")
    kind: Kind = table.KINDS[0]
    return kind


def test_methods_at_the_door_see_the_features_that_come_first() -> None:
    kind, views = row(granite4), []

    class Looks(Asked):
        name = "looks"

        def decide(self, view: atp_patch.DoorView) -> atp_patch.Decision:
            views.append(view)
            return super().decide(view)

    model = atp_patch.patch_model(kind.build(), method=Looks(), keep=0.5)
    inputs = make(kind, SINGLE).inputs
    forward(model, inputs)
    found = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    ((first, packed), *_) = found.deepstack_features
    assert first == min(granite4.ADDED)
    (view,) = views
    places = (inputs["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()
    wanted = packed[0][[places.index(place) for place in view.layout.position[0].tolist()]]
    assert torch.equal(view.features[0], wanted)


def test_checkpointed_layers_get_their_features_once_more() -> None:
    kind = row(granite4)
    inputs = make(kind, SINGLE).inputs
    labels = inputs["input_ids"].where(inputs["input_ids"] >= tiny.FIRST_WORD, -100)
    losses, gradients = [], []
    for checkpointed in (False, True):
        model = atp_patch.patch_model(kind.build(), list(kind.layers), "fastv", keep=0.5).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.model.spatial_projectors[3].query.grad)
    assert gradients[0].abs().max() > 0
    assert_close(losses[1], losses[0])
    assert_close(gradients[1], gradients[0])


def test_streams_of_hidden_states_come_back_to_their_places() -> None:
    kind = row(gemma3n)
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    wanted = {"output_hidden_states": True, "use_cache": False}
    states = forward(model, inputs, **wanted).hidden_states
    plain = forward(kind.build(), inputs, **wanted).hidden_states
    assert [one.shape for one in states] == [one.shape for one in plain]
    first, kept = kind.layers[0], kept_of(model)
    assert torch.equal(states[first], plain[first])
    for layer, mask in kept.items():
        behind = states[layer + 1]
        assert behind.ndim == 4
        assert (behind[:, ~mask] == 0).all()
        assert (behind[:, mask] != 0).any(-1).all()


def test_pictures_without_their_masks_are_refused() -> None:
    kind = row(phi4)
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    ids = inputs["input_ids"]
    given = {
        "inputs_embeds": model.get_input_embeddings()(ids).detach(),
        "visual_mask": ids == tiny.IMAGE,
        "image_sizes": inputs["image_sizes"],
    }
    with pytest.raises(atp_patch.InputError, match="pass image_sizes and image_attention_mask"):
        forward(model, given)
    forward(model, {**given, "image_attention_mask": inputs["image_attention_mask"]})
    assert atp_patch.last_trace(model).layers[2].kept_counts[0] < int(given["visual_mask"].sum())


def test_a_run_that_is_no_whole_pictures_is_refused() -> None:
    kind = row(phi4)
    model, inputs = patched(kind), make(kind, SINGLE).inputs
    ids = inputs["input_ids"].clone()
    last = int((ids[0] == tiny.IMAGE).nonzero().max())
    visual = ids == tiny.IMAGE
    visual[0, last] = False
    given = {
        "inputs_embeds": model.get_input_embeddings()(ids).detach(),
        "visual_mask": visual,
        "image_sizes": inputs["image_sizes"],
        "image_attention_mask": inputs["image_attention_mask"],
    }
    with pytest.raises(atp_patch.InputError, match="are not the pictures that image_sizes says"):
        forward(model, given)
