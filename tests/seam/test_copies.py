"""Copies, pickles, dtypes, backends and checkpoints of a patched model."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

import atp_patch
from tests.helpers import inputs as prompts
from tests.helpers import tiny
from tests.helpers.compare import assert_close, assert_same_choice, hooks, shape_of
from tests.helpers.inputs import batch, real_mask, visual_mask
from tests.helpers.oracle import masked_logits
from tests.helpers.pairing import pairs
from tests.helpers.run import FASTV, METHODS, Session, forward, generate, kept_of, patched, words

families = pytest.mark.parametrize("kind", tiny.FAMILIES)


def saved_and_loaded(model: PreTrainedModel) -> PreTrainedModel:
    """Through ``torch.save``."""
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded: PreTrainedModel = torch.load(stream, weights_only=False)
    return loaded


WAYS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": saved_and_loaded,
}


def count_hooks(model: PreTrainedModel) -> int:
    """Hooks of all modules, those of upstream's that capture outputs included."""
    return sum(len(ids) for kinds in hooks(model).values() for ids in kinds.values())


@pairs(kind=tiny.FAMILIES, way=WAYS, method=["fastv", "atp"])
def test_a_copy_is_patched_and_its_own(kind: str, way: str, method: str) -> None:
    """Before and after the first forward pass; neither copy feels what is done to the other."""
    plain, model = tiny.tiny_model(kind), patched(kind, **METHODS[method])
    inputs, others = batch(model, prompts.MIXED), batch(model, prompts.RAGGED)
    unused = WAYS[way](model)
    expected = forward(model, inputs).logits
    # Upstream's hooks that capture hidden states are closures: a llava that has run once no longer
    # pickles, patched or not.
    closures = tiny.is_llava(model) and way != "deepcopy"
    twin = unused if closures else WAYS[way](model)
    for one in (unused, twin):
        assert torch.equal(forward(one, inputs).logits, expected)
        assert torch.equal(kept_of(one)[6], kept_of(model)[6])
    forward(twin, others)
    assert kept_of(model)[6].shape == inputs["input_ids"].shape, "the traces are one"
    atp_patch.unpatch_model(model)
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
    assert torch.equal(forward(twin, inputs).logits, expected)
    again = atp_patch.patch_model(tiny.tiny_model(kind), **METHODS[method])
    assert torch.equal(generate(twin, inputs), generate(again, inputs))
    with atp_patch.disabled(twin):
        assert torch.equal(forward(again, inputs).logits, expected), "disabled both"
        assert torch.equal(forward(twin, inputs).logits, forward(plain, inputs).logits)
    atp_patch.unpatch_model(twin)
    assert count_hooks(twin) == count_hooks(plain)
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert torch.equal(forward(twin, inputs).logits, forward(plain, inputs).logits)


@families
def test_a_copys_weights_are_its_own(kind: str) -> None:
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    expected = forward(model, inputs).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert torch.equal(forward(model, inputs).logits, expected)
    assert forward(twin, inputs).logits.abs().max() == 0


def test_a_pickle_works_in_a_fresh_process(tmp_path: Path) -> None:
    """Where nothing was ever patched: what patching registers must come back with the model.

    Not with llava, whose tower upstream cannot run after unpickling in another process.
    """
    model = patched("qwen2_vl")
    inputs = batch(model, prompts.MIXED)
    torch.save({"model": model, "inputs": inputs}, tmp_path / "saved.pt")
    program = (
        "import torch; torch.set_num_threads(1)\n"
        f"saved = torch.load({str(tmp_path / 'saved.pt')!r}, weights_only=False)\n"
        "with torch.no_grad(): logits = saved['model'](**saved['inputs']).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert_close(torch.load(tmp_path / "logits.pt"), forward(model, inputs).logits)


@pytest.mark.parametrize("method", ["fastv", "atp"])
@families
def test_double_precision_after_patching(kind: str, method: str) -> None:
    """Nothing on the way is rounded to single precision (as upstream's eager softmax does)."""
    model = patched(kind, **METHODS[method]).to(torch.float64)
    plain = tiny.tiny_model(kind).to(torch.float64)
    inputs = batch(plain, prompts.MIXED)
    logits = forward(model, inputs).logits
    assert logits.dtype == torch.float64
    kept = kept_of(model)
    reference = masked_logits(plain, inputs, kept, backend="sdpa")
    assert_close(logits, reference, kept[6], 1e-10)


@pairs(kind=tiny.FAMILIES, attention=["sdpa", "eager"], method=METHODS)
def test_half_precision_after_patching(kind: str, attention: str, method: str) -> None:
    model = patched(kind, attention, **METHODS[method]).to(torch.bfloat16)
    plain = tiny.tiny_model(kind, attention).to(torch.bfloat16)
    inputs = batch(plain, prompts.MIXED)
    logits = forward(model, inputs).logits
    assert logits.dtype == torch.bfloat16
    kept = kept_of(model)
    counts = (kept[6] & visual_mask(inputs)).sum(1).tolist()
    assert counts == [total // 12 for total in visual_mask(inputs).sum(1).tolist()]
    reference = masked_logits(plain, inputs, kept)
    error = (logits - reference)[kept[6]].float().pow(2).mean().sqrt()
    assert error < 0.05 * reference[kept[6]].float().std()
    assert generate(model, inputs, 3).shape[1] == inputs["input_ids"].shape[1] + 3


@families
def test_half_precision_keeping_all_is_plain(kind: str) -> None:
    model = patched(kind, **{**FASTV, "keep": 1.0}).to(torch.bfloat16)
    plain = tiny.tiny_model(kind).to(torch.bfloat16)
    inputs = batch(plain, prompts.MIXED)
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)


@pytest.mark.parametrize(("first", "then"), [("sdpa", "eager"), ("eager", "sdpa")])
@families
def test_another_backend_after_patching(kind: str, first: str, then: str) -> None:
    model = patched(kind, first)
    inputs = batch(model, prompts.MIXED)
    before = forward(model, inputs).logits
    chosen = kept_of(model)
    model.set_attn_implementation(then)
    after = forward(model, inputs).logits
    assert_same_choice(kept_of(model)[6], chosen[6])
    assert_close(after, before, real_mask(inputs) & chosen[6])
    assert torch.equal(after, forward(patched(kind, then), inputs).logits), "the old backend ran"
    session = Session(model, inputs)
    answer = session.feed(words(4, 2))
    assert_close(answer, session.reference(tiny.tiny_model(kind), chosen)[:, -2:])
    atp_patch.unpatch_model(model)
    plain = tiny.tiny_model(kind, first)
    plain.set_attn_implementation(then)
    assert torch.equal(forward(model, inputs).logits, forward(plain, inputs).logits)
    ours, theirs = shape_of(model), shape_of(plain)
    for part, value in theirs.items():
        assert ours[part] == value, part


@pytest.mark.parametrize("method", ["fastv", "atp"])
@families
def test_a_checkpoint_of_a_patched_model_is_plain(kind: str, method: str, tmp_path: Path) -> None:
    plain, model = tiny.tiny_model(kind), patched(kind, **METHODS[method])
    inputs = batch(plain, prompts.MIXED)
    forward(model, inputs)
    for name, one in (("plain", plain), ("patched", model)):
        one.save_pretrained(tmp_path / name)
    files = [sorted(path.name for path in (tmp_path / n).iterdir()) for n in ("plain", "patched")]
    assert files[0] == files[1]
    keys: list[Any] = []
    configs = []
    for name in ("plain", "patched"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as tensors:
            keys.append(sorted(tensors.keys()))
        configs.append(json.loads((tmp_path / name / "config.json").read_text()))
    assert keys[0] == keys[1]
    assert configs[0] == configs[1]
    loaded, report = type(plain).from_pretrained(tmp_path / "patched", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(forward(loaded.eval(), inputs).logits, forward(plain, inputs).logits)
    assert_close(forward(model, inputs).logits[0], forward(copy.deepcopy(model), inputs).logits[0])


@families
def test_training_mode_and_back(kind: str) -> None:
    """Calling ``train()`` and ``eval()`` leaves the pruning of evaluation as it was."""
    model = patched(kind)
    inputs = batch(model, prompts.MIXED)
    before = forward(model, inputs).logits
    model.train()
    model.eval()
    assert torch.equal(forward(model, inputs).logits, before)
