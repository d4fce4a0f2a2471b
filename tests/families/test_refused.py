"""Models that cannot be pruned are refused by name, too early a layer with the number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import atp_patch
from atp_patch.families import FAMILIES, family_of
from atp_patch.families.refused import REFUSED
from tests.families.mrope import DEEP
from tests.families.mrope import KINDS as MROPE

SERVED = [name for family in FAMILIES for name in family.model_types]


@pytest.mark.parametrize("model_type", REFUSED)
def test_the_reason_and_the_way_out_are_named(model_type: str) -> None:
    reason, alternative = REFUSED[model_type]
    with pytest.raises(atp_patch.UnsupportedModelError) as caught:
        family_of(SimpleNamespace(model_type=model_type))
    assert model_type in str(caught.value)
    assert reason in str(caught.value)
    assert alternative in str(caught.value)
    assert alternative.split()[0] in SERVED, "the way out leads to a model that is served"


def test_every_name_is_a_model_of_transformers() -> None:
    assert set(SERVED) | set(REFUSED) <= set(CONFIG_MAPPING_NAMES)
    assert not set(SERVED) & set(REFUSED)


def test_layers_that_still_receive_features_are_not_pruned() -> None:
    model = MROPE[0].build()
    with pytest.raises(atp_patch.ConfigError, match=f"first {DEEP} decoder layers"):
        atp_patch.patch_model(model, [DEEP - 1, 4], "fastv", keep=0.5)
    assert not model._forward_pre_hooks
    atp_patch.patch_model(model, [DEEP, 4], "fastv", keep=0.5)
