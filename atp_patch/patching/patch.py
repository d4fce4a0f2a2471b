"""Joining a family, a method and the seam: the one line that patches a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from atp_patch.contract.arguments import as_kind, as_shares, shown
from atp_patch.contract.errors import ConfigError, NotPatchedError
from atp_patch.families import Family, family_of
from atp_patch.methods import (
    DoorMethod,
    LayerMethod,
    Method,
    ModuleSpec,
    VoCo,
    make_methods,
)
from atp_patch.patching.adapter import load_adapter
from atp_patch.patching.attached import (
    attach,
    attached,
    check_gradients_are_shared,
    detach,
    unwrapped,
)
from atp_patch.patching.compression import Compression, check_alone, check_compressible, voco_module
from atp_patch.patching.config import BaseModel, PruningConfig, Stage
from atp_patch.patching.pruner import (
    HEADS,
    IGNORED,
    Patch,
    check_turned,
    follows_budget,
    tower_of,
    tower_read_by,
)
from atp_patch.patching.rollback import unchanged_on_failure
from atp_patch.patching.trace import PruningTrace
from atp_patch.seam import Parts, check_uncompiled, decoder_shape, locate

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
    kind = family_of(getattr(whole, "config", None), family)
    parts = locate(whole, kind.outer, bare=not kind.model_types)
    check_uncompiled(parts, around)
    shape = decoder_shape(parts.config)
    base = BaseModel(kind.name, shape.num_layers, shape.hidden_size)
    tensors: dict[str, Tensor] = {}
    min_tokens = as_kind("min_tokens", min_tokens, "int")
    min_tokens_per_image = as_kind("min_tokens_per_image", min_tokens_per_image, "int")
    prune_marks = as_kind("prune_marks", prune_marks, "bool")
    if rope_2d != "force":
        if isinstance(rope_2d, str):
            raise ConfigError(f'rope_2d={shown(rope_2d)} is not True, False or "force".')
        rope_2d = as_kind("rope_2d", rope_2d, "bool")
    also = {
        "min_tokens": None if min_tokens == 1 else min_tokens,
        "min_tokens_per_image": min_tokens_per_image or None,
        "rope_2d": rope_2d or None,
        "prune_marks": prune_marks or None,
    }
    if weights is not None:
        given = (layers, method, keep, target_tokens, *also.values())
        if options or any(x is not None for x in given):
            raise ConfigError(
                "weights bring layers, method, budget and options along; give weights alone."
            )
        config, before, inside, tensors = load_adapter(weights, base)
    else:
        before, inside = make_methods("atp" if method is None else method, dict(options))
        if layers is None and inside is not None:
            layers = kind.default_layers(whole.config, shape.num_layers)
        places = _places(layers, inside)
        config = PruningConfig(
            method=None if inside is None else inside.name,
            layers=places,
            base=base,
            keep=as_shares(keep, places),
            target_tokens=target_tokens,
            min_tokens=min_tokens,
            min_tokens_per_image=min_tokens_per_image,
            options={} if inside is None else inside.options(),
            before=None if before is None else Stage(before.name, before.options()),
            rope_2d=bool(rope_2d),
            prune_marks=prune_marks,
        )
        if isinstance(before, VoCo):
            check_alone(config)
    if config.layers:
        kind.check_layers(whole.config, config.layers)
    tower = None
    if isinstance(before, VoCo):
        check_compressible(kind, whole.config)
    elif isinstance(before, DoorMethod):
        tower = tower_read_by(kind, whole.config, before)
    elif before is not None:
        tower = tower_of(kind, whole.config, before, config)
    total = kind.visual_tokens(whole.config)
    if total is not None and before is None and follows_budget(inside, config):
        config.counts(total)  # a budget that no image can meet is an error now, not later
    heads = None if inside is None else _build_heads(inside, config, parts, total, tensors)
    if isinstance(before, VoCo):
        heads = voco_module(before, parts, tensors)
    forced = rope_2d == "force" or weights is not None
    if config.rope_2d:
        check_turned(kind, parts, forced=forced)
    if heads is not None:
        check_gradients_are_shared(whole, around)
    changed: list[object] = [*whole.modules()]
    if old is not None:
        changed += [*old.parts.model.modules(), old, old.seam]
    with unchanged_on_failure(changed):
        if old is not None:
            _remove(old)
        patch = (
            Compression(parts, kind, before, config, heads)
            if isinstance(before, VoCo)
            else Patch(parts, kind, before, inside, config, heads, tower)
        )
        patch.frozen_may_turn = forced
        if heads is not None:
            whole.add_module(HEADS, heads)
            # A checkpoint of the patched model is a checkpoint of the plain one.
            ignored = {f"{HEADS}.{key}" for key in heads.state_dict()}
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


def _places(layers: Sequence[int] | None, method: LayerMethod | None) -> tuple[int, ...]:
    """The pruning layers; none for what prunes before the decoder."""
    if layers is None:
        return ()
    if method is None:
        raise ConfigError(
            "this method prunes before the decoder: leave layers out, or add a method that "
            'prunes inside it, as in method=["prumerge+", "atp"].'
        )
    return tuple(as_kind("layers", layers, "tuple[int, ...]"))


def _build_heads(
    method: LayerMethod,
    config: PruningConfig,
    parts: Parts,
    total: int | None,
    tensors: dict[str, Tensor],
) -> nn.Module | None:
    """The method's learned module with an adapter's tensors, on the decoder's device."""
    shares = config.shares(total)
    heads = method.build(ModuleSpec(config.layers, config.base.hidden_size, shares))
    if heads is None:
        return None
    if tensors:
        on_no_device = any(parameter.is_meta for parameter in heads.parameters())
        heads.load_state_dict(tensors, assign=on_no_device)
    weight = next(parts.layers[config.layers[0]].parameters(), None)  # FSDP 1 takes them out
    return heads if weight is None or weight.is_meta else heads.to(weight.device)
