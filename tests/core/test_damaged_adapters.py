"""Arguments and JSON keep one schema; whatever was done to an adapter's files, it is refused by
name or is what its files say, and the model is as before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import atp_patch
from atp_patch.methods import ATP, FastV, PruMerge, SparseVLM, VoCo
from atp_patch.patching.api import is_patched, require_patch
from tests.helpers import inputs as made
from tests.helpers.compare import snapshot
from tests.helpers.run import forward
from tests.helpers.tiny import tiny_model

CONFIG, WEIGHTS = "atp_config.json", "atp_model.safetensors"
LAYERS = [2, 4, 6]
KIND = "llava-llama"
NAN, INF = float("nan"), float("inf")
LEARNED: dict[str, Any] = {
    "layers": LAYERS,
    "thresholds": "learned",
    "reference_grid": 6,
    "slope_end": 60.0,
    "anneal_passes": 10,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "learned": LEARNED,
    "voco": {"method": "voco", "num_tokens": 2},
    "fastv": {"layers": LAYERS, "method": "fastv", "keep": 0.5},
    "pair": {"layers": LAYERS, "method": ["prumerge", "uniform"], "target_tokens": 14},
}


def written(kind: str, folder: Path) -> Path:
    """The folder of a good adapter."""
    torch.manual_seed(3)
    atp_patch.save_pretrained(atp_patch.patch_model(tiny_model(KIND), **ADAPTERS[kind]), folder)
    return folder


def refused(folder: Path, file: str) -> str:
    """What is said of an adapter that is refused; the model is as it was."""
    model = tiny_model(KIND)
    before = snapshot(model)
    with pytest.raises(atp_patch.WeightsError) as refusal:
        atp_patch.patch_model(model, weights=folder)
    assert file in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    assert snapshot(model) == before
    return str(refusal.value)


# Wrong values, as an argument of patch_model and at the same name in an adapter's JSON.
ARGUMENTS = [
    ("rope_2d", "no"),
    ("rope_2d", 1),
    ("prune_marks", "yes"),
    ("prune_marks", 0),
    ("min_tokens", 1.5),
    ("min_tokens", NAN),
    ("min_tokens", True),
    ("min_tokens", 1e30),
    ("min_tokens", 10**30),
    ("min_tokens_per_image", 2**31),
    ("min_tokens_per_image", -1),
    ("keep", [0.5, NAN, 0.5]),
    ("keep", [0.5, True, 0.5]),
    ("keep", "111"),
    ("target_tokens", INF),
    ("target_tokens", 1e30),
    ("target_tokens", True),
    ("target_tokens", "20"),
    ("layers", [2.0, 4, 6]),
    ("layers", [True, 4, 6]),
    ("layers", "246"),
    ("layers", 2),
    ("layers", [2, 10**30]),
]
OPTIONS = [
    ("slope", INF),
    ("slope", 1e30),
    ("slope", "30"),
    ("lambda_sample", NAN),
    ("lambda_target", True),
    ("standardise", 1),
    ("standardise", "no"),
    ("score", None),
    ("score", 1),
    ("heads_hidden_size", 10**9),
    ("heads_hidden_size", 1e30),
    ("reference_grid", 10**9),
    ("reference_grid", 6.0),
    ("anneal_passes", 10**30),
]


@pytest.mark.parametrize(("name", "value"), ARGUMENTS + OPTIONS)
def test_a_wrong_value_is_refused_as_an_argument_and_in_json(
    name: str, value: Any, tmp_path: Path
) -> None:
    model = tiny_model(KIND)
    before = snapshot(model)
    with pytest.raises(atp_patch.ConfigError, match=name.split("_")[0]):
        atp_patch.patch_model(model, **{**LEARNED, name: value})
    assert snapshot(model) == before
    file = written("learned", tmp_path) / CONFIG
    data = json.loads(file.read_text())
    place = data if name in data else data["options"]
    assert name in place
    place[name] = value
    file.write_text(json.dumps(data))
    said = refused(tmp_path, CONFIG)
    assert name.split("_")[0] in said or "no number of JSON" in said


@pytest.mark.parametrize(
    "make",
    [
        partial(ATP, slope="steep"),
        partial(ATP, spatial_share=NAN),
        partial(FastV, per_frame=1),
        partial(SparseVLM, neighbours=2.5),
        partial(PruMerge, neighbours="all"),
        partial(VoCo, num_tokens=10**9),
        partial(VoCo, num_tokens=True),
    ],
    ids=str,
)
def test_a_methods_own_fields_keep_the_same_schema(make: Callable[[], object]) -> None:
    with pytest.raises(atp_patch.ConfigError):
        make()


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"version": ' + b"1" * 5_000 + b"}",
        b'{"version": true}',
        b'{"version": 1}',
        b'{"version": 1, "surprise": "' + b"x" * 5_000 + b'"}',
        b" " * 2**20 + b"{}",
        b"",
        b"\x00",
        b'{"version": 1, "layers": NaN}',
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_configuration_is_refused(text: bytes, tmp_path: Path) -> None:
    (written("fastv", tmp_path) / CONFIG).write_bytes(text)
    refused(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"family": "llava", "num_layers": NAN, "hidden_size": 64}},
        {"base": {"family": "llava", "num_layers": 8.0, "hidden_size": 64}},
        {"base": {"family": "llava", "num_layers": 8, "hidden_size": 64, "more": 1}},
        {"base": None},
        {"base": ["llava", 8, 64]},
        {"before": {"method": "voco", "options": None}},
        {"before": {"method": "voco", "options": {"num_tokens": 10**9}}},
        {"before": {"method": "voco"}},
        {"before": {"method": "uniform", "options": {}}},
        {"method": "prumerge", "before": None, "options": {}},
        {"method": "\ud800"},
        {"method": "x" * 5000},
        {"options": None},
        {"options": {"rope": "before", "x" * 5000: 1}},
        {"method": None},
        {"keep": [1e-400, 0.5, 0.5, 0.5]},
        {"layers": list(range(1, 100_000))},
    ],
    ids=lambda change: repr(change)[:40],
)
def test_a_configuration_that_nothing_could_write_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    file = written("fastv", tmp_path) / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused(tmp_path, CONFIG)


@pytest.mark.parametrize("change", [{"keep": [0.5]}, {"min_tokens": 2}, {"rope_2d": True}])
def test_an_adapter_of_voco_has_no_budget_beside_it(change: dict[str, Any], tmp_path: Path) -> None:
    file = written("voco", tmp_path) / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert "cannot be given to voco" in refused(tmp_path, CONFIG)


def wrong_tensor(tensor: torch.Tensor, fault: str) -> torch.Tensor:
    """A tensor of the same shape that is no learned weight."""
    if fault in ("nan", "inf", "-inf", "1e30"):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = float(fault)
        return tensor
    return tensor.to(getattr(torch, fault))


@pytest.mark.parametrize("kind", ["learned", "voco"])
@pytest.mark.parametrize(
    "fault",
    ["nan", "inf", "-inf", "1e30", "bool", "int8", "uint8", "int64", "complex64", "float8_e4m3fn"],
)
def test_weights_that_nothing_learned_are_refused(kind: str, fault: str, tmp_path: Path) -> None:
    file = written(kind, tmp_path) / WEIGHTS
    tensors = load_file(file)
    name = next(name for name in tensors if tensors[name].is_floating_point())
    save_file({**tensors, name: wrong_tensor(tensors[name], fault)}, file)
    assert name in refused(tmp_path, WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_the_count_of_passes_is_an_int64(dtype: torch.dtype, tmp_path: Path) -> None:
    file = written("learned", tmp_path) / WEIGHTS
    tensors = load_file(file)
    assert tensors["passes"].dtype == torch.int64
    save_file({**tensors, "passes": tensors["passes"].to(dtype)}, file)
    assert "passes" in refused(tmp_path, WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["learned", "voco"])
def test_weights_of_any_usual_precision_are_read(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    file = written(kind, tmp_path) / WEIGHTS
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    model: Any = atp_patch.patch_model(tiny_model(KIND), weights=tmp_path)
    for name, tensor in model.atp_patch_heads.state_dict().items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype))
        assert tensor.dtype in (torch.float32, torch.int64)


def test_float64_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    file = written("voco", tmp_path) / WEIGHTS
    save_file({"embedding": torch.full((2, 64), 1e300, dtype=torch.float64)}, file)
    assert "infinite" in refused(tmp_path, WEIGHTS)


def test_weights_beside_a_configuration_that_learned_nothing_are_refused(tmp_path: Path) -> None:
    save_file({"embedding": torch.zeros(2, 64)}, written("fastv", tmp_path) / WEIGHTS)
    assert "nothing was learned" in refused(tmp_path, WEIGHTS)


@pytest.mark.parametrize(
    "header",
    [
        (2**62).to_bytes(8, "little"),
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (2**27).to_bytes(8, "little") + b"{" + b" " * 1000,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        b"",
        b"\x08",
    ],
    ids=lambda header: repr(header[:9]),
)
def test_a_header_that_is_none_is_refused(header: bytes, tmp_path: Path) -> None:
    (written("learned", tmp_path) / WEIGHTS).write_bytes(header)
    refused(tmp_path, WEIGHTS)


def test_a_header_that_names_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 1]}
    text = json.dumps({"embedding": entry}).encode()
    file = written("voco", tmp_path) / WEIGHTS
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    refused(tmp_path, WEIGHTS)


def test_diverged_weights_are_not_saved(tmp_path: Path) -> None:
    model: Any = atp_patch.patch_model(tiny_model(KIND), **LEARNED)
    next(model.atp_patch_heads.parameters()).data.fill_(NAN)
    with pytest.raises(atp_patch.WeightsError, match="NaN"):
        atp_patch.save_pretrained(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "source", ["a" * 300, "a" * 5000, "a\0b", "\ud800", "", "no/such/adapter/at/all", "../x/y"]
)
def test_a_name_that_is_no_adapters_is_refused(source: str) -> None:
    for call in (
        lambda: atp_patch.patch_model(tiny_model(KIND), weights=source),
        lambda: atp_patch.load_trained(tiny_model(KIND), source),
    ):
        with pytest.raises(atp_patch.WeightsError) as refusal:
            call()
        str(refusal.value).encode()
        assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("source", [5, b"folder", ["folder"], 0.5])
def test_weights_of_another_kind_are_refused(source: Any) -> None:
    with pytest.raises(atp_patch.ConfigError, match="weights="):
        atp_patch.patch_model(tiny_model(KIND), weights=source)


def test_an_adapter_is_not_written_where_there_can_be_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    model = atp_patch.patch_model(tiny_model(KIND), **ADAPTERS["fastv"])
    with pytest.raises(atp_patch.ConfigError, match="cannot be written"):
        atp_patch.save_pretrained(model, tmp_path / "file" / "adapter")
    assert (tmp_path / "file").read_text() == "precious"


STRANGE = (None, True, "no", "", 1.5, -1, 0, 10**9, 10**30, 1e30, NAN, [], {}, [[]], "\ud800")


def with_values_replaced(data: Any) -> Iterator[Any]:
    """The JSON with each of its values, tables and lists in turn replaced by each strange one."""
    yield from STRANGE
    if isinstance(data, dict):
        for key, value in data.items():
            yield {name: one for name, one in data.items() if name != key}
            for changed in with_values_replaced(value):
                yield {**data, key: changed}
    elif isinstance(data, list):
        for at, value in enumerate(data):
            for changed in with_values_replaced(value):
                yield [*data[:at], changed, *data[at + 1 :]]


def flipped(content: bytes, draw: random.Random) -> bytes:
    """A file with a byte or a few changed, cut off, or doubled."""
    way = draw.random()
    if way < 0.1:
        return content[: draw.randrange(len(content))]
    if way < 0.2:
        at = draw.randrange(len(content))
        return content[:at] + content[at : at + 9] + content[at:]
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 3))):
        # The beginning of a safetensors file is its header: it gets half of the blows.
        end = len(content) if draw.random() < 0.5 else min(1500, len(content))
        changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down: True is not 1."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def check_damaged(model: Any, folder: Path, forwards: bool) -> bool:
    """Patch a model with a damaged adapter; whether it was read.

    What is read is what the files say, and all of it is finite.
    """
    said = ""
    try:
        atp_patch.patch_model(model, weights=folder)
    except atp_patch.ATPError as error:
        said = str(error)
    if not is_patched(model):
        assert 20 < len(said) < 2000
        assert "\n" not in said
        return False
    assert said == ""
    younger = {"rope_2d": False, "prune_marks": False, "target_share": None}
    asked = younger | json.loads((folder / CONFIG).read_text())
    asked.pop("made_with", None)
    assert same(json.loads(require_patch(model).config.to_json()), asked)
    heads = require_patch(model).learned_module
    if heads is not None:
        assert all(tensor.isfinite().all() for tensor in heads.state_dict().values())
    if forwards:
        forward(model, made.batch(model, made.SINGLE))
        for layer in atp_patch.last_trace(model).layers.values():
            assert all(theta.isfinite().all() for theta in (layer.thresholds or {}).values())
    atp_patch.unpatch_model(model)
    return True


@pytest.mark.parametrize("kind", ADAPTERS)
def test_values_of_other_kinds_are_refused_or_kept(kind: str, tmp_path: Path) -> None:
    model, file = tiny_model(KIND), written(kind, tmp_path) / CONFIG
    before = snapshot(model)
    read = 0
    for data in with_values_replaced(json.loads(file.read_text())):
        file.write_text(json.dumps(data))
        read += check_damaged(model, tmp_path, forwards=False)
    assert read, "no change was harmless: the check of what is read shows nothing"
    assert snapshot(model) == before


@pytest.mark.parametrize(("kind", "name"), [(k, CONFIG) for k in ADAPTERS] + [("learned", WEIGHTS)])
def test_flipped_bytes_are_refused_or_harmless(kind: str, name: str, tmp_path: Path) -> None:
    model, file = tiny_model(KIND), written(kind, tmp_path) / name
    logits = forward(model, made.batch(model, made.SINGLE)).logits
    before, content = snapshot(model), file.read_bytes()
    draw = random.Random(f"{kind} {name}")
    outcomes = set()
    for _ in range(150):
        file.write_bytes(flipped(content, draw))
        outcomes.add(check_damaged(model, tmp_path, forwards=name == WEIGHTS))
    assert False in outcomes
    assert True in outcomes or kind == "voco", "no change was harmless"
    assert snapshot(model) == before
    assert torch.equal(forward(model, made.batch(model, made.SINGLE)).logits, logits)
