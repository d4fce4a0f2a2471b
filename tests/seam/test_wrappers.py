"""One patch a model, found from every wrapper around it and from what is inside it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.utils import _apply_to_tensors
from torch.nn.parallel import DataParallel, DistributedDataParallel

import atp_patch
from atp_patch.patching.api import is_patched, require_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import hooks, snapshot
from tests.helpers.inputs import batch
from tests.helpers.pairing import in_turn
from tests.helpers.run import FASTV, forward, generate, kept_of, patched
from tests.helpers.voco import voco_model

LEARNED: dict[str, Any] = {
    "layers": [2, 4, 6],
    "method": "atp",
    "thresholds": "learned",
    "reference_grid": 6,
}
RANDOM: dict[str, Any] = {"method": "random", "layers": [1], "target_tokens": 20, "seed": 0}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_lora(model: Any, **options: Any) -> Any:
    """In a PEFT model; its LoRA adds zero, so that outputs are as before."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], **options}))


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "peft": with_lora,
    "peft all linear": lambda model: with_lora(model, target_modules="all-linear"),
    "tuner": lambda model: with_lora(model).base_model,
    "ddp": DistributedDataParallel,
    "dp": DataParallel,
    "compile": compiled,
    "peft in ddp": lambda model: DistributedDataParallel(with_lora(model)),
    "peft compiled": lambda model: compiled(with_lora(model)),
    "ddp of ddp": lambda model: DistributedDataParallel(DistributedDataParallel(model)),
}
INSIDES: dict[str, Callable[[Any], Any]] = {
    "base": lambda model: model.model,
    "decoder": lambda model: model.get_decoder(),
    "base in ddp": lambda model: DistributedDataParallel(model.model),
}
PATCHABLE = [name for name in WRAPPERS if "compile" not in name]
KINDS = ("llava-llama", "qwen2_vl")
families = pytest.mark.parametrize("kind", KINDS)


def with_kinds(names: Iterable[str]) -> Any:
    """Each of these names with one kind of model, in turn: no wrapper knows what it holds."""
    return pytest.mark.parametrize(("name", "kind"), in_turn(names, KINDS))


def used(kind: str) -> Any:
    """A tiny model that has run once, which adds hooks of upstream's."""
    model = tiny.tiny_model(kind)
    forward(model, batch(model, prompts.MIXED))
    return model


def around(name: str, model: Any) -> Any:
    """The wrapper, or the part, of that name."""
    return {**WRAPPERS, **INSIDES}[name](model)


# -- found ----------------------------------------------------------------------------------------


@with_kinds([*WRAPPERS, *INSIDES])
def test_the_patch_is_found(kind: str, name: str) -> None:
    plain, model = tiny.tiny_model(kind), patched(kind)
    inputs = batch(model, prompts.MIXED)
    other = around(name, model)
    assert is_patched(other)
    pruned = forward(model, inputs).logits
    assert atp_patch.last_trace(other) is atp_patch.last_trace(model)
    with atp_patch.disabled(other):
        assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
    assert torch.equal(forward(model, inputs).logits, pruned)
    assert atp_patch.unpatch_model(other) is other
    assert not is_patched(model)
    assert not is_patched(other)
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
    with pytest.raises(atp_patch.NotPatchedError):
        atp_patch.last_trace(other)


@pytest.mark.parametrize("name", ["peft", "ddp", "peft in ddp"])
@families
def test_passes_through_a_wrapper_are_pruned_and_traced(kind: str, name: str) -> None:
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    other = around(name, patched(kind))
    assert torch.equal(forward(other, inputs).logits, forward(model, inputs).logits)
    assert torch.equal(kept_of(other)[6], kept_of(model)[6])
    if name == "peft":
        assert torch.equal(generate(other, inputs), generate(model, inputs))


def test_what_is_not_patched_has_no_patch() -> None:
    model = patched("llava-llama")
    for part in (model.model.vision_tower, model.lm_head, nn.Linear(2, 2), None):
        assert not is_patched(part)


def test_two_patched_models_in_one_module_are_told_apart_by_the_caller() -> None:
    both = nn.ModuleList([patched("llava-llama"), patched("qwen2_vl")])
    with pytest.raises(atp_patch.ConfigError, match="holds 2 patched models"):
        atp_patch.last_trace(both)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_wrapper_is_found_by_itself(way: str) -> None:
    pm = with_lora(patched("qwen2_vl"))
    twin = copy.deepcopy(pm) if way == "deepcopy" else pickle.loads(pickle.dumps(pm))
    inputs = batch(pm.get_base_model(), prompts.MIXED)
    expected = forward(pm, inputs).logits
    atp_patch.unpatch_model(pm)
    assert torch.equal(forward(twin, inputs).logits, expected)
    assert require_patch(twin).parts.model is twin.get_base_model()
    atp_patch.unpatch_model(twin)


# -- patched through ------------------------------------------------------------------------------


@with_kinds(PATCHABLE)
def test_patching_a_wrapper_patches_the_model_inside(kind: str, name: str) -> None:
    model = used(kind)
    other = around(name, model)
    before = snapshot(model)
    assert atp_patch.patch_model(other, **FASTV) is other
    inputs = batch(model, prompts.MIXED)
    expected = forward(patched(kind), inputs).logits
    assert torch.equal(forward(model, inputs).logits, expected)
    assert atp_patch.unpatch_model(model) is model
    after = snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part


@with_kinds([*PATCHABLE, *INSIDES])
def test_patching_again_from_elsewhere_replaces(kind: str, name: str) -> None:
    model = patched(kind)
    other = around(name, model)
    assert atp_patch.patch_model(other, **RANDOM) is other
    inputs = batch(model, prompts.MIXED)
    once = patched(kind, **RANDOM)
    expected = forward(once, inputs).logits
    assert torch.equal(forward(model, inputs).logits, expected)
    assert atp_patch.last_trace(other).average_tokens == atp_patch.last_trace(once).average_tokens
    assert list(atp_patch.last_trace(model).layers) == [1]
    assert require_patch(other).config.target_tokens == 20
    assert atp_patch.last_trace(other).average_tokens == pytest.approx(20, abs=1)
    atp_patch.unpatch_model(other)
    assert not is_patched(model)


@families
def test_a_patch_of_the_base_model_gives_way_to_one_of_the_whole(kind: str) -> None:
    model = used(kind)
    counts = {at: sum(map(len, kinds.values())) for at, kinds in hooks(model).items()}
    atp_patch.patch_model(model.model, **FASTV)
    atp_patch.patch_model(model, **FASTV)
    assert require_patch(model.model).parts.model is model
    inputs = batch(model, prompts.MIXED)
    assert torch.equal(forward(model, inputs).logits, forward(patched(kind), inputs).logits)
    atp_patch.unpatch_model(model)
    assert counts == {at: sum(map(len, kinds.values())) for at, kinds in hooks(model).items()}


@pytest.mark.parametrize("first", ["patch", "wrap"])
def test_a_merged_model_is_still_found(first: str) -> None:
    model = tiny.tiny_model("llava-llama")
    if first == "patch":
        pm = with_lora(atp_patch.patch_model(model, **LEARNED))
    else:
        pm = atp_patch.patch_model(with_lora(model), **LEARNED)
    merged = pm.merge_and_unload()
    inputs = batch(merged, prompts.MIXED)
    pruned = forward(merged, inputs).logits
    assert atp_patch.last_trace(merged).average_tokens > 0
    atp_patch.unpatch_model(merged)
    plain = forward(tiny.tiny_model("llava-llama"), inputs).logits
    assert torch.equal(forward(merged, inputs).logits, plain)
    assert not torch.equal(pruned, plain)
    assert not hasattr(merged, "atp_patch_heads")


@pytest.mark.parametrize("name", ["compile", "peft compiled"])
def test_what_is_compiled_is_not_patched(name: str) -> None:
    model = tiny.tiny_model("llava-llama")
    other = around(name, model)
    before = snapshot(model)
    with pytest.raises(atp_patch.ConfigError, match="patch the model first, then compile it"):
        atp_patch.patch_model(other, **FASTV)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["ddp", "dp", "peft in ddp"])
def test_what_learns_is_patched_before_it_is_made_parallel(name: str) -> None:
    """The gradients of parameters that come later are averaged over no processes."""
    model = tiny.tiny_model("llava-llama")
    other = around(name, model)
    before = snapshot(model)
    with pytest.raises(atp_patch.ConfigError, match="patch the model first, then wrap it"):
        atp_patch.patch_model(other, **LEARNED)
    assert snapshot(model) == before


# -- fully sharded --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_fully_sharded_models_are_found_and_patched(version: int) -> None:
    """FSDP 1 wraps, FSDP 2 changes the model's class."""
    plain = tiny.tiny_model("llava-llama")
    inputs = batch(plain, prompts.MIXED)

    def sharded(model: Any) -> Any:
        if version == 2:
            return fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))

    model = patched("llava-llama")
    expected = forward(model, inputs).logits
    before = sharded(model)
    assert torch.equal(forward(before, inputs).logits, expected)
    assert atp_patch.last_trace(before).average_tokens > 0
    with atp_patch.disabled(before):
        full = forward(before, inputs).logits
    assert torch.equal(full, forward(plain, inputs).logits)
    after = sharded(tiny.tiny_model("llava-llama"))
    with pytest.raises(atp_patch.ConfigError, match="patch the model first"):
        atp_patch.patch_model(after, **LEARNED)
    assert atp_patch.patch_model(after, **FASTV) is after
    assert torch.equal(forward(after, inputs).logits, expected)
    atp_patch.unpatch_model(after)
    assert torch.equal(forward(after, inputs).logits, full)


# -- the rest of the package through wrappers -----------------------------------------------------

SAVED_FROM = [
    "peft",
    "peft all linear",
    "ddp",
    "compile",
    "peft in ddp",
    "peft compiled",
    "base",
    "decoder",
]


def learned() -> Any:
    torch.manual_seed(3)
    model = atp_patch.patch_model(tiny.tiny_model("llava-llama"), **LEARNED)
    for parameter in model.atp_patch_heads.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return model


@pytest.mark.parametrize("name", SAVED_FROM)
@pytest.mark.parametrize("given", [False, True])
def test_adapters_have_the_same_tensors_from_a_wrapper(
    name: str, given: bool, tmp_path: Path
) -> None:
    model = learned()
    atp_patch.save_pretrained(model, tmp_path / "model")
    other = around(name, model)
    state = (model if name in INSIDES else other).state_dict() if given else None
    atp_patch.save_pretrained(other, tmp_path / "other", state_dict=state)
    one, two = (load_file(tmp_path / at / "atp_model.safetensors") for at in ("model", "other"))
    assert one
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.equal(two[key], tensor)
    both = [(tmp_path / at / "atp_config.json").read_text() for at in ("model", "other")]
    assert both[0] == both[1]


@pytest.mark.parametrize("name", ["peft", "ddp", "peft in ddp"])
def test_the_thresholds_have_their_own_group(name: str) -> None:
    model = learned()
    other = around(name, model)
    heads = list(model.atp_patch_heads.parameters())
    model.atp_patch_heads.requires_grad_(True)
    groups = atp_patch.parameter_groups(other, lr=1e-5, atp_lr=1e-3, atp_bias_lr=1e-2)
    found = {group["name"]: group for group in groups}
    own = [*found["atp"]["params"], *found["atp_bias"]["params"]]
    assert {id(p) for p in own} == {id(p) for p in heads}
    assert found["model"]["params"]
    learning = [p for p in other.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(learning)


@pytest.mark.parametrize("name", ["peft", "ddp"])
def test_thresholds_are_calibrated_and_controlled_through_a_wrapper(name: str) -> None:
    data = [
        batch(learned(), [prompts.prompt(prompts.Words(3), prompts.Image(6, 6), prompts.Words(n))])
        for n in (4, 7)
    ]
    found = []
    for model in (learned(), around(name, learned())):
        done = atp_patch.calibrate(model, data, target_tokens=14)
        control = atp_patch.threshold_control(model, data, "mean")
        with atp_patch.controlled(model, control):
            forward(model, data[0])
        found.append((done, atp_patch.last_trace(model).average_tokens))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["peft", "ddp", "compile"])
def test_images_are_compressed_through_a_wrapper(name: str) -> None:
    model = voco_model("llava-llama")
    inputs = batch(model, prompts.SINGLE)
    expected = atp_patch.compress(model, inputs)
    found = atp_patch.compress(around(name, voco_model("llava-llama")), inputs)
    for one, two in zip(expected.held.keys, found.held.keys, strict=True):
        assert torch.equal(one, two)


def test_layers_whose_arguments_are_made_anew_share_one_pass() -> None:
    """FSDP rebuilds the lists, dicts and dataclasses among the arguments of each module."""
    model, other = patched("llava-llama"), patched("llava-llama")
    inputs = batch(model, prompts.MIXED)
    expected = forward(model, inputs).logits

    def rebuilt(_: Any, args: Any, kwargs: Any) -> Any:
        return _apply_to_tensors(lambda tensor: tensor, (args, kwargs))

    for layer in tiny.decoder_layers(other):
        layer.register_forward_pre_hook(rebuilt, with_kwargs=True, prepend=True)
    assert torch.equal(forward(other, inputs).logits, expected)
