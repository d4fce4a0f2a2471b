"""InternVL-2: converted checkpoints compute what the original model computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLForConditionalGeneration,
    LlamaConfig,
    Qwen2Config,
)

import atp_patch
from atp_patch.convert.__main__ import main
from tests.convert.checkpoints import save_json, save_tokenizer, write
from tests.families.kinds import MIXED, TEXT
from tests.families.outside import Case, internvl_case
from tests.helpers import tiny

WORDS = {"<IMG_CONTEXT>": tiny.IMAGE, "<img>": 6, "</img>": 7}
LARGE = {"qk_normalization": True, "norm_type": "rms_norm", "qkv_bias": False}  # InternViT-6B
MODELS = {
    "qwen2": internvl_case(Qwen2Config(**TEXT), "qwen2"),
    "llama": internvl_case(LlamaConfig(**TEXT), "llama"),
    "large-tower": internvl_case(LlamaConfig(**TEXT), "large-tower", **LARGE),
    "tied": internvl_case(Qwen2Config(**TEXT, tie_word_embeddings=True), "tied"),
}


def tower_config(model: Any) -> dict[str, Any]:
    """The vision part of config.json, as the original has it."""
    own = model.config.vision_config.to_dict()
    return {**own, "model_type": "intern_vit_6b", "hidden_act": "gelu", "num_channels": 3}


def make(case: Case, folder: Path, **more: Any) -> Any:
    model = case.build()
    tensors = dict(model.state_dict())
    if case.name == "tied":
        del tensors["language_model.lm_head.weight"]
    write(folder, tensors, shards=2)
    text = {**model.config.llm_config.to_dict(), "attn_implementation": "flash_attention_2"}
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "force_image_size": 48,
        "llm_config": text,
        "vision_config": tower_config(model),
        "max_dynamic_patch": 6,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "Hermes-2",
        **more,
    }
    save_json(folder / "config.json", config)
    save_tokenizer(folder, WORDS)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_original_model(name: str, tmp_path: Path) -> None:
    case, out = MODELS[name], tmp_path / "new"
    original = make(case, tmp_path / "old")
    assert main(["internvl", str(tmp_path / "old"), str(out)]) == 0
    model, report = InternVLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), "a tensor is left over, missing or random"
    given = case.batch(original, MIXED)
    with torch.no_grad():
        expected = original(**given.forward).logits
        actual = model.eval()(**given.generate).logits
    difference = (actual - expected)[given.real].abs().max()
    assert difference <= 1e-5
    assert model.config.image_token_id == tiny.IMAGE
    assert model.config.image_seq_length == 36


def test_the_converted_model_is_pruned_as_the_object_is(tmp_path: Path) -> None:
    """The same tokens go, the same logits stay."""
    case, out = MODELS["qwen2"], tmp_path / "new"
    original = make(case, tmp_path / "old")
    main(["internvl", str(tmp_path / "old"), str(out)])
    model = InternVLForConditionalGeneration.from_pretrained(out).eval()
    given = case.batch(original, MIXED)
    results = []
    for one, inputs in ((original, given.forward), (model, given.generate)):
        atp_patch.patch_model(one, [2, 4, 6], "fastv", keep=0.5)
        with torch.no_grad():
            logits = one(**inputs).logits
        results.append((logits, atp_patch.last_trace(one).layers[6].kept))
    (expected, kept), (actual, chosen) = results
    assert torch.equal(kept, chosen)
    assert (actual - expected)[kept].abs().max() <= 1e-5


def test_every_tensor_goes_to_one_place(tmp_path: Path) -> None:
    original = make(MODELS["qwen2"], tmp_path / "old")
    main(["internvl", str(tmp_path / "old"), str(tmp_path / "new")])
    written = load_file(tmp_path / "new" / "model.safetensors")
    left = dict(original.state_dict())
    for name in [name for name in left if "attn.qkv" in name]:
        whole = left.pop(name)
        left |= {f"{name}.{i}": part for i, part in enumerate(whole.chunk(3))}
    for tensor in written.values():
        same = [name for name, old in left.items() if torch.equal(old, tensor)]
        assert same, "a tensor that the original does not have"
        del left[same[0]]
    assert not left


def test_tokenizer_and_processor_come_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(MODELS["qwen2"], tmp_path / "old")
    out = tmp_path / "new"
    main(["internvl", str(tmp_path / "old"), str(out)])
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.start_image_token, tokenizer.end_image_token) == ("<img>", "</img>")
    assert tokenizer.context_image_token_id == tiny.IMAGE
    assert tokenizer.video_token == "<video>"
    table = json.loads((out / "processor_config.json").read_text())
    assert table["processor_class"] == "InternVLProcessor"
    assert table["image_seq_length"] == 36
    images = GotOcr2ImageProcessor.from_pretrained(out)
    assert (images.min_patches, images.max_patches) == (1, 6)
    assert images.size["height"] == 48
    tiles = images(torch.zeros(3, 48, 96, dtype=torch.uint8), return_tensors="pt")
    assert tuple(tiles["pixel_values"].shape) == (3, 3, 48, 48)  # two tiles and the whole
    assert "chat_template.jinja cannot be derived" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["InternVLForConditionalGeneration"]}, "-hf need no conversion"),
        ({"llm_config": {"model_type": "internlm2"}}, "'internlm2'.*qwen2 or llama"),
        ({"ps_version": "v1"}, "only v2"),
        ({"force_image_size": 96}, "force_image_size 96"),
        ({"vision_config": {}}, "KeyError: 'image_size'.*download it anew"),
        ({"llm_config": {"model_type": "llama", "hidden_size": "x"}}, "hidden_size"),
    ],
)
def test_other_checkpoints_are_refused(
    changes: dict[str, Any],
    match: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(MODELS["llama"], tmp_path / "old", **changes)
    check_refused(tmp_path, capsys, match)


def test_a_tokenizer_that_does_not_know_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(MODELS["llama"], tmp_path / "old")
    save_tokenizer(tmp_path / "old")
    check_refused(tmp_path, capsys, "does not have <img>, </img>, <IMG_CONTEXT>")


def check_refused(folder: Path, capsys: pytest.CaptureFixture[str], match: str) -> None:
    """One line on stderr, status 2, nothing written."""
    assert main(["internvl", str(folder / "old"), str(folder / "new")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert re.search(match, captured.err), captured.err
    assert sorted(path.name for path in folder.iterdir()) == ["old"]
