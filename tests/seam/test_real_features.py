"""PruMerge on what trained towers see: built-in models' features against the plain statement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import atp_patch
from atp_patch.builtin import load_builtin, make_scene, prompt
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Inputs
from tests.helpers.pairing import pairs
from tests.helpers.run import forward, kept_of
from tests.seam.vision_cases import CASES, NEIGHBOURS, Case, expected, merged_features

TINY = {case.name: case for case in CASES}
LAST_BLOCK = {
    "llava": ("llava-llama", "vision_tower.encoder.layers.3.self_attn"),
    "dynamic": ("qwen3_vl-flat", "visual.blocks.3.attn"),
}
real_models = pytest.mark.parametrize("name", LAST_BLOCK)


@dataclass
class Real:
    """A built-in model, a picture that it knows with a question, and where its tower is."""

    plain: Any
    inputs: Inputs
    case: Case


def real(name: str, scenes: int = 1) -> Real:
    plain, processor = load_builtin(name)
    family, attention = LAST_BLOCK[name]
    questions = ["what colour is the sign ?", "how many stars are there ?"][:scenes]
    inputs = processor(
        images=[make_scene("test", number).image for number in range(scenes)],
        text=[prompt(question, name) for question in questions],
        return_tensors="pt",
        padding=True,
    )
    case = replace(TINY[family], build=lambda: plain, attentions=(attention,))
    return Real(plain, inputs, case)


def features_of(model: Any, case: Case, inputs: Inputs) -> Tensor:
    """What the projector of the patched model gets, or gives where outputs are merged."""
    found: list[Tensor] = []
    projector = model.model.get_submodule(case.projector)
    if case.inputs_merged:
        projector.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    else:
        projector.register_forward_hook(lambda _, args, output: found.append(output))
    forward(model, inputs)
    (features,) = found
    return features


@pairs(name=LAST_BLOCK, method=["prumerge", "prumerge+"], share=[None, 0.25])
def test_merged_features_are_those_of_the_algorithm(
    name: str, method: str, share: float | None
) -> None:
    one = real(name)
    plus = method == "prumerge+"
    wanted, (reference,) = merged_features(one.case, one.plain, one.inputs, plus, share)
    model = atp_patch.patch_model(one.plain, method=method, neighbours=NEIGHBOURS, keep=share)
    features = features_of(model, one.case, one.inputs)
    (kept,) = kept_of(model).values()
    assert torch.equal(kept, wanted)
    visual = one.inputs["input_ids"] == one.plain.config.image_token_id
    rows = kept[visual]
    assert 0 < rows.sum() < len(rows), "all or nothing was kept: this shows nothing"
    patches = features.flatten(0, -2)[-len(rows) :]  # a class token stands before them
    plain_patches = reference.flatten(0, -2)[-len(rows) :]
    # Features of the second model are as large as 100: float32 has seven digits, no more.
    largest = plain_patches[rows].abs().max().item()
    assert_close(patches[rows], plain_patches[rows], tolerance=max(1e-5, 1e-6 * largest))


@real_models
def test_answers_come_from_the_merged_features(name: str) -> None:
    one = real(name, scenes=2)
    wanted, reference = expected(one.case, one.plain, one.inputs, False, None)
    model = atp_patch.patch_model(one.plain, method="prumerge", neighbours=NEIGHBOURS)
    logits, kept = forward(model, one.inputs).logits, kept_of(model)[0]
    assert torch.equal(kept, wanted)
    visual = one.inputs["input_ids"] == one.plain.config.image_token_id
    assert len(set((kept & visual).sum(1).tolist())) == 2, "both images keep as many"
    assert_close(logits, reference, kept, tolerance=2e-5)  # of size 16: 1e-6 of them
