"""Comparing: tensors at chosen places, choices up to near-ties, all that patching could leave."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.run import TOLERANCE

_RUNTIME = {"rope_deltas"}  # what a forward pass of the plain model changes by itself


def assert_close(
    actual: Tensor, expected: Tensor, where: Tensor | None = None, tolerance: float = TOLERANCE
) -> None:
    """Equal to ``tolerance`` where the (B, L) mask ``where`` is True, or everywhere."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    difference = (actual - expected).abs()
    if where is not None:
        assert where.any(), "a comparison of nothing"
        difference = difference[where]
    assert not difference.isnan().any(), "not a number"
    worst = difference.max().item()
    assert worst <= tolerance, f"differs by {worst:.3g}, more than {tolerance:.3g}"


def assert_same_choice(
    actual: Tensor, expected: Tensor, scores: Tensor | None = None, tie: float = 1e-6
) -> None:
    """The same (B, L) choice; where ``scores`` is given, tokens that tie to ``tie`` may swap."""
    wrong = actual != expected
    if not wrong.any():
        return
    assert scores is not None, f"{int(wrong.sum())} tokens chosen otherwise"
    for b in wrong.any(1).nonzero().flatten().tolist():
        swapped = scores[b][wrong[b]]
        assert actual[b].sum() == expected[b].sum(), "another number of tokens"
        assert swapped.max() - swapped.min() <= tie, "tokens of clearly different score swapped"


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """All that patching could leave behind in a model, in a form to compare with ``==``.

    Objects are held by identity: use it on one model object, before and after.
    """
    return {
        "hooks": hooks(model),
        "attributes": {name: _values(module) for name, module in model.named_modules()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "attention": {
            name: module.config._attn_implementation
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "state_dict": {key: value.data_ptr() for key, value in model.state_dict().items()},
        "save": (model._keys_to_ignore_on_save, type(model).__dict__.get("generate")),
    }


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """What of :func:`snapshot` can be compared between two models: no identities."""
    return {
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: {at: len(ids) for at, ids in kinds.items()}
            for name, kinds in hooks(model).items()
        },
        "types": {name: type(module) for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "state_dict": list(model.state_dict()),
    }


def hooks(model: nn.Module) -> dict[str, dict[str, list[Any]]]:
    """Every hook of every module, by its kind, by identity."""
    found = {}
    for name, module in model.named_modules():
        kinds = {
            attribute: [*table] if isinstance(table, dict) else [table]
            for attribute, table in vars(module).items()
            if "hook" in attribute and attribute != "_is_full_backward_hook"
        }
        found[name] = kinds
    return found


def _values(module: nn.Module) -> dict[str, Any]:
    """Attribute -> plain value, or the identity of anything else."""
    kept = {}
    for name, value in vars(module).items():
        if "hook" in name or name in _RUNTIME:
            kept[name] = None  # compared by ``hooks``; here its being there counts
        elif isinstance(value, dict):
            kept[name] = {key: id(item) for key, item in value.items()}
        elif isinstance(value, (str, int, float, bool, type(None), set, list, tuple)):
            kept[name] = repr(value)
        else:
            kept[name] = id(value)
    return kept
