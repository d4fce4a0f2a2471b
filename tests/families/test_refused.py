"""Models that cannot be pruned are refused by name, too early a layer with the number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import atp_patch
from atp_patch.families import FAMILIES, family_of
from atp_patch.families.refused import REFUSED
from tests.families.hosts import HOST, NEWEST
from tests.families.mrope import DEEP
from tests.families.mrope import KINDS as MROPE

SERVED = [name for family in FAMILIES if family.outer is None for name in family.model_types]


@pytest.mark.parametrize("model_type", REFUSED)
def test_the_reason_and_the_way_out_are_named(model_type: str) -> None:
    reason, alternative = REFUSED[model_type]
    with pytest.raises(atp_patch.UnsupportedModelError) as caught:
        family_of(SimpleNamespace(model_type=model_type))
    assert model_type in str(caught.value)
    assert reason in str(caught.value)
    assert alternative in str(caught.value)
    assert alternative.split()[0] in SERVED, "the way out leads to a model that is served"


def test_every_image_text_model_of_transformers_is_served_or_refused() -> None:
    """A type that a new version adds shows here: give it a family, or a reason and a way out."""
    known = {*SERVED, *REFUSED}
    if HOST < NEWEST:
        known.add("pixtral")  # early versions name a vision tower among the models
    assert not set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - known


def test_every_name_is_a_model_of_transformers() -> None:
    assert not set(SERVED) & set(REFUSED)
    unknown = (set(SERVED) | set(REFUSED)) - set(CONFIG_MAPPING_NAMES)
    if Version("5.24") > HOST:
        unknown -= {"apertus1p5", "hy_v4_vl", "inkling2_loop"}
    if unknown and HOST < NEWEST:
        pytest.skip(f"this version has not got {', '.join(sorted(unknown))}")
    assert not unknown


def test_layers_that_still_receive_features_are_not_pruned() -> None:
    model = MROPE[0].build()
    with pytest.raises(atp_patch.ConfigError, match=f"first {DEEP} decoder layers"):
        atp_patch.patch_model(model, [DEEP - 1, 4], "fastv", keep=0.5)
    assert not model._forward_pre_hooks
    atp_patch.patch_model(model, [DEEP, 4], "fastv", keep=0.5)


def test_objects_of_other_packages_are_refused_with_the_way_to_convert_them() -> None:
    llama = {"vision_tower_cfg": {"image_size": 88, "patch_size": 8}}
    good = SimpleNamespace(model_type="llava_llama", mm_projector_cfg=LINEAR, **llama)
    assert family_of(good).name == "vila"
    for wrong, match in (
        (SimpleNamespace(model_type="llava_llama"), r"convert llava"),
        (SimpleNamespace(**{**vars(good), "dynamic_s2": True}), "dynamic_s2 = False"),
        (_internvl("internlm2"), "'internlm2'.*convert internvl"),
    ):
        with pytest.raises(atp_patch.UnsupportedModelError, match=match):
            family_of(wrong)
    assert family_of(_internvl("qwen2")).name == "internvl_chat"


def test_objects_without_the_parts_of_their_family_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    for config, part in ((_internvl("llama"), "language_model"), (VILA, "llm and no _embed")):
        model.config = config
        with pytest.raises(atp_patch.UnsupportedModelError, match=f"no {part}.*convert"):
            atp_patch.patch_model(model, [2])


LINEAR = {"mm_projector_type": "linear"}
VILA = SimpleNamespace(
    model_type="vila",
    mm_projector_cfg=LINEAR,
    vision_tower_cfg={"image_size": 88, "patch_size": 8},
)


def _internvl(backbone: str) -> SimpleNamespace:
    return SimpleNamespace(
        model_type="internvl_chat", llm_config=SimpleNamespace(model_type=backbone)
    )
