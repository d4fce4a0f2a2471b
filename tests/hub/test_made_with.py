"""An adapter knows the checkpoint that it was made for, and says so where it meets another."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

import atp_patch
from atp_patch.builtin import load_builtin
from atp_patch.patching.adapter_card import at_place, with_license, with_results
from atp_patch.patching.made_with import fingerprint
from atp_patch.patching.saving import adapter
from tests.helpers.hub import Files, LoopbackHub
from tests.helpers.tiny import tiny_model
from tests.hub.test_loading import CONFIG, KIND, LAYERS


def saved(model: Any, folder: Path, **change: Any) -> Path:
    """A folder with the adapter of a model, and other entries about what it was made with."""
    atp_patch.save_pretrained(atp_patch.patch_model(model, LAYERS, "fastv", keep=0.5), folder)
    file = folder / CONFIG
    data = json.loads(file.read_text())
    data["made_with"].update(change)
    file.write_text(json.dumps(data))
    return folder


def warned(model: Any, folder: Path) -> list[str]:
    """The warnings of loading an adapter into a model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        atp_patch.patch_model(model, weights=folder)
    ours = [w for w in caught if issubclass(w.category, atp_patch.OtherBaseWarning)]
    return [str(w.message) for w in ours]


def checkpoint(folder: Path, model: Any) -> Files:
    model.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def changed(model: Any) -> Any:
    """A checkpoint of the same shapes: one layer has learned on."""
    with torch.no_grad():
        model.get_decoder().layers[3].mlp.down_proj.weight.mul_(1.1)
    return model


def test_a_checkpoint_of_the_hub_is_recorded(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.add("ann/base", checkpoint(tmp_path / "base", tiny_model(KIND)))
    model = AutoModelForImageTextToText.from_pretrained("ann/base")
    folder = saved(model, tmp_path / "adapter")
    made = json.loads((folder / CONFIG).read_text())["made_with"]
    assert made["base_model"] == "ann/base"
    assert made["base_revision"] == commit
    assert made["transformers"] == transformers.__version__
    assert made["torch"] == torch.__version__
    assert made["atp_patch"] == atp_patch.__version__
    assert len(made["fingerprint"]) == 16
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "ann/base"
    assert "base_model:adapter:ann/base" in (card.data.tags or [])
    assert "[ann/base](https://huggingface.co/ann/base)" in card.text
    processor = 'AutoProcessor.from_pretrained("ann/base")'
    assert f'{processor}\natp_patch.patch_model(model, weights="{folder.name}")' in card.text
    assert warned(AutoModelForImageTextToText.from_pretrained("ann/base"), folder) == []
    hub.add("ann/other", checkpoint(tmp_path / "other", changed(tiny_model(KIND))))
    [said] = warned(AutoModelForImageTextToText.from_pretrained("ann/other"), folder)
    assert f"was made for ann/base at {commit[:12]}" in said
    assert "this model is ann/other at " in said


def test_a_commit_that_could_be_another_is_not_recorded(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("ann/base", checkpoint(tmp_path / "base", tiny_model(KIND)))
    AutoModelForImageTextToText.from_pretrained("ann/base")
    hub.add("ann/base", checkpoint(tmp_path / "other", changed(tiny_model(KIND))))
    model = AutoModelForImageTextToText.from_pretrained("ann/base")
    made = adapter(atp_patch.patch_model(model, LAYERS, "fastv", keep=0.5)).made_with
    assert (made.base_model, made.base_revision) == ("ann/base", None)


def test_the_path_of_a_folder_is_not_recorded(tmp_path: Path) -> None:
    tiny_model(KIND).save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    folder = saved(model, tmp_path / "adapter")
    assert str(tmp_path) not in (folder / CONFIG).read_text()
    assert warned(tiny_model(KIND), folder) == []
    [said] = warned(changed(tiny_model(KIND)), folder)
    assert "whose name is not known" in said


def test_the_same_weights_under_another_name_are_the_same(tmp_path: Path) -> None:
    folder = saved(tiny_model(KIND), tmp_path, base_model="ann/base", base_revision="0" * 40)
    model = tiny_model(KIND)
    model.config._name_or_path = "bob/copy"
    assert warned(model, folder) == []


def test_without_a_fingerprint_names_are_compared(tmp_path: Path) -> None:
    folder = saved(
        tiny_model(KIND), tmp_path, base_model="ann/base", base_revision="0" * 40, fingerprint=None
    )
    for name, commit, other in (
        ("ann/base", "0" * 40, False),
        ("ann/base", None, False),
        ("ann/base", "1" * 40, True),
        ("bob/base", None, True),
        ("", None, False),
    ):
        model = tiny_model(KIND)
        model.config._name_or_path, model.config._commit_hash = name, commit
        assert bool(warned(model, folder)) == other, (name, commit)


def test_adapters_of_the_first_release_are_still_read(tmp_path: Path) -> None:
    folder = saved(tiny_model(KIND), tmp_path)
    data = json.loads((folder / CONFIG).read_text())
    del data["made_with"]
    (folder / CONFIG).write_text(json.dumps(data))
    assert warned(changed(tiny_model(KIND)), folder) == []


@pytest.mark.parametrize("change", [5, [], {"more": 1}, {"base_model": 3}, {"torch": ["2"]}])
def test_a_broken_record_is_refused(change: Any, tmp_path: Path) -> None:
    folder = saved(tiny_model(KIND), tmp_path)
    data = json.loads((folder / CONFIG).read_text())
    data["made_with"] = {**data["made_with"], **change} if isinstance(change, dict) else change
    (folder / CONFIG).write_text(json.dumps(data))
    with pytest.raises(atp_patch.WeightsError, match=CONFIG):
        atp_patch.patch_model(tiny_model(KIND), weights=folder)


def test_a_fingerprint_is_of_the_weights_alone() -> None:
    def of(model: Any) -> str | None:
        return fingerprint(model, model.get_decoder())

    plain: Any = tiny_model(KIND)
    found = of(plain)
    assert found is not None
    assert of(copy.deepcopy(plain).to(torch.bfloat16).to(torch.float32)) == found
    assert of(changed(copy.deepcopy(plain))) != found
    assert of(atp_patch.patch_model(copy.deepcopy(plain), LAYERS, thresholds="learned")) == found
    assert of(copy.deepcopy(plain).to("meta")) is None


def test_lora_beside_an_adapter_leaves_the_fingerprint() -> None:
    from atp_patch.tools.parameter_groups import add_lora

    plain: Any = tiny_model(KIND)
    expected = fingerprint(plain, plain.get_decoder())
    model: Any = atp_patch.patch_model(tiny_model(KIND), LAYERS, thresholds="learned")
    add_lora(model, 2, 4.0)
    assert adapter(model).made_with.fingerprint == expected


def test_a_card_of_a_built_in_model_loads_it() -> None:
    for name, line in (("llava", "load_builtin()"), ("dynamic", 'load_builtin("dynamic")')):
        model, _ = load_builtin(name)
        text = adapter(atp_patch.patch_model(model)).card()
        assert f"model, processor = {line}\natp_patch.patch_model(model, weights=" in text
        assert "base_model" not in text.partition("\n# ")[0]


def test_a_card_has_nothing_left_to_fill_in() -> None:
    made = adapter(atp_patch.patch_model(tiny_model(KIND), LAYERS, "fastv", keep=0.5))
    for beside in (None, "lora", "model"):
        made.beside, made.place = beside, "ann/adapter"  # type: ignore[assignment]
        card = ModelCard(made.card())
        assert card.data.license == "unknown"
        assert card.data.pipeline_tag == "image-text-to-text"
        assert card.data.library_name == "atp_patch"
        assert not [w for w in ("FOLDER", "THIS_", "TODO", "[More", "PATH") if w in card.text]
        assert "## Limits" in card.text
        moved = at_place(card.content, "bob/other")
        assert "ann/adapter" not in moved
        assert moved.count("bob/other") == card.content.count("ann/adapter")


def test_cards_without_our_sections_are_changed_too() -> None:
    assert with_license("Text.\n", "mit") == "---\nlicense: mit\n---\n\nText.\n"
    assert with_license("---\ntags: []\n---\nT", "mit") == "---\nlicense: mit\ntags: []\n---\nT"
    assert with_results("# T\n", "98 %") == "# T\n\n## What it keeps\n\n98 %\n"
