"""A family of one's own serves a model that the package does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, LlamaConfig

import atp_patch
from tests.families.kinds import MIXED, TEXT, TOWER, Drawn, Kind, Paint, make, stacked
from tests.families.own import OWN
from tests.families.tables import NOT_BUILT
from tests.families.test_every_family import check_masked
from tests.helpers import tiny
from tests.helpers.run import forward, generate

pytestmark = pytest.mark.skipif(
    "aya_vision" in NOT_BUILT, reason="this version refuses its own config of Aya Vision"
)
SIDE = 6
OPTIONS: dict[str, Any] = {"method": "fastv", "layers": [2, 4, 6], "family": OWN}


class OwnConfig(AyaVisionConfig):
    model_type = "own_vlm"


class OwnModel(AyaVisionForConditionalGeneration):
    config_class = OwnConfig


def config() -> OwnConfig:
    vision = {"model_type": "siglip_vision_model", "image_size": 48, "patch_size": 4, **TOWER}
    return OwnConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=tiny.IMAGE,
        downsample_factor=2,
        vision_feature_select_strategy="full",
    )


def draw(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    """A picture of one tile, or of two tiles in one run."""
    drawn = Drawn()
    for tile in range(1 + which):
        drawn.square(tiny.IMAGE, tile, SIDE, SIDE)
    drawn.tensors["pixel_values"] = torch.stack([paint(48, 48) for _ in range(1 + which)])
    return drawn


KIND = Kind("own", OwnModel, config, draw, stacked("pixel_values"))


def test_keeping_all_is_plain_bit_for_bit() -> None:
    plain, model = KIND.build(), atp_patch.patch_model(KIND.build(), keep=1.0, **OPTIONS)
    inputs = make(KIND, MIXED).inputs
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
    assert torch.equal(generate(model, inputs, 3), generate(plain, inputs, 3))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_gathered_is_masked(padding: str) -> None:
    model = atp_patch.patch_model(KIND.build(), keep=0.5, **OPTIONS)
    check_masked(KIND, model, KIND.build(), make(KIND, MIXED, padding))
    grids = atp_patch.last_trace(model).grids
    assert [[(g.height, g.width) for g in sample] for sample in grids[:2]] == [
        [(SIDE, SIDE)],
        [(SIDE, SIDE)] * 3,
    ]


def test_an_adapter_is_loaded_with_the_family(tmp_path: Path) -> None:
    model = atp_patch.patch_model(KIND.build(), keep=0.5, **OPTIONS)
    inputs = make(KIND, MIXED).inputs
    wanted = forward(model, inputs).logits
    atp_patch.save_pretrained(model, tmp_path)
    again = atp_patch.patch_model(KIND.build(), weights=tmp_path, family=OWN)
    assert torch.equal(forward(again, inputs).logits, wanted)


def test_what_it_does_not_serve_is_named() -> None:
    with pytest.raises(atp_patch.UnsupportedModelError, match="a Family of your own"):
        atp_patch.patch_model(KIND.build(), keep=0.5, layers=[2])
    with pytest.raises(atp_patch.ConfigError, match="serves models of type own_vlm"):
        atp_patch.patch_model(tiny.tiny_model("llava-llama"), family=OWN)
