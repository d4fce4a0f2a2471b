"""Features that are NaN or infinite: every method says so, before it prunes anything by chance."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import atp_patch
from atp_patch.seam.host.prompt_reading import _finite
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.doors import Asked, TowerReader
from tests.helpers.inputs import batch
from tests.helpers.pairing import pairs
from tests.helpers.run import BEFORE, INSIDE, forward, generate

DOORS = {"at the door": Asked(), "reads the tower": TowerReader()}
BROKEN = [torch.nan, torch.inf, -torch.inf]
EVERY = [*INSIDE, *BEFORE, *DOORS]
PLACES = {
    "one token": ((slice(5, 6), slice(None)), "^1 of "),
    "one channel": ((slice(0, 24), slice(7, 8)), r"position \d+ of sample 0"),
}
MESSAGE = "visual tokens have features that are NaN or infinite"


def patched(kind: str, method: str) -> Any:
    options: dict[str, Any] = {}
    if method in INSIDE:
        options = {"layers": [2, 4], "keep": 0.5}
    elif method == "downsample" or method in DOORS:
        options = {"keep": 0.5}
    chosen = DOORS.get(method, method)
    return atp_patch.patch_model(tiny.tiny_model(kind), method=chosen, **options)


def spoil(model: Any, value: float, where: tuple[slice, slice]) -> Any:
    """What the projector makes gets this value in some rows and channels."""
    base = model.model
    projector = base.multi_modal_projector if tiny.is_llava(model) else base.visual.merger

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output.view(-1, output.shape[-1])[where] = value
        return output

    return projector.register_forward_hook(hook)


@pairs(kind=tiny.FAMILIES, method=EVERY, value=BROKEN)
def test_a_broken_picture_is_named(kind: str, method: str, value: float) -> None:
    model = patched(kind, method)
    inputs = batch(model, prompts.SINGLE)
    good = inputs["pixel_values"].clone()
    inputs["pixel_values"].view(-1)[3] = value
    with pytest.raises(atp_patch.InputError, match=MESSAGE):
        forward(model, inputs)
    with pytest.raises(atp_patch.InputError, match=MESSAGE):
        generate(model, inputs, 2)
    assert forward(model, {**inputs, "pixel_values": good}).logits.isfinite().all()


@pairs(kind=tiny.FAMILIES, method=EVERY, value=BROKEN, place=["one token", "one channel"])
def test_broken_features_are_named(kind: str, method: str, value: float, place: str) -> None:
    where, message = PLACES[place]
    model = patched(kind, method)
    inputs = batch(model, prompts.MIXED[:1])
    handle = spoil(model, value, where)
    with pytest.raises(atp_patch.InputError, match=MESSAGE) as error:
        forward(model, inputs)
    assert re.search(message, str(error.value))
    handle.remove()
    forward(model, inputs)


def test_broken_text_is_the_hosts_affair() -> None:
    """A broken embedding of text chooses nothing before the decoder: the plain model runs too."""
    model = patched("llava-llama", "fastv")
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.FIRST_WORD :] = torch.nan
    text = batch(model, prompts.NO_IMAGE)
    assert forward(model, text).logits.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_embeddings_are_finite(dtype: torch.dtype) -> None:
    """A sum of large finite numbers is no reason to refuse a prompt; NaN and infinities are."""
    embeds = torch.full((1, 4, 4096), 1000.0).to(dtype)
    embeds[0, 1, 7] = torch.nan
    embeds[0, 2, 7], embeds[0, 2, 9] = torch.inf, -torch.inf
    embeds[0, 3, 4095] = -torch.inf
    assert _finite(embeds).tolist() == [[True, False, False, False]]
