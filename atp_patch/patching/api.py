"""The public functions that patch a model, take the patch off, and read what it did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from atp_patch.contract import Method
from atp_patch.contract.errors import ConfigError, NotPatchedError
from atp_patch.families import Family
from atp_patch.patching.adapter_files import AdapterSource
from atp_patch.patching.attached import (
    attach,
    attached,
    check_gradients_are_shared,
    detach,
    unwrapped,
)
from atp_patch.patching.patch import IGNORED, MODULE_NAME, Patch
from atp_patch.patching.plan import make_plan
from atp_patch.patching.rollback import unchanged_on_failure
from atp_patch.patching.trace import PruningTrace
from atp_patch.patching.versions import warn_of_untested_versions

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_model(
    model: ModelT,
    layers: Sequence[int] | None = None,
    method: str | Method | Sequence[str | Method] | None = None,
    *,
    keep: float | Sequence[float] | None = None,
    target_tokens: float | None = None,
    target_share: float | None = None,
    weights: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
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
        keep: the share of the remaining visual tokens that each pruning layer keeps: one number for
            all pruning layers, or one for each. For a method on the vision tower it is the share
            of the tokens of each image, tile or frame; for a door method the share of the sample's
            visual tokens that enter the decoder.
        target_tokens: the number of visual tokens of a sample, averaged over all decoder layers.
        target_share: the same as a share of the sample's visual tokens, for pictures of several
            sizes. If no budget is given, it is a quarter, or what the method itself decides.
        weights: a folder or Hub id of a saved adapter, which sets all other arguments but the next
            five, and these are as ``from_pretrained`` of transformers takes them.
        revision: a branch, a tag or a commit of the Hub repository in ``weights``.
        token: the token to read it with; by default the one that ``hf auth login`` stored, if any.
        subfolder: the folder of the adapter inside the repository or folder in ``weights``.
        cache_dir: the folder where downloads are kept.
        local_files_only: use only what was downloaded before.
        family: how the model's prompts are read. By default it is the family for the model's type.
            Give a :class:`atp_patch.Family` of your own, or "generic" for any decoder of
            transformers; then each call says which tokens are visual with ``visual_mask=`` and,
            optionally, ``visual_grids=``.
        min_tokens: the number of visual tokens that every sample keeps at least.
        min_tokens_per_image: the number of visual tokens that every image keeps at least.
        rope_2d: rotate visual tokens by row and column instead of by position in the sequence, for
            a decoder that is trained with it (ATP-LLaVA's pruning positional embedding). Rows and
            columns get half of the rotary frequencies each and are counted from the first token of
            the image, frame or tile. "force" allows it for a frozen decoder too.
        prune_marks: also prune newline and class tokens, which belong to no grid and are otherwise
            kept. They then count as visual tokens, and each column of them counts as an image.
        options: fields of the method.

    Returns:
        The same object. A model has one patch, so patching a patched model, a wrapper around it,
        or a part of it that holds its decoder, replaces the first patch. If anything is raised, the
        model and its first patch stay unchanged.

    Raises:
        ConfigError, BudgetError: if an argument is wrong; the message names it and the mend.
        UnsupportedModelError: if the model cannot be patched.
        WeightsError: if an adapter is missing, damaged, or made for a model of other shapes.
        HubError: if the Hub refuses an adapter's files or cannot be reached.

    Warns:
        OtherBaseWarning: if an adapter was made for another checkpoint of the same shapes.
        UnsupportedVersionWarning: once, if Python, torch or transformers is older or newer than the
            versions that are tested.
    """
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "subfolder": subfolder,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    if weights is None and (given := sorted(name for name, value in hub.items() if value)):
        raise ConfigError(f"{given[0]}= says where weights= lie; give weights= too.")
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
        target_share=target_share,
        weights=None if weights is None else AdapterSource.of(weights, **hub),
        family=family,
        min_tokens=min_tokens,
        min_tokens_per_image=min_tokens_per_image,
        rope_2d=rope_2d,
        prune_marks=prune_marks,
        options=options,
    )
    warn_of_untested_versions()
    if plan.learned_module is not None:
        check_gradients_are_shared(whole, around)
    changed: list[object] = [*whole.modules()]
    if old is not None:
        changed += [*old.parts.model.modules(), old, old.seam]
    with unchanged_on_failure(changed):
        if old is not None:
            _remove(old)
        patch = Patch(plan)
        if plan.learned_module is not None:
            whole.add_module(MODULE_NAME, plan.learned_module)
            # A checkpoint of the patched model holds the same keys as one of the plain model.
            ignored = {f"{MODULE_NAME}.{key}" for key in plan.learned_module.state_dict()}
            whole.__dict__[IGNORED] = set(getattr(whole, IGNORED) or ()) | ignored
        attach(patch)
        patch.seam.install()
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Remove the patch; hooks, attributes, config and ``state_dict`` keys are as they were before.

    Raises:
        NotPatchedError: if the model is not patched.
    """
    _remove(require_patch(model))
    return model


def _remove(patch: Patch) -> None:
    patch.seam.remove()
    if patch.learned_module is not None:
        delattr(patch.parts.model, MODULE_NAME)
        patch.restore_ignored()
    detach(patch)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the model without pruning inside the context, in this thread only.

    Caches that already hold a pruned prompt can still be used. Such contexts may overlap: the model
    prunes again when the last of them has ended.
    """
    thread = require_patch(model).seam.thread
    thread.disabled += 1
    try:
        yield
    finally:
        thread.disabled -= 1


def last_trace(model: nn.Module) -> PruningTrace:
    """Return what this thread's last forward pass with images did.

    Raises:
        NotPatchedError: if the model is not patched, or if this thread has run no forward pass with
            images through it since it was patched.
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
    """Return whether a model, or the model in a wrapper or around a part, is patched."""
    return attached(model) is not None


def require_patch(model: nn.Module) -> Patch:
    """Return the patch of a model, or of the model in a wrapper or around a part.

    Raises:
        NotPatchedError: if there is none.
    """
    patch = attached(model)
    if patch is None:
        raise NotPatchedError(
            f"this {type(model).__name__} is not patched; call atp_patch.patch_model(model) first."
        )
    return patch
