"""The plan of a patch, which is made and checked before the model is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from atp_patch.contract import (
    DoorMethod,
    LayerMethod,
    Method,
    ModuleSpec,
    PictureMethod,
    Tower,
    TowerMethod,
)
from atp_patch.contract.arguments import as_kind, as_shares, shown
from atp_patch.contract.errors import ConfigError, UnsupportedModelError
from atp_patch.contract.method_learning import check_module
from atp_patch.families import FAMILIES, Family, family_of
from atp_patch.methods import MethodSet, make_methods
from atp_patch.patching.adapter_files import AdapterSource
from atp_patch.patching.adapter_loading import load_adapter
from atp_patch.patching.clip import ClipRelevance
from atp_patch.patching.config import BaseModel, PruningConfig, Stage
from atp_patch.patching.voco import check_alone, check_family, voco_module
from atp_patch.seam import Parts, check_uncompiled, decoder_shape, locate


@dataclass(frozen=True)
class Plan:
    """What one patch consists of.

    Attributes:
        parts: the modules of the model.
        family: how the model's prompts are read.
        config: the configuration that an adapter's JSON holds.
        methods: the methods by the places where they prune.
        attention_layers: for each pruning layer, the earlier layers whose attention the method
            inside the decoder reads, each with the layer that is read for it: itself, or the last
            one before it that attends.
        vision: the vision tower that a method prunes or reads, or None.
        clip: tells a door method what the question is about, or None if it does not ask.
        learned_module: the module that the method learns, or None.
        rope_2d_forced: whether ``rope_2d`` is allowed although no layer of the decoder learns.
    """

    parts: Parts
    family: Family
    config: PruningConfig
    methods: MethodSet
    attention_layers: Mapping[int, Mapping[int, int]]
    vision: Tower | None
    clip: ClipRelevance | None
    learned_module: nn.Module | None
    rope_2d_forced: bool


def make_plan(
    model: nn.Module,
    around: Sequence[nn.Module],
    *,
    layers: Sequence[int] | None,
    method: str | Method | Sequence[str | Method] | None,
    keep: float | Sequence[float] | None,
    target_tokens: float | None,
    target_share: float | None,
    weights: AdapterSource | None,
    family: str | Family | None,
    min_tokens: int,
    min_tokens_per_image: int,
    rope_2d: bool | str,
    prune_marks: bool,
    options: dict[str, Any],
) -> Plan:
    """Make the plan for a model.

    The other arguments, and the errors, are those of :func:`atp_patch.patch_model`.

    Args:
        model: the model, without wrappers.
        around: the wrappers around it.
    """
    config_of_model: Any = getattr(model, "config", None)
    kind = family_of(config_of_model, family)
    parts = locate(model, kind.outer, bare=not kind.model_types)
    check_uncompiled(parts, tuple(around))
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
    if weights is not None:
        given = (layers, method, keep, target_tokens, target_share)
        further = min_tokens != 1 or min_tokens_per_image or rope_2d or prune_marks or options
        if further or any(argument is not None for argument in given):
            raise ConfigError(
                "weights= sets layers, method, budget and options; give weights= alone."
            )
        loaded = load_adapter(weights, base)
        config, methods, tensors = loaded.config, loaded.methods, loaded.tensors
        layer, before = methods.layer, methods.before
        loaded.made_with.warn_of_another(parts.model, parts.decoder, str(weights))
    else:
        methods = make_methods("atp" if method is None else method, dict(options))
        layer, before = methods.layer, methods.before
        if layers is None and layer is not None:
            layers = _default_layers(kind, parts, layer.depths)
        chosen = _pruning_layers(layers, layer)
        budgets = (keep, target_tokens, target_share)
        if layer is not None and all(budget is None for budget in budgets):
            keep = layer.default_keep
        config = PruningConfig(
            method=None if layer is None else layer.name,
            layers=chosen,
            base=base,
            keep=as_shares(keep, chosen),
            target_tokens=target_tokens,
            target_share=target_share,
            min_tokens=min_tokens,
            min_tokens_per_image=min_tokens_per_image,
            options={} if layer is None else layer.options(),
            before=None if before is None else Stage(before.name, before.options()),
            rope_2d=bool(rope_2d),
            prune_marks=prune_marks,
        )
        if methods.voco is not None:
            check_alone(config)
    if config.layers:
        kind.check_layers(config_of_model, config.layers)
        check_reused_keys(parts, config.layers)
    total = kind.visual_tokens(config_of_model)
    if total is not None and before is None and follows_budget(layer, config):
        config.counts(total)  # a budget that no image can meet is an error now, not later
    vision = clip = learned_module = None
    if methods.voco is not None:
        check_family(kind, config_of_model)
        learned_module = voco_module(methods.voco, parts, tensors)
    if methods.door is not None:
        vision = tower_read_by(kind, config_of_model, methods.door)
        if methods.door.text_encoder is not None:
            clip = ClipRelevance.load(methods.door.text_encoder, parts, vision)
    if methods.vision is not None:
        vision = tower_for(methods.vision, kind, config_of_model, config)
    if layer is not None:
        learned_module = _build_module(layer, config, parts, total, tensors)
    rope_2d_forced = rope_2d == "force" or weights is not None
    if config.rope_2d:
        check_rope_2d(kind, parts, forced=rope_2d_forced)
    return Plan(
        parts=parts,
        family=kind,
        config=config,
        methods=methods,
        attention_layers=(
            {} if layer is None else _attention_layers(layer, config.layers, parts.attending)
        ),
        vision=vision,
        clip=clip,
        learned_module=learned_module,
        rope_2d_forced=rope_2d_forced,
    )


def default_layers(model: Any) -> tuple[int, ...]:
    """Return the pruning layers of a model where the caller names none."""
    kind = family_of(model.config)
    return _default_layers(kind, locate(model, kind.outer, bare=not kind.model_types))


def _default_layers(
    kind: Family, parts: Parts, depths: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Return the family's pruning layers, and none behind a layer whose keys later layers reuse.

    Where a method's own paper names other layers, ``depths`` holds their shares of the depth.
    """
    found = kind.default_layers(parts.model.config, len(parts.layers), depths)
    return tuple(sorted({min(layer, parts.last_prunable_layer) for layer in found}))


def follows_budget(method: LayerMethod | None, config: PruningConfig) -> bool:
    """Return whether a method inside the decoder keeps the numbers of tokens that the budget
    gives.
    """
    if method is None:
        return False
    return method.needs_budget or (method.takes_budget and config.has_budget)


def check_reused_keys(parts: Parts, layers: Sequence[int]) -> None:
    """Raise ConfigError if tokens would go behind a layer whose keys later layers reuse."""
    last, first_reusing = parts.last_prunable_layer, parts.first_reusing_layer
    if layers[-1] > last:
        raise ConfigError(
            f"from layer {first_reusing} on, the layers of this decoder reuse the keys of earlier "
            f"ones, the first of which is layer {last}; tokens that it has made keys of stay for "
            f"all of them, so no token can go behind layer {last}. layers={list(layers)} ends "
            f"later: give layers from 1 to {last}."
        )


def check_rope_2d(family: Family, parts: Parts, *, forced: bool = False) -> None:
    """Check that visual tokens can be rotated by row and column.

    Raises:
        ConfigError: if no parameter of the decoder's layers learns, unless ``forced``.
        UnsupportedModelError: if the model rotates them by row and column already.
    """
    rope = getattr(parts.config, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        raise UnsupportedModelError(
            f"{family.name} models rotate visual tokens by time, row and column already (M-RoPE); "
            "patch without rope_2d."
        )
    if not forced and not any(p.requires_grad for p in parts.layers.parameters()):
        raise ConfigError(
            "rope_2d changes what the decoder has learned, and it is frozen: let it learn (or "
            'LoRA in it), or give rope_2d="force".'
        )


def tower_read_by(family: Family, config: Any, method: DoorMethod) -> Tower | None:
    """Return the vision tower that a door method reads, or None if it reads none.

    Raises:
        UnsupportedModelError: if the family's tower cannot be read; the message names families
            whose tower can.
    """
    if not method.tower_blocks:
        return None
    tower = family.tower(config)
    if tower is None:
        able = [f.name for f in FAMILIES if f.has_tower and f is not family]
        raise UnsupportedModelError(
            f"{method.name} reads the vision tower, whose tokens cannot be followed to their "
            f"places in this {config.model_type} model; families where they can: "
            f"{', '.join(able)}. Methods at the door that read no tower work here: divprune, "
            "cdpruner, prunesid, scope with alpha=0."
        )
    return tower


def tower_for(
    method: PictureMethod | TowerMethod, family: Family, config: Any, asked: PruningConfig
) -> Tower:
    """Return the vision tower that a method prunes.

    Raises:
        UnsupportedModelError: if the family's tower cannot be pruned; the message names families
            whose tower can.
        ConfigError: if the budget cannot be divided among tiles.
    """
    tower = family.tower(config)
    shrinks = isinstance(method, PictureMethod)
    if tower is None or not tower.mergeable or (shrinks and not family.resizable):
        others = [f for f in FAMILIES if f is not family and f.has_tower and not f.read_only]
        able = ", ".join(f.name for f in others if f.resizable or not shrinks)
        raise UnsupportedModelError(
            f"{method.name} prunes before the decoder, which this {config.model_type} model does "
            f"not allow; these families do: {able}. Any method that prunes inside the decoder "
            "works here."
        )
    if not tower.whole and asked.method is None and asked.target_tokens is not None:
        raise ConfigError(
            f"{config.model_type} cuts tiles after tokens are chosen in them, so {method.name} "
            "cannot promise target_tokens; give keep=, the share of each tile, or neither."
        )
    return tower


def _pruning_layers(layers: Sequence[int] | None, method: LayerMethod | None) -> tuple[int, ...]:
    """Check and return the pruning layers; none for a method that prunes before the decoder."""
    if layers is None:
        return ()
    if method is None:
        raise ConfigError(
            "this method prunes before the decoder: leave layers out, or add a method that "
            'prunes inside it, as in method=["prumerge+", "atp"].'
        )
    return tuple(as_kind("layers", layers, "tuple[int, ...]"))


def _attention_layers(
    method: LayerMethod, layers: Sequence[int], attending: Sequence[int]
) -> dict[int, dict[int, int]]:
    """Return, for each pruning layer, the layers whose attention the method reads there.

    Args:
        method: the method inside the decoder.
        layers: the pruning layers.
        attending: the layers that have an attention.

    Returns:
        For each pruning layer, the number of each layer that the method names, and the number of
        the layer that is read for it: itself, or the last one before it that attends.
    """
    found: dict[int, dict[int, int]] = {}
    for layer in layers:
        wanted = method.attention_layers(layer)
        numbers = wanted if isinstance(wanted, Collection) else [None]
        if not all(isinstance(number, int) and 0 <= number < layer for number in numbers):
            raise ConfigError(
                f"{method.name}: attention_layers({layer}) is {wanted!r}; it must name decoder "
                f"layers from 0 to {layer - 1}, which run before layer {layer}, or be ()."
            )
        if wanted and min(wanted) < attending[0]:
            raise ConfigError(
                f"{method.name} reads the attention of layer {min(wanted)} to prune before layer "
                f"{layer}, but the first layer of this model that attends is {attending[0]}; prune "
                f"before layer {attending[0] + 1} or later."
            )
        found[layer] = {
            number: max(earlier for earlier in attending if earlier <= number)
            for number in sorted(set(wanted))
        }
    return found


def _build_module(
    method: LayerMethod,
    config: PruningConfig,
    parts: Parts,
    total: int | None,
    tensors: dict[str, Tensor],
) -> nn.Module | None:
    """Build the method's learned module with an adapter's tensors, on the decoder's device."""
    shares = config.shares(total)
    spec = ModuleSpec(config.layers, config.base.hidden_size, shares)
    learned_module = check_module(method.build(spec), method.name)
    if learned_module is None:
        return None
    if tensors:
        on_no_device = any(parameter.is_meta for parameter in learned_module.parameters())
        learned_module.load_state_dict(tensors, assign=on_no_device)
    weight = next(parts.layers[config.layers[0]].parameters(), None)  # FSDP 1 removes parameters
    return learned_module if weight is None or weight.is_meta else learned_module.to(weight.device)
