"""Joining a family, a method and the seam: the one line that patches a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from atp_patch.config import (
    DEFAULT_LAYERS,
    DEFAULT_SHARE,
    BaseModel,
    PruningConfig,
    as_shares,
    scaled_layers,
)
from atp_patch.errors import ConfigError, NotPatchedError
from atp_patch.families import Family, family_of
from atp_patch.hub import adapter_of, load_adapter
from atp_patch.methods import Method, ModuleSpec, make_method
from atp_patch.seam import LearningPass, Parts, Prefill, Seam, decoder_shape, locate
from atp_patch.trace import LayerTrace, PruningTrace
from atp_patch.types import Decision, GridQuery, Layout, View, VisualGrid

STATE = "_atp_patch"
HEADS = "atp_patch_heads"
IGNORED = "_keys_to_ignore_on_save"
ModelT = TypeVar("ModelT", bound=nn.Module)


class Patch:
    """What patching one model adds to it; the seam asks it, it asks family and method."""

    def __init__(
        self,
        parts: Parts,
        family: Family,
        method: Method,
        config: PruningConfig,
        heads: nn.Module | None,
    ) -> None:
        self.parts, self.family, self.method, self.config = parts, family, method, config
        self.heads = heads
        self.layers = config.layers
        self.min_per_image = config.min_tokens_per_image
        self.visual_token_ids = family.placeholder_ids(parts.model.config)
        self.causal, self.newline = family.causal, family.newline
        self.learned = heads is not None
        self.ignored_before = parts.model.__dict__.get(IGNORED)
        self.trace: PruningTrace | None = None
        self.seam = Seam(parts, self)

    def grids(self, query: GridQuery) -> Sequence[Sequence[VisualGrid]]:
        """Where the grids of each sample lie, as the family says."""
        return self.family.grids(query)

    def counts(self, step: int, left: tuple[int, ...], layout: Layout) -> tuple[int, ...] | None:
        """How many visual tokens the budget leaves each sample at a pruning layer."""
        if not self.method.needs_budget:
            return None
        samples = zip(layout.grids, layout.totals, left, strict=True)
        return tuple(
            min(self.config.counts(total, len(grids))[step], remaining)
            for grids, total, remaining in samples
        )

    def decide(self, view: View) -> Decision:
        """The method's choice."""
        return self.method.decide(view, self.heads)

    def finished(self, run: Prefill) -> None:
        """Note what a forward pass with images did."""
        layers = {}
        previous = run.layout.totals
        for layer in self.layers:
            record = run.records.get(layer)
            if record is not None:
                previous = record.kept
            alive = run.at(layer)
            layers[layer] = LayerTrace(
                layout=run.layout,
                kept_counts=previous,
                decision=None if record is None else record.decision,
                token=run.layout.position if record is None else record.token,
                token_valid=run.layout.valid if record is None else record.token_valid,
                alive=None if alive is None else (alive.index, alive.valid),
                attended=run.attended,
            )
        tokens = zip(run.prompt_tokens, run.layout.totals, strict=True)
        self.trace = PruningTrace(
            layers=layers,
            layout=run.layout,
            shape=decoder_shape(self.parts.config),
            text_tokens=tuple(all_tokens - visual for all_tokens, visual in tokens),
            bytes_per_element=run.bytes_per_element,
        )

    def losses(self, run: LearningPass) -> dict[str, tuple[float, Tensor]]:
        """What training adds to the loss; its parts go into the trace too."""
        # From now on a checkpoint must hold the heads, or training could not be resumed from it.
        self.parts.model.__dict__[IGNORED] = self.ignored_before
        seen = [b for b, total in enumerate(run.layout.totals) if total]
        totals = torch.tensor([run.layout.totals[b] for b in seen], dtype=torch.float32)
        target = self.config.target_tokens or DEFAULT_SHARE * float(totals.mean())
        counts = [count[seen] for count in run.soft_counts]
        terms = self.method.losses(
            counts, totals.to(counts[0].device), self.layers, self.config.base.num_layers, target
        )
        parts = {name: float(loss.detach()) for name, (_, loss) in terms.items()}
        self.trace = replace(last_trace(self.parts.model), losses=parts)
        return terms


def patch_model(
    model: ModelT,
    layers: Sequence[int] | None = None,
    method: str | Method | None = None,
    *,
    keep: float | Sequence[float] | None = None,
    target_tokens: float | None = None,
    weights: str | Path | None = None,
    min_tokens: int = 1,
    min_tokens_per_image: int = 0,
    **options: Any,
) -> ModelT:
    """Make a loaded vision-language model carry fewer visual tokens through its decoder, in place.

    Args:
        model: a loaded vision-language model of a supported family.
        layers: decoder layers, from 1, before which tokens are pruned; [4, 14, 24] by default.
        method: a name from :func:`available_methods` ("atp" by default), or a ``Method``.
        keep: share of the surviving visual tokens that a pruning layer keeps; one, or one a layer.
        target_tokens: visual tokens of a sample averaged over all decoder layers. Without a budget
            of either kind it is a quarter of the sample's visual tokens.
        weights: a folder or Hub id of a saved adapter, which brings all of the above along.
        min_tokens, min_tokens_per_image: visual tokens left at least, for each sample and each
            image.
        options: fields of the method.

    Returns:
        The same object. Patching a patched model replaces the first patch.

    Raises:
        ConfigError, BudgetError: naming the wrong argument and the mend; the model stays as it was.
        UnsupportedModelError: where the model cannot be patched.
        WeightsError: where an adapter is missing, broken, or made for another model.
    """
    family = family_of(getattr(model, "config", None))
    parts = locate(model, family.outer)
    shape = decoder_shape(parts.config)
    base = BaseModel(family.name, shape.num_layers, shape.hidden_size)
    tensors: dict[str, Tensor] = {}
    if weights is not None:
        if options or any(x is not None for x in (layers, method, keep, target_tokens)):
            raise ConfigError(
                "weights bring layers, method, budget and options along; give weights alone."
            )
        config, tensors = load_adapter(weights, base)
        chosen = make_method(config.method, config.options)
    else:
        chosen = make_method(method if method is not None else "atp", dict(options))
        if layers is None and shape.num_layers <= max(DEFAULT_LAYERS):
            raise ConfigError(
                f"the default layers {list(DEFAULT_LAYERS)} do not fit a decoder of "
                f"{shape.num_layers} layers; in proportion: "
                f"layers={scaled_layers(shape.num_layers)}."
            )
        places = tuple(DEFAULT_LAYERS if layers is None else layers)
        config = PruningConfig(
            method=chosen.name,
            layers=places,
            base=base,
            keep=as_shares(keep, places),
            target_tokens=target_tokens,
            min_tokens=min_tokens,
            min_tokens_per_image=min_tokens_per_image,
            options=chosen.options(),
        )
    family.check_layers(model.config, config.layers)
    total = family.visual_tokens(model.config)
    if total is not None and chosen.needs_budget:
        config.counts(total)  # a budget that no image can meet is an error now, not later
    heads = _build_heads(chosen, config, parts, total, tensors)
    if _state(model) is not None:
        unpatch_model(model)
    patch = Patch(parts, family, chosen, config, heads)
    if heads is not None:
        model.add_module(HEADS, heads)
        # A checkpoint of the patched model is a checkpoint of the plain one.
        ignored = {f"{HEADS}.{key}" for key in heads.state_dict()}
        model.__dict__[IGNORED] = set(getattr(model, IGNORED) or ()) | ignored
    model.__dict__[STATE] = patch
    patch.seam.install()
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Take the patch off: hooks, attributes, config and ``state_dict`` keys are as before.

    Raises:
        NotPatchedError: if the model is not patched.
    """
    patch = require_patch(model)
    patch.seam.remove()
    if patch.heads is not None:
        delattr(model, HEADS)
        model.__dict__[IGNORED] = patch.ignored_before
    del model.__dict__[STATE]
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The plain model for a while. Caches that hold a pruned prompt already are still read
    rightly.
    """
    seam = require_patch(model).seam
    before, seam.enabled = seam.enabled, False
    try:
        yield
    finally:
        seam.enabled = before


def last_trace(model: nn.Module) -> PruningTrace:
    """What the last forward pass with images did.

    Raises:
        NotPatchedError: if the model is not patched, or has seen no image since.
    """
    trace = require_patch(model).trace
    if trace is None:
        raise NotPatchedError(
            "no forward pass with images has run through this patched model yet; call model(...) "
            "or model.generate(...) first."
        )
    return trace


def save_pretrained(model: nn.Module, folder: str | Path, **kwargs: Any) -> None:
    """Write the adapter alone (configuration, learned tensors, card) to a folder.

    Args:
        kwargs: passed on to ``huggingface_hub.ModelHubMixin.save_pretrained``.
    """
    patch = require_patch(model)
    adapter_of(patch.config, patch.heads).save_pretrained(folder, **kwargs)


def push_to_hub(model: nn.Module, repo_id: str, **kwargs: Any) -> str:
    """Push the adapter alone to the Hub; returns the address of the commit.

    Args:
        kwargs: passed on to ``huggingface_hub.ModelHubMixin.push_to_hub`` (private, token, ...).
    """
    patch = require_patch(model)
    return adapter_of(patch.config, patch.heads).push_to_hub(repo_id, **kwargs)


def require_patch(model: nn.Module) -> Patch:
    """The patch on a model.

    Raises:
        NotPatchedError: if there is none.
    """
    patch = _state(model)
    if patch is None:
        raise NotPatchedError(
            f"this {type(model).__name__} is not patched; call atp_patch.patch_model(model) first."
        )
    return patch


def _state(model: nn.Module) -> Patch | None:
    return getattr(model, "__dict__", {}).get(STATE)


def _build_heads(
    method: Method,
    config: PruningConfig,
    parts: Parts,
    total: int | None,
    tensors: dict[str, Tensor],
) -> nn.Module | None:
    """The method's learned module with an adapter's tensors, on the decoder's device."""
    share = DEFAULT_SHARE
    if config.target_tokens is not None and total is not None:
        share = config.target_tokens / total
    heads = method.build(ModuleSpec(config.layers, config.base.num_layers, share))
    if heads is None:
        return None
    if tensors:
        heads.load_state_dict(tensors)
    weight = next(parts.layers[config.layers[0]].parameters())
    return heads if weight.is_meta else heads.to(weight.device)
