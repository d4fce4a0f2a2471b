"""LoRA beside an adapter: merged while measured, gone afterwards, part of what identifies a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import atp_patch
from atp_patch.builtin import load_builtin, make_scene, prompt
from atp_patch.contract.errors import ConfigError, WeightsError
from atp_patch.evaluation.identity import model_hash
from atp_patch.evaluation.runner import Bench
from atp_patch.evaluation.settings import Setting, applied, plan
from atp_patch.patching.api import is_patched
from atp_patch.tools.parameter_groups import add_lora
from atp_patch.tools.trained import (
    LORA_FILES,
    changes_features,
    find_trained,
    load_trained,
    merged,
    shipped,
)
from tests.evaluation.conftest import TOKENS, build

pytest.importorskip("peft")
ADAPTERS = Path(__file__).parents[2] / "results" / "adapters"
MORE = sorted(str(folder) for folder in ADAPTERS.iterdir() if folder.is_dir())


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What training leaves: an adapter and a LoRA that changes something."""
    model = atp_patch.patch_model(build()[0], [2], "fixed", keep=0.5)
    add_lora(model, rank=2, alpha=6.0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    atp_patch.save_pretrained(model, tmp_path / "adapter")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, tmp_path / "logits.pt")
    atp_patch.unpatch_model(model)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path


def settings(*specs: str) -> list[Setting]:
    planned = plan([], [0.5], 1, {}, [2], specs)
    return [s for s in planned if s.adapter is not None]


def test_merged_is_what_peft_computes_and_nothing_is_left(bench: Bench, trained: Path) -> None:
    before = model_hash(bench.model)
    (setting,) = settings(str(trained))
    with applied(bench.model, setting, TOKENS), torch.no_grad():
        found = bench.model(input_ids=torch.arange(3, 12)[None]).logits
    expected = torch.load(trained / "logits.pt")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        plain = bench.model(input_ids=torch.arange(3, 12)[None]).logits
    assert (plain - expected).abs().max() > 1e-3
    assert model_hash(bench.model) == before


def test_what_a_training_left_is_loaded_for_good(trained: Path) -> None:
    model, _ = build()
    ids = torch.arange(3, 12)[None]
    assert load_trained(model, str(trained)) is model
    assert is_patched(model)
    expected = torch.load(trained / "logits.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        atp_patch.unpatch_model(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_second_lora_is_not_added_to_the_first(trained: Path) -> None:
    model, _ = build()
    load_trained(model, str(trained))
    before = model_hash(model)
    with pytest.raises(WeightsError, match="already; load the model anew"):
        load_trained(model, str(trained))
    assert model_hash(model) == before


def test_a_training_written_again_is_read_again(trained: Path) -> None:
    model, _ = build()
    with merged(model, str(trained / "lora")):
        first = model_hash(model)
    file = trained / "lora" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with merged(model, str(trained / "lora")):
        assert model_hash(model) != first


def test_weights_that_are_not_in_memory_are_refused(trained: Path) -> None:
    model, _ = build()
    with pytest.raises(WeightsError, match="without offloading"):
        load_trained(model.to("meta"), str(trained))


def test_a_training_of_the_whole_model_names_it(trained: Path) -> None:
    (trained / "model").mkdir()
    with pytest.raises(WeightsError, match=r"the model learned too: load .*model"):
        find_trained(str(trained))


def test_a_lora_outside_the_decoder_changes_the_features(trained: Path) -> None:
    model, _ = build()
    folder = str(trained / "lora")
    assert not changes_features(model, folder)
    file = trained / "lora" / "adapter_model.safetensors"
    stored = load_file(file)
    name = "base_model.model.model.multi_modal_projector.linear_1.lora_{}.weight"
    rows, columns = model.model.multi_modal_projector.linear_1.weight.shape
    rank = next(iter(t for n, t in stored.items() if "lora_A" in n)).shape[0]
    made = {"A": torch.ones(rank, columns), "B": torch.ones(rows, rank)}
    save_file(stored | {name.format(part): tensor for part, tensor in made.items()}, file)
    assert changes_features(model, folder)


def test_a_model_that_it_was_not_made_for_stays_as_it_is(trained: Path) -> None:
    model, _ = build()
    model.get_decoder().layers[7].mlp.down_proj = torch.nn.Linear(2, 3)
    before = model_hash(model)
    with pytest.raises(WeightsError, match="made for another model"):
        load_trained(model, str(trained))
    assert not is_patched(model)
    assert model_hash(model) == before


def test_where_a_training_is_found(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_trained(str(trained))
    assert (found.adapter, found.lora) == (str(trained / "adapter"), str(trained / "lora"))
    assert find_trained(str(trained / "adapter")) == found  # which is useless without its LoRA
    name = shipped()[0]
    assert Path(find_trained(name).adapter).is_dir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # the user's own folder goes before
    assert find_trained(name).adapter == name


def test_what_ships() -> None:
    """What README's commands use; results/adapters has the others."""
    assert shipped() == ("atp25", "voco8")
    assert not set(shipped()) & {Path(source).name for source in MORE}


@pytest.mark.parametrize("name", [*shipped(), *MORE], ids=lambda name: Path(name).name)
def test_the_package_s_own_adapters_fit_the_built_in_model(name: str) -> None:
    model, processor = load_builtin()
    load_trained(model, name)
    scene = make_scene("development", 0)
    inputs = processor(
        images=scene.image, text=prompt(scene.questions[0].text), return_tensors="pt"
    )
    with torch.no_grad():
        model(**inputs)
    kept = atp_patch.last_trace(model).tokens_per_layer[0]
    assert 0 < kept[-1] < kept[0] or kept[0] < 576
    found = find_trained(name)
    card = (Path(found.adapter) / "README.md").read_text(encoding="utf-8")
    assert "`llava` model with 32 decoder layers" in card
    files = [f for part in (found.adapter, found.lora) if part for f in Path(part).iterdir()]
    assert sum(file.stat().st_size for file in files) < 2.5e6


def test_all_that_ship_need_not_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = settings(*shipped())
    assert len(named) == len(shipped())
    assert settings("shipped") == named
    monkeypatch.chdir(tmp_path)
    shutil.copytree(find_trained(shipped()[0]).adapter, tmp_path / "shipped" / "adapter")
    (own,) = settings("shipped")  # the user's own folder goes before
    assert own.adapter == "shipped"


def test_recipes_in_a_folder_need_not_be_named(
    trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("recipes")
    for recipe in ("one", "two"):
        for seed in range(2):
            shutil.copytree(trained, folder / recipe / str(seed))
    (folder / "log").write_text("", encoding="utf-8")
    found = settings(str(folder))
    assert found == settings(*(str(folder / recipe) for recipe in ("one", "two")))
    names = ["adapter one", "adapter one", "adapter two", "adapter two"]
    assert [setting.name for setting in found] == names
    assert len({setting.pooled for setting in found}) == 2


def test_controls_of_all_in_a_folder(
    trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(trained, folder / "one" / "0")
    (found,) = settings(f"{folder}~mean")
    assert (found.name, found.control) == ("adapter one~mean", "mean")
    assert len(settings("shipped~mean")) == len(shipped())
    shutil.copytree(trained, folder / "alone")
    with pytest.raises(ConfigError, match="name each"):
        settings(str(folder))


def test_lora_of_the_head_is_added_too(trained: Path) -> None:
    model, _ = build()
    folder = trained / "lora"
    file, weight = folder / "adapter_model.safetensors", model.lm_head.weight.detach().clone()
    rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    made = {"A": torch.ones(rank, weight.shape[1]), "B": torch.ones(weight.shape[0], rank)}
    name = "base_model.model.lm_head"
    added = {f"{name}.lora_{part}.weight": tensor for part, tensor in made.items()}
    stored = load_file(file) | added
    save_file(stored | {f"{name}.base_layer.weight": weight}, file)  # as PEFT does
    with merged(model, str(folder)):
        assert not torch.equal(model.lm_head.weight, weight)
    assert torch.equal(model.lm_head.weight, weight)
    save_file(stored | {f"{name}.base_layer.weight": weight + 1}, file)
    with pytest.raises(WeightsError, match="lm_head is not as it was"), merged(model, str(folder)):
        pass


def test_a_setting_says_its_adapter_as_it_was_given(trained: Path) -> None:
    for source in (str(trained), str(trained / "adapter"), shipped()[0]):
        (setting,) = settings(source)
        assert setting.adapter == source


def test_lora_is_part_of_the_identity(trained: Path) -> None:
    (with_lora,) = settings(str(trained))
    alone_folder = shutil.copytree(trained / "adapter", trained / "alone")
    (alone,) = settings(str(alone_folder))
    assert with_lora.lora is not None
    assert alone.lora is None
    assert with_lora.identity() != alone.identity()
    assert not any(str(trained) in str(v) for v in with_lora.identity().values())


def test_what_cannot_be_merged_is_named(bench: Bench, trained: Path) -> None:
    before = model_hash(bench.model)
    with pytest.raises(WeightsError, match="holds no LoRA"), merged(bench.model, str(trained)):
        pass
    layer = bench.model.get_decoder().layers[7].mlp
    layer.down_proj, kept = torch.nn.Linear(2, 3), layer.down_proj
    with (
        pytest.raises(WeightsError, match="made for another model"),
        merged(bench.model, str(trained / "lora")),
    ):
        pass
    layer.down_proj = kept
    assert model_hash(bench.model) == before
    (trained / "model").mkdir()
    with pytest.raises(WeightsError, match="the model learned too"):
        settings(str(trained))


def damaged(trained: Path, fault: str) -> None:
    """Break the configuration or the tensors of a LoRA."""
    config, weights = (trained / "lora" / name for name in LORA_FILES)
    if fault in CONFIGS:
        config.write_bytes(CONFIGS[fault])
        return
    if fault == "cut off":
        weights.write_bytes(weights.read_bytes()[:-9])
        return
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    if fault == "half":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][:1].contiguous()
    elif fault == "nan":
        tensors[name][0, 0] = float("nan")
    else:
        tensors[name] = tensors[name].to(getattr(torch, fault))
    save_file(tensors, weights)


CONFIGS = {
    "text": b"\xff\xfe{}",
    "brackets": b"[" * 200_000,
    "list": b"[]",
    "empty": b"{}",
    "rank": b'{"peft_type": "LORA", "r": 0, "lora_alpha": 6}',
    "rank nan": b'{"peft_type": "LORA", "r": NaN, "lora_alpha": 6}',
    "rank text": b'{"peft_type": "LORA", "r": "2", "lora_alpha": 6}',
    "alpha": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}',
    "root": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_rslora": "no"}',
}


@pytest.mark.parametrize(
    "fault", [*CONFIGS, "cut off", "half", "shape", "nan", "int8", "bool", "complex64"]
)
def test_a_damaged_lora_is_refused_and_the_model_stays(trained: Path, fault: str) -> None:
    model, _ = build()
    before = model_hash(model)
    damaged(trained, fault)
    with pytest.raises(WeightsError, match=r"lora/adapter_(config|model)\."):
        load_trained(model, str(trained))
    assert model_hash(model) == before
    assert not is_patched(model)


@pytest.mark.parametrize(
    "name",
    [
        "model.multi_modal_projector.linear_1.weight",  # modules_to_save
        "model.language_model.layers.0.self_attn.q_proj.lora_B.bias",
        "model.language_model.embed_tokens.lora_embedding_B",
    ],
)
def test_what_is_more_than_lora_is_not_left_out(trained: Path, name: str) -> None:
    model, _ = build()
    before = model_hash(model)
    file = trained / "lora" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}": torch.ones(2, 2)}, file)
    with pytest.raises(WeightsError, match=r"more than LoRA .*load it with PEFT"):
        load_trained(model, str(trained))
    assert model_hash(model) == before
