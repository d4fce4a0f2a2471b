"""What patching one model adds to it: the seam asks it, it asks family, method and budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from atp_patch.contract import (
    Decision,
    DoorView,
    GridQuery,
    LearningStep,
    Quota,
    Tower,
    View,
    VisualGrid,
)
from atp_patch.contract.decision import check_decision
from atp_patch.contract.errors import ConfigError, UnsupportedModelError
from atp_patch.families import FAMILIES, Family
from atp_patch.families.marks import with_marks
from atp_patch.methods import (
    BeforeDecoder,
    DoorMethod,
    LayerMethod,
    PictureMethod,
    TowerMethod,
)
from atp_patch.patching.config import PruningConfig
from atp_patch.patching.quotas import door_counts, least_of_group, quotas
from atp_patch.patching.trace import LayerTrace, PruningTrace
from atp_patch.seam import (
    LearningPass,
    MergeHooks,
    Parts,
    PerThread,
    Prefill,
    ReadingHooks,
    Recorder,
    Seam,
    ShrinkHooks,
    VisionHooks,
    decoder_shape,
)

HEADS = "atp_patch_heads"  # name of what learns, in the model
IGNORED = "_keys_to_ignore_on_save"


class ThreadState(PerThread):
    """What the running thread keeps of its passes through one patched model.

    Attributes:
        trace: what its last pass with images did.
        control: stands in for the heads, or None.
    """

    def __init__(self) -> None:
        self.trace: PruningTrace | None = None
        self.control: nn.Module | None = None


class Patch:
    """What patching one model adds to it; the seam asks it, it asks family and method."""

    def __init__(
        self,
        parts: Parts,
        family: Family,
        before: BeforeDecoder | None,
        method: LayerMethod | None,
        config: PruningConfig,
        heads: nn.Module | None,
        tower: Tower | None,
    ) -> None:
        self.parts, self.family, self.method, self.config = parts, family, method, config
        self.door = before if isinstance(before, DoorMethod) else None
        self.before = None if isinstance(before, DoorMethod) else before
        self.heads, self.tower = heads, tower
        self.layers = config.layers
        self.minimum = {
            "min_tokens": config.min_tokens,
            "min_per_image": config.min_tokens_per_image,
        }
        self.visual_token_ids = family.placeholder_ids(parts.model.config)
        self.causal, self.newline = family.causal, family.newline
        # Only the caller knows which tokens are visual.
        self.explicit = not family.token_ids and family.outer is None
        self.learned, self.rope_2d = heads is not None, config.rope_2d
        self.frozen_may_turn = False
        self.ignored_before = {k: v for k, v in vars(parts.model).items() if k == IGNORED}
        self.thread = ThreadState()
        self.seam = Seam(parts, self)

    def restore_ignored(self) -> None:
        """Give the model back its own list of what is not saved, if it had one."""
        self.parts.model.__dict__.pop(IGNORED, None)
        self.parts.model.__dict__.update(self.ignored_before)

    def grids(self, query: GridQuery) -> Sequence[Sequence[VisualGrid]]:
        """Where the grids of each sample lie, as the family says."""
        found = self.family.grids(query)
        return with_marks(found, query.spans) if self.config.prune_marks else found

    def check_budget(self, visual_tokens: int) -> None:
        """Raise BudgetError where no image of so many visual tokens could meet the budget."""
        if follows_budget(self.method, self.config):
            self.config.counts(visual_tokens)

    def vision_hooks(self, active: Callable[[], bool], recorder: Recorder) -> VisionHooks | None:
        """What prunes on the vision tower, or reads it for a method at the door."""
        if self.tower is None:
            return None
        if self.door is not None:
            return ReadingHooks(
                self.parts.base,
                self.tower,
                self.door.tower_blocks,
                active,
                recorder,
                self.reads_videos,
            )
        base, shares, least = self.parts.base, self.quotas, least_of_group(self.config)
        if isinstance(self.before, PictureMethod):
            return ShrinkHooks(base, self.tower, self.before.grid, shares, active)
        assert isinstance(self.before, TowerMethod)
        return MergeHooks(base, self.tower, self.before.merge, shares, least, active, recorder)

    def reads_videos(self) -> bool:
        """Whether the running thread has the model read videos."""
        return self.seam.videos.being_read

    def quotas(self, tokens: Sequence[int], places: Sequence[int]) -> tuple[Quota, ...] | None:
        """How many tokens each group keeps before the decoder; None: as many as it needs.

        Args:
            tokens: prunable tokens of each image, tile or frame; ``places``: its placeholders.
        """
        if self.config.method is not None:  # the budget is that of the method inside the decoder
            return None
        if not self.config.has_budget and not needs_budget(self.before):
            return None
        ids = self.seam.prompt_ids
        kinds: list[list[int]] = []  # the likeliest first: those of images come before videos'
        if ids is not None:
            kinds = [(ids == token_id).sum(1).tolist() for token_id in self.visual_token_ids]
        kinds = kinds[::-1] if self.seam.videos.being_read else kinds
        return quotas(self.config, tokens, places, kinds)

    def counts(self, step: int, run: Prefill) -> tuple[int, ...] | None:
        """How many visual tokens the budget leaves each sample at a pruning layer."""
        if not follows_budget(self.method, self.config):
            return None
        samples = zip(run.layout.grids, run.entered, run.left, strict=True)
        return tuple(
            min(self.config.counts(total, len(grids))[step], remaining)
            for grids, total, remaining in samples
        )

    def door_counts(self, run: Prefill) -> tuple[int, ...] | None:
        """How many visual tokens of each sample enter the decoder; None: as many as the method
        decides.
        """
        assert self.door is not None
        return door_counts(self.config, self.door, run.layout.grids)

    def decide_at_door(self, view: DoorView) -> Decision:
        """The choice of the method at the door."""
        assert self.door is not None
        return check_decision(self.door.decide(view), view, self.door.name)

    def check_heads(self) -> None:
        """Raise ConfigError where other heads than these would learn."""
        if hasattr(getattr(self.parts.model, HEADS, None), "modules_to_save"):
            raise ConfigError(
                f"PEFT's modules_to_save trains a copy of {HEADS} that nothing uses; leave it out, "
                f"and call model.{HEADS}.requires_grad_(True)."
            )

    def decide(self, view: View) -> Decision:
        """The method's choice."""
        assert self.method is not None
        self.check_heads()
        control = self.thread.control
        decision = self.method.decide(view, self.heads if control is None else control)
        return check_decision(decision, view, self.method.name)

    def finished(self, run: Prefill) -> None:
        """Note what a forward pass with images did."""
        layers = {}
        previous = run.layout.totals
        for layer in (0, *self.layers) if self.config.before is not None else self.layers:
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
        self.thread.trace = PruningTrace(
            layers=layers,
            layout=run.layout,
            shape=decoder_shape(self.parts.config),
            text_tokens=tuple(all_tokens - visual for all_tokens, visual in tokens),
            bytes_per_element=run.bytes_per_element,
        )

    def losses(self, run: LearningPass, output: Any) -> dict[str, tuple[float, Tensor]]:
        """What training adds to the loss; its parts go into the trace too."""
        if self.rope_2d and not self.frozen_may_turn:
            check_turned(self.family, self.parts)
        # From now on a checkpoint must hold the heads, or training could not be resumed from it.
        self.restore_ignored()
        seen = [b for b, total in enumerate(run.entered) if total]
        totals = torch.tensor([run.entered[b] for b in seen], dtype=torch.float32)
        target = self.config.goal(float(totals.mean()))
        counts = [count[seen].to(run.soft_counts[0].device) for count in run.soft_counts]
        assert self.method is not None
        trace = self.thread.trace
        assert trace is not None
        terms = self.method.step_losses(
            LearningStep(
                counts=counts,
                totals=totals.to(counts[0].device),
                layers=self.layers,
                num_layers=self.config.base.num_layers,
                target=target,
                samples=torch.tensor(seen, device=counts[0].device),
                views=run.views,
                decisions={layer: run.records[layer].decision for layer in run.views},
                output=output,
            )
        )
        parts = {name: float(loss.detach()) for name, (_, loss) in terms.items()}
        self.thread.trace = replace(trace, losses=parts)
        return terms


def follows_budget(method: LayerMethod | None, config: PruningConfig) -> bool:
    """Whether a method inside the decoder keeps the budget's counts, rather than its own."""
    if method is None:
        return False
    return method.needs_budget or (method.takes_budget and config.has_budget)


def needs_budget(method: BeforeDecoder | None) -> bool:
    """Whether what prunes before the decoder cannot decide by itself."""
    return method is not None and method.needs_budget


def check_turned(family: Family, parts: Parts, *, forced: bool = False) -> None:
    """Raise where visual tokens cannot turn with row and column.

    Raises:
        ConfigError: where no parameter of the decoder's layers learns, unless ``forced``.
        UnsupportedModelError: where they turn with more than one position already.
    """
    rope = getattr(parts.config, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        raise UnsupportedModelError(
            f"{family.name} models turn visual tokens by time, row and column already (M-RoPE); "
            "patch without rope_2d."
        )
    if not forced and not any(p.requires_grad for p in parts.layers.parameters()):
        raise ConfigError(
            "rope_2d changes what the decoder has learned, and it is frozen: let it learn (or "
            'LoRA in it), or give rope_2d="force".'
        )


def tower_read_by(family: Family, config: Any, method: DoorMethod) -> Tower | None:
    """The vision tower that a method at the door reads; None where it wants to know nothing of it.

    Raises:
        UnsupportedModelError: where the family's cannot be read, naming those that can.
    """
    if not method.tower_blocks:
        return None
    tower = family.tower(config)
    if tower is None or not tower.whole:
        # Where rows of features end in a newline, tiles are cut after the tower has made them.
        able = [f.name for f in FAMILIES if f.has_tower and f.newline is None and f is not family]
        raise UnsupportedModelError(
            f"{method.name} reads the vision tower, whose tokens cannot be followed to their "
            f"places in this {config.model_type} model; families where they can: "
            f"{', '.join(able)}. A method at the door that asks for no tower_blocks works here."
        )
    return tower


def tower_of(family: Family, config: Any, method: BeforeDecoder, asked: PruningConfig) -> Tower:
    """The vision tower that a method prunes.

    Raises:
        UnsupportedModelError: where the family's cannot be, naming those that can.
        ConfigError: where the budget cannot be shared out.
    """
    tower = family.tower(config)
    shrinks = isinstance(method, PictureMethod)
    if tower is None or (shrinks and not family.resizable):
        others = [f for f in FAMILIES if f is not family]
        able = ", ".join(f.name for f in others if f.resizable or (f.has_tower and not shrinks))
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
