"""The functions of a patched model: the one line that patches it, and those that ask about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from atp_patch.contract import Method
from atp_patch.contract.errors import NotPatchedError
from atp_patch.families import Family
from atp_patch.patching.attached import (
    attach,
    attached,
    check_gradients_are_shared,
    detach,
    unwrapped,
)
from atp_patch.patching.patch import HEADS, IGNORED, Patch
from atp_patch.patching.plan import make_plan
from atp_patch.patching.rollback import unchanged_on_failure
from atp_patch.patching.trace import PruningTrace

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_model(
    model: ModelT,
    layers: Sequence[int] | None = None,
    method: str | Method | Sequence[str | Method] | None = None,
    *,
    keep: float | Sequence[float] | None = None,
    target_tokens: float | None = None,
    weights: str | Path | None = None,
    family: str | Family | None = None,
    min_tokens: int = 1,
    min_tokens_per_image: int = 0,
    rope_2d: bool | str = False,
    prune_marks: bool = False,
    **options: Any,
) -> ModelT:
    """Make a loaded vision-language model carry fewer visual tokens through its decoder, in place.

    Args:
        model: a loaded vision-language model of a supported family, or a wrapper around one (PEFT,
            DistributedDataParallel, FullyShardedDataParallel): the model inside is patched.
        layers: decoder layers, from 1, before which tokens are pruned; by default [4, 14, 24] of 32
            in proportion to the decoder's depth, and none earlier than the family allows.
        method: a name from :func:`available_methods` ("atp" by default), or a ``Method``; or two,
            one that prunes before the decoder and then one that prunes inside it, which takes
            layers, budget and options.
        keep: share of the surviving visual tokens that a pruning layer keeps; one, or one a layer.
            Of a method on the vision tower: share of the tokens of each image, tile or frame. Of
            one at the decoder's door: share of the sample's visual tokens that enter.
        target_tokens: visual tokens of a sample averaged over all decoder layers. Without a budget
            of either kind it is a quarter of the sample's visual tokens, or what the method
            itself decides.
        weights: a folder or Hub id of a saved adapter, which brings all of the above along.
        family: the family that serves the model's type where it is left out; a
            :class:`atp_patch.Family` of your own; or "generic" for any decoder of transformers,
            where each call says which tokens are visual, by ``visual_mask=`` and, if wanted,
            ``visual_grids=``.
        min_tokens, min_tokens_per_image: visual tokens left at least, for each sample and each
            image.
        rope_2d: turn visual tokens by row and column instead of their place in the sequence, for
            a decoder that learns it (ATP-LLaVA's pruning positional embedding): half of the rotary
            frequencies each, counted from the first token of the image, frame or tile. "force"
            also turns a frozen decoder's.
        prune_marks: let newline and class tokens go too, which stand in no grid and are kept
            otherwise. They then count as visual tokens; each column of them is an image by itself.
        options: fields of the method.

    Returns:
        The same object. A model has one patch: patching a patched model, a wrapper around it, or
        a part of it that holds its decoder, replaces the first patch. Whatever is raised, the model
        stays as it was, and so does the first patch.

    Raises:
        ConfigError, BudgetError: naming the wrong argument and the mend.
        UnsupportedModelError: where the model cannot be patched.
        WeightsError: where an adapter is missing, broken, or made for another model.
    """
    whole, around = unwrapped(model)
    old = attached(whole)
    if old is not None and any(part is whole for part in old.parts.model.modules()):
        whole = old.parts.model  # a part of the patched model was given
    plan = make_plan(
        whole,
        around,
        layers=layers,
        method=method,
        keep=keep,
        target_tokens=target_tokens,
        weights=weights,
        family=family,
        min_tokens=min_tokens,
        min_tokens_per_image=min_tokens_per_image,
        rope_2d=rope_2d,
        prune_marks=prune_marks,
        options=options,
    )
    if plan.heads is not None:
        check_gradients_are_shared(whole, around)
    changed: list[object] = [*whole.modules()]
    if old is not None:
        changed += [*old.parts.model.modules(), old, old.seam]
    with unchanged_on_failure(changed):
        if old is not None:
            _remove(old)
        patch = Patch(plan)
        if plan.heads is not None:
            whole.add_module(HEADS, plan.heads)
            # A checkpoint of the patched model is a checkpoint of the plain one.
            ignored = {f"{HEADS}.{key}" for key in plan.heads.state_dict()}
            whole.__dict__[IGNORED] = set(getattr(whole, IGNORED) or ()) | ignored
        attach(patch)
        patch.seam.install()
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Take the patch off: hooks, attributes, config and ``state_dict`` keys are as before.

    Raises:
        NotPatchedError: if the model is not patched.
    """
    _remove(require_patch(model))
    return model


def _remove(patch: Patch) -> None:
    patch.seam.remove()
    if patch.heads is not None:
        delattr(patch.parts.model, HEADS)
        patch.restore_ignored()
    detach(patch)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The plain model for a while, in this thread. Caches that hold a pruned prompt already are
    still read rightly.

    Such contexts may overlap: the model prunes again when the last of them is left.
    """
    thread = require_patch(model).seam.thread
    thread.disabled += 1
    try:
        yield
    finally:
        thread.disabled -= 1


def last_trace(model: nn.Module) -> PruningTrace:
    """What this thread's last forward pass with images did.

    Raises:
        NotPatchedError: if the model is not patched, or has seen no image from this thread since.
    """
    trace = require_patch(model).thread.trace
    if trace is None:
        raise NotPatchedError(
            "this thread has run no forward pass with images through this patched model yet, and "
            "each thread has the trace of its own last pass; call model(...) or "
            "model.generate(...) in this thread first."
        )
    return trace


def is_patched(model: nn.Module) -> bool:
    """Whether a model is patched; wrappers around it and what holds its decoder may ask too."""
    return attached(model) is not None


def require_patch(model: nn.Module) -> Patch:
    """The patch on a model, found from a wrapper around it and from what holds its decoder too.

    Raises:
        NotPatchedError: if there is none.
    """
    patch = attached(model)
    if patch is None:
        raise NotPatchedError(
            f"this {type(model).__name__} is not patched; call atp_patch.patch_model(model) first."
        )
    return patch
