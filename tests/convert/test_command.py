"""The command says in one line what is wrong and what to do, and leaves no half-written folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import atp_patch
from atp_patch.commands.cli import main as atp_patch_command
from atp_patch.convert.__main__ import main
from atp_patch.convert.llava import llava_plan
from atp_patch.convert.write import write as write_plan
from atp_patch.tools.loading import load_checkpoint
from tests.convert.checkpoints import Original, save_json, save_tokenizer, write

Make = Callable[[Path, Original], object]


def changed(**more: Any) -> Make:
    """Entries of config.json that are otherwise."""
    return lambda folder, original: save_json(folder / "config.json", original.config(**more))


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    """Tensors that are otherwise."""

    def make(folder: Path, original: Original) -> None:
        tensors = original.flat()
        change(tensors)
        write(folder, tensors)

    return make


def file(name: str, text: str | None) -> Make:
    """A file that is otherwise, or not there."""

    def make(folder: Path, _: Original) -> None:
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text)

    return make


def pickled(folder: Path, _: Original) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"code": Original}, folder / "pytorch_model.bin")


def listed(folder: Path, _: Original) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")


def half_there(folder: Path, original: Original) -> None:
    (folder / "model.safetensors").unlink()
    write(folder, original.flat(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def lora(folder: Path, _: Original) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def siglip(folder: Path, _: Original) -> None:
    save_json(folder / "vision" / "config.json", {"model_type": "siglip_vision_model"})


def towerless(folder: Path, original: Original) -> None:
    write(folder, original.flat(tower=False))
    (folder / "vision" / "config.json").unlink()
    (folder / "vision").rmdir()


LAYER = "model.layers.3.mlp.up_proj.weight"
WRONG: dict[str, tuple[Make, str]] = {
    "no config": (file("config.json", None), r"config\.json is missing; give the folder"),
    "broken config": (file("config.json", "{"), r"config\.json cannot be read"),
    "deep config": (file("config.json", "[" * 100_000), r"config\.json cannot be read .*deeply"),
    "long number": (
        file("config.json", '{"hidden_size": ' + "9" * 5_000 + "}"),
        r"config\.json cannot be read .*digits",
    ),
    "no heads": (changed(num_attention_heads=0), "config.json in .* cannot be used|no model that"),
    "heads that do not fit": (changed(num_attention_heads=5), "config.json"),
    "list for config": (file("config.json", "[]"), "no JSON object"),
    "architecture": (changed(architectures=["GPT2"]), "GPT2; LlavaLlamaForCausalLM"),
    "no architecture": (changed(architectures=None), "architecture None"),
    "anyres": (changed(image_aspect_ratio="anyres"), "this is LLaVA-NeXT; load its -hf"),
    "s2": (changed(s2=True), "several scales"),
    "projector": (changed(mm_projector_type="mlp_downsample"), "objects of their own package"),
    "features": (changed(mm_vision_select_feature="mean"), "'mean' is not one of patch, cls_patch"),
    "config's type": (changed(hidden_size="wide"), "config.json in .* cannot be used"),
    "config's sizes": (changed(intermediate_size=97), "another shape.*96.*97.*belongs to"),
    "layers": (changed(num_hidden_layers=9), "9 tensors are missing.*layers.8.*not whole"),
    "missing": (rewritten(lambda t: t.pop(LAYER)), "1 tensors are missing.*layers.3.mlp.up_proj"),
    "unexpected": (
        rewritten(lambda t: t.update(extra=torch.ones(1))),
        "1 unexpected tensors: extra. The checkpoint is of another layout",
    ),
    "beyond": (
        rewritten(lambda t: t.update({"model.layers.8.mlp.up_proj.weight": t[LAYER]})),
        "1 have no place .*layers.8.mlp.up_proj",
    ),
    "twice": (
        rewritten(lambda t: t.update({LAYER.replace("model", "llm.model", 1): t[LAYER]})),
        "written twice",
    ),
    "no weights": (file("model.safetensors", None), "holds no weights; put model.safetensors"),
    "broken weights": (file("model.safetensors", "x"), "cannot be read .*download it anew"),
    "code in weights": (pickled, "more than tensors, and code from a file is not run"),
    "no table": (listed, "no table of tensors"),
    "shard": (half_there, "names model-00002-of-00003.safetensors, missing there"),
    "lora": (lora, "LoRA adapter; merge it"),
    "siglip": (siglip, "'siglip_vision_model', not CLIP"),
    "towerless": (towerless, r"clip-vit-large-patch14-336\) is not in the .*--vision-tower DIR"),
    "tokenizer": (file("tokenizer.json", "{"), "tokenizer in .* cannot be read"),
    "generation": (
        file("generation_config.json", "[" * 100_000),
        r"generation_config\.json in .* cannot be read .*mend or remove it",
    ),
    "deep tokenizer": (file("tokenizer.json", "[" * 100_000), "tokenizer in .* cannot be read"),
}


def prepared(folder: Path) -> tuple[Path, Original]:
    """A folder that can be converted as it is."""
    old, original = folder / "old", Original()
    write(old, original.flat())
    save_json(old / "config.json", original.config())
    save_json(old / "vision" / "config.json", original.vision.to_dict())
    return old, original


def run(folder: Path, out: Path) -> int:
    tower = ["--vision-tower", str(folder / "vision")] if (folder / "vision").is_dir() else []
    return main(["llava", str(folder), str(out), *tower])


def check_refused(err: str, match: str) -> None:
    assert err.startswith("python -m atp_patch.convert: ")
    assert err.count("\n") == 1
    assert re.search(match, err), err


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_the_mend(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, original = prepared(tmp_path)
    make, match = WRONG[name]
    make(old, original)
    assert run(old, tmp_path / "new") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    check_refused(captured.err, match)
    assert [path.name for path in tmp_path.iterdir()] == ["old"], "something was written"


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_names_that_are_no_text_are_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in (["llava", text, "out"], ["llava", str(tmp_path), text]):
        assert main(given) == 2
        check_refused(capsys.readouterr().err, "an argument holds .*no text")


def test_a_tower_of_unknown_make_needs_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, original = prepared(tmp_path)
    save_json(old / "config.json", original.config(mm_vision_tower="my/tower"))
    assert main(["llava", str(old), str(tmp_path / "new")]) == 2
    check_refused(capsys.readouterr().err, "my/tower is not known; give a folder")


def test_what_is_there_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, _ = prepared(tmp_path)
    out = tmp_path / "new"
    out.mkdir()
    assert run(old, out) == 0  # an empty folder will do
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert run(old, out) == 2
    check_refused(capsys.readouterr().err, "is there already; give a folder that is new")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, _ = prepared(tmp_path)
    (tmp_path / "file").write_text("")
    assert run(old, tmp_path / "file" / "new") == 2
    check_refused(capsys.readouterr().err, "cannot be written")


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    old, _ = prepared(tmp_path)
    plan = llava_plan(old, old / "vision")

    def full(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()
        raise OSError("no space left")

    plan.save_more = full
    with pytest.raises(atp_patch.ConfigError, match=r"cannot be written \(no space left\)"):
        write_plan(plan, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_is_yet_to_be_added_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, original = prepared(tmp_path)
    settings = {"temperature": 0.9, "bos_token_id": 1, "eos_token_id": 2}
    save_json(old / "generation_config.json", settings)
    save_json(old / "config.json", original.config(mm_use_im_start_end=True))
    assert run(old, tmp_path / "new") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'new'}: LlavaForConditionalGeneration, 0.00 GiB")
    assert "there is no tokenizer" in captured.err
    assert "<image> as special token 120" in captured.err
    assert "<im_start> before <image>" in captured.err
    assert "generation_config.json contradicts itself" in captured.err
    made = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert (made["eos_token_id"], made["suppress_tokens"]) == (2, [120])
    assert "temperature" not in made


def test_generation_settings_that_hold_are_taken_over(tmp_path: Path) -> None:
    old, _ = prepared(tmp_path)
    save_tokenizer(old)
    save_json(old / "generation_config.json", {"do_sample": True, "temperature": 0.7})
    assert run(old, tmp_path / "new") == 0
    made = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert (made["do_sample"], made["temperature"]) == (True, 0.7)


def test_the_demo_names_the_command_that_converts(tmp_path: Path) -> None:
    old, _ = prepared(tmp_path)
    with pytest.raises(atp_patch.UnsupportedModelError, match=r"atp_patch\.convert llava"):
        load_checkpoint(str(old), torch.device("cpu"), torch.float32, lambda model: None)


def test_a_tower_is_no_matter_of_internvl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, _ = prepared(tmp_path)
    assert main(["internvl", str(old), str(tmp_path / "new"), "--vision-tower", str(old)]) == 2
    check_refused(capsys.readouterr().err, "brings its own")


def test_help_and_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("llava", "vila", "internvl", "--vision-tower", "OUT"))
    assert main(["minigpt", "a", "b"]) == 2
    assert main([]) == 2
    assert atp_patch_command(["convert", "--help"]) == 0


@pytest.mark.slow
def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "atp_patch.convert", "llava", "no-such-folder", "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    check_refused(done.stderr, r"no-such-folder/config\.json is missing")
