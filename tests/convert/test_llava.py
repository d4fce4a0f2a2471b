"""LLaVA and VILA-7B: converted checkpoints compute what the original weights compute."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import atp_patch
from atp_patch.convert.__main__ import main
from atp_patch.convert.llava import llava_plan
from atp_patch.convert.write import write as write_plan
from atp_patch.tools.loading import encode, load_checkpoint
from tests.convert.checkpoints import (
    UNNEEDED,
    Original,
    save_json,
    save_tokenizer,
    write,
    write_vila,
)
from tests.helpers import tiny

IMAGE_ID = tiny.VOCAB  # the first id behind the language model's own words


def make_flat(folder: Path, **options: Any) -> Original:
    original = Original()
    write(folder, original.flat(), **options)
    save_json(folder / "config.json", original.config())
    save_json(folder / "vision" / "config.json", original.vision.to_dict())
    return original


def make_split(folder: Path) -> Original:
    original = Original()
    write_vila(folder, original)
    return original


def make_linear(folder: Path) -> Original:
    original = Original("linear")
    write(folder, original.flat())
    save_json(folder / "config.json", original.config(mm_projector_type="linear"))
    save_json(folder / "vision" / "config.json", original.vision.to_dict())
    return original


def make_split_towerless(folder: Path) -> Original:
    original = make_split(folder)
    (folder / "vision_tower").rename(folder / "vision")
    return original


def make_split_linear(folder: Path) -> Original:
    original = Original("linear")
    write_vila(folder, original, "linear")
    return original


def make_towerless(folder: Path) -> Original:
    """The tower is elsewhere, within a whole CLIP."""
    original = Original()
    write(folder, original.flat(tower=False))
    save_json(folder / "config.json", original.config())
    text = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    whole = {**original.tower_tensors(), **text, "visual_projection.weight": torch.ones(2, 2)}
    write(folder / "vision", whole, "bin")
    clip = {"model_type": "clip", "vision_config": original.vision.to_dict()}
    save_json(folder / "vision" / "config.json", clip)
    return original


LAYOUTS: dict[str, tuple[str, Callable[[Path], Original]]] = {
    "flat": ("llava", make_flat),
    "shards": ("llava", lambda folder: make_flat(folder, shards=3)),
    "bin": ("llava", lambda folder: make_flat(folder, kind="bin")),
    "bin-shards": ("vila", lambda folder: make_flat(folder, kind="bin", shards=2)),
    "towerless": ("llava", make_towerless),
    "linear": ("llava", make_linear),
    "vila": ("vila", make_split),
    "vila-towerless": ("vila", make_split_towerless),
    "vila-linear": ("vila", make_split_linear),
}


def convert(kind: str, folder: Path, out: Path) -> int:
    tower = ["--vision-tower", str(folder / "vision")] if (folder / "vision").is_dir() else []
    return main([kind, str(folder), str(out), *tower])


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(5)
    words = torch.randint(tiny.FIRST_WORD, tiny.VOCAB, (2, 12))
    ids = torch.cat([words[:, :3], torch.full((2, 36), IMAGE_ID), words[:, 3:]], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 48, 48)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_original_weights(layout: str, tmp_path: Path) -> None:
    kind, make = LAYOUTS[layout]
    original, out = make(tmp_path / "old"), tmp_path / "new"
    assert convert(kind, tmp_path / "old", out) == 0
    model, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), "a tensor is left over, missing or random"
    given = inputs()
    with torch.no_grad():
        logits = model.eval()(**given).logits
    expected = original.logits(given["input_ids"], given["pixel_values"])
    assert logits.shape[-1] == tiny.VOCAB + 1
    difference = (logits[..., : tiny.VOCAB] - expected).abs().max()
    assert difference <= 1e-5
    assert model.config.text_config.rope_parameters["rope_theta"] == 5000.0


def test_another_language_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = make_split(tmp_path / "old")
    config = {**original.text.to_dict(), "model_type": "qwen2"}
    save_json(tmp_path / "old" / "llm" / "config.json", config)
    assert main(["vila", str(tmp_path / "old"), str(tmp_path / "new")]) == 2
    assert "'qwen2'; llama can be converted" in capsys.readouterr().err


def test_every_tensor_goes_to_one_place(tmp_path: Path) -> None:
    original = make_flat(tmp_path / "old")
    assert convert("llava", tmp_path / "old", tmp_path / "new") == 0
    written = load_file(tmp_path / "new" / "model.safetensors")
    left = dict(original.flat())
    for tensor in written.values():
        same = [
            name
            for name, old in left.items()
            if old.shape[1:] == tensor.shape[1:] and torch.equal(old, tensor[: len(old)])
        ]
        assert len(same) >= 1, "a tensor that the original does not have"
        del left[same[0]]
    assert set(left) == UNNEEDED


def test_shards_are_filled_one_by_one(tmp_path: Path) -> None:
    make_flat(tmp_path / "old")
    plan = llava_plan(tmp_path / "old", tmp_path / "old" / "vision")
    out = tmp_path / "new"
    size = write_plan(plan, out, shard_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    tables = [load_file(path) for path in files]
    sizes = [sum(t.numel() * t.element_size() for t in table.values()) for table in tables]
    assert all(s <= 100_000 for s in sizes)
    assert sum(sizes) == size == index["metadata"]["total_size"]
    assert (
        LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)[1][
            "missing_keys"
        ]
        == set()
    )


def test_tensors_are_let_go_as_they_are_written(tmp_path: Path) -> None:
    make_flat(tmp_path / "old", shards=2)
    plan = llava_plan(tmp_path / "old", tmp_path / "old" / "vision")
    read, alive, most = plan.tensors, [], 0

    def watched(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, tensor in read(dtype):
            alive.append(weakref.ref(tensor))
            most = max(most, sum(one() is not None for one in alive))
            yield name, tensor

    plan.tensors = watched
    write_plan(plan, tmp_path / "new", shard_bytes=100_000)
    assert len(alive) > 100
    assert most <= 2


def test_half_precision_stays(tmp_path: Path) -> None:
    original = make_linear(tmp_path / "old")
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in original.flat().items()}
    write(tmp_path / "old", halves)
    assert convert("llava", tmp_path / "old", tmp_path / "new") == 0
    kinds = {x.dtype for x in load_file(tmp_path / "new" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_converted_model_answers_and_is_pruned(tmp_path: Path) -> None:
    """Tokenizer, processor and chat template come along; the demo's way of loading works."""
    make_flat(tmp_path / "old")
    save_tokenizer(tmp_path / "old")
    assert convert("llava", tmp_path / "old", tmp_path / "new") == 0
    model, processor = load_checkpoint(
        str(tmp_path / "new"), torch.device("cpu"), torch.float32, lambda model: None
    )
    batch = encode(processor, Image.new("RGB", (60, 40), "red"), "w20 w21", model)
    ids = batch["input_ids"][0].tolist()
    assert ids.count(IMAGE_ID) == 36
    assert tuple(batch["pixel_values"].shape) == (1, 3, 48, 48)
    atp_patch.patch_model(model, [2, 4, 6], "fastv", keep=0.5)
    answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert IMAGE_ID not in answer[0, len(ids) :].tolist()
    assert atp_patch.last_trace(model).layers[6].kept.sum() < len(ids)
    assert processor.image_processor.do_pad
    assert model.generation_config.suppress_tokens == [IMAGE_ID]


def test_a_prompt_reads_as_the_original_s(tmp_path: Path) -> None:
    make_flat(tmp_path / "old")
    save_tokenizer(tmp_path / "old")
    convert("llava", tmp_path / "old", tmp_path / "new")
    _, processor = load_checkpoint(
        str(tmp_path / "new"), torch.device("cpu"), torch.float32, lambda model: None
    )
    image = {"type": "image"}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "Where?"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == ("Be brief. USER: <image>\nWhat? ASSISTANT: This.</s>USER: Where? ASSISTANT:")
