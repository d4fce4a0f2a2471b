"""The patch of one model, which gives the seam the family's, method's and budget's answers."""

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
    LayerMethod,
    Layout,
    LearningStep,
    Merge,
    PictureMethod,
    Quota,
    TokenGroups,
    TowerMethod,
    View,
    VisualGrid,
)
from atp_patch.contract.before_decoder import check_grid, check_merge
from atp_patch.contract.decision import check_decision
from atp_patch.contract.errors import ConfigError
from atp_patch.families.marks import with_marks
from atp_patch.patching.plan import Plan, check_rope_2d, follows_budget
from atp_patch.patching.quotas import door_counts, group_minimum, quotas
from atp_patch.patching.trace import LayerTrace, PruningTrace
from atp_patch.patching.voco import VoCoPart
from atp_patch.seam import (
    Learned,
    MergeHooks,
    PerThread,
    Prefill,
    ReadingHooks,
    Recorder,
    Seam,
    ShrinkHooks,
    VisionHooks,
    VisualTokens,
    decoder_shape,
)

MODULE_NAME = "atp_patch_heads"  # name of the learned module in the model
IGNORED = "_keys_to_ignore_on_save"


class ThreadMemory(PerThread):
    """What is stored for each thread about its passes through one patched model.

    Attributes:
        trace: the trace of the thread's last pass with images, or None.
        control: a module that is used instead of the learned module, or None.
    """

    def __init__(self) -> None:
        self.trace: PruningTrace | None = None
        self.control: nn.Module | None = None


class Patch:
    """The patch of one model; it answers the seam's questions from the plan.

    Attributes:
        plan: the plan that the patch was made from.
        parts: the modules of the model.
        family: how the model's prompts are read.
        config: the configuration that an adapter's JSON holds; calibration changes its budget.
        learned_module: the module that the method learns, or None.
        layers: the pruning layers.
        attention_layers: for each pruning layer, the earlier layers whose attention the method
            reads, each with the layer that is read for it.
        view_minimums: the fields of a view that say how many tokens are kept at least, by name.
        visual_token_ids: the ids of visual placeholders; those of images come before videos'.
        causal: whether the decoder attends causally everywhere.
        newline: the name of the model's parameter that ends each row of features, or None.
        explicit: whether the caller must say which tokens are visual, since no id marks them.
        learned: whether the method inside the decoder learns a module.
        leaves_tombstones: whether tokens are dropped before or on the vision tower, which leaves
            tombstones in their place.
        chooses_at_door: whether a method chooses among features before layer 0.
        rope_2d: whether the rotary embedding of visual tokens goes by row and column.
        voco: what the seam needs to know about VoCo tokens, or None.
        thread: what is stored for the running thread.
        seam: the hooks on the model.
    """

    def __init__(self, plan: Plan) -> None:
        methods = plan.methods
        self.plan, self.parts, self.family = plan, plan.parts, plan.family
        self.config, self.layers = plan.config, plan.config.layers
        self.learned_module = plan.learned_module
        self.attention_layers = plan.attention_layers
        self.view_minimums = {
            "min_tokens": plan.config.min_tokens,
            "min_tokens_per_image": plan.config.min_tokens_per_image,
        }
        self.visual_token_ids = plan.family.placeholder_ids(plan.parts.model.config)
        self.causal, self.newline = plan.family.causal, plan.family.newline
        # Only the caller knows which tokens are visual.
        self.explicit = not plan.family.token_ids and plan.family.outer is None
        self.learned = methods.layer is not None and plan.learned_module is not None
        self.leaves_tombstones = methods.vision is not None
        self.chooses_at_door = methods.door is not None
        self.rope_2d = plan.config.rope_2d
        self._ignored_before = {k: v for k, v in vars(self.parts.model).items() if k == IGNORED}
        self.thread = ThreadMemory()
        self.voco = None if methods.voco is None else VoCoPart(methods.voco, self)
        self.seam = Seam(plan.parts, self)

    @property
    def method(self) -> LayerMethod | None:
        """The method that prunes inside the decoder."""
        return self.plan.methods.layer

    @property
    def vision_method(self) -> PictureMethod | TowerMethod | None:
        """The method that prunes pictures or tokens of the vision tower."""
        return self.plan.methods.vision

    @property
    def _door_follows(self) -> bool:
        """Whether a door method lets in as many tokens as the budget of a layer method says."""
        door = self.plan.methods.door
        return door is not None and door.share is None and door.needs_budget

    def restore_ignored(self) -> None:
        """Restore the model's list of keys that are not saved, if it had one."""
        self.parts.model.__dict__.pop(IGNORED, None)
        self.parts.model.__dict__.update(self._ignored_before)

    def grids(self, query: GridQuery) -> Sequence[Sequence[VisualGrid]]:
        """Find the grids of each sample."""
        found = self.family.grids(query)
        return with_marks(found, query.spans) if self.config.prune_marks else found

    def check_budget(self, visual_tokens: int) -> None:
        """Raise BudgetError if no image of so many visual tokens can meet the budget."""
        if not follows_budget(self.method, self.config):
            return
        door, entered = self.plan.methods.door, None
        if door is not None:
            image = VisualGrid(start=0, frames=1, height=1, width=visual_tokens)
            entered = door_counts(self.config, door, [[image]])
        whole = visual_tokens if self._door_follows else None
        self.config.counts(visual_tokens if entered is None else entered[0], whole=whole)

    def vision_hooks(self, active: Callable[[], bool], recorder: Recorder) -> VisionHooks | None:
        """Make the hooks that prune the vision tower or read it for a door method."""
        plan, methods = self.plan, self.plan.methods
        if plan.vision is None:
            return None
        if methods.door is not None:
            return ReadingHooks(
                self.parts.base,
                plan.vision,
                methods.door,
                active,
                recorder,
                self.reads_videos,
            )
        base, shares, minimum = self.parts.base, self.quotas, group_minimum(self.config)
        if methods.picture is not None:
            return ShrinkHooks(base, plan.vision, self.smaller_grid, shares, active)
        return MergeHooks(base, plan.vision, self.merge, shares, minimum, active, recorder)

    def smaller_grid(
        self, height: int, width: int, count: int, minimum: int, *, square: bool
    ) -> tuple[int, int]:
        """Return the checked grid of the picture method."""
        picture = self.plan.methods.picture
        assert picture is not None
        grid = picture.grid(height, width, count, minimum, square=square)
        return check_grid(grid, height, width, minimum, square=square, method=picture.name)

    def merge(self, groups: TokenGroups) -> Merge:
        """Return the checked merge of the tower method."""
        tower = self.plan.methods.tower
        assert tower is not None
        return check_merge(tower.merge(groups), groups, tower.name)

    def reads_videos(self) -> bool:
        """Return whether the model reads videos in the running thread."""
        return self.seam.videos.being_read

    def quotas(
        self, tokens: Sequence[int], placeholders: Sequence[int]
    ) -> tuple[Quota, ...] | None:
        """Return how many tokens each group keeps on the tower, or None if the method decides.

        Args:
            tokens: number of prunable tokens of each image, tile or frame.
            placeholders: number of placeholders of each image, tile or frame.
        """
        if self.config.method is not None:  # the budget belongs to the method inside the decoder
            return None
        method = self.vision_method
        if not self.config.has_budget and not (method and method.needs_budget):
            return None
        ids = self.seam.thread.prompt_ids
        kinds: list[list[int]] = []  # ids of images come before ids of videos
        if ids is not None:
            kinds = [(ids == token_id).sum(1).tolist() for token_id in self.visual_token_ids]
        kinds = kinds[::-1] if self.reads_videos() else kinds
        return quotas(self.config, tokens, placeholders, kinds)

    def counts(
        self, step: int, layout: Layout, entered: tuple[int, ...], left: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """Return how many visual tokens the budget keeps in each sample at a pruning layer.

        Args:
            step: the number of the pruning layer among all pruning layers, from 0.
            layout: the visual tokens before any pruning.
            entered: for each sample, how many visual tokens entered the decoder.
            left: for each sample, how many visual tokens are left.

        Returns:
            A number for each sample, or None if the method decides.
        """
        if not follows_budget(self.method, self.config):
            return None
        follows = self._door_follows
        samples = zip(layout.grids, layout.totals, entered, left, strict=True)
        return tuple(
            min(self.config.counts(total, len(grids), prompt if follows else None)[step], remaining)
            for grids, prompt, total, remaining in samples
        )

    def door_counts(self, layout: Layout) -> tuple[int, ...] | None:
        """Return how many visual tokens of each sample enter, or None if the method decides."""
        door = self.plan.methods.door
        assert door is not None
        return door_counts(self.config, door, layout.grids)

    def decide_at_door(self, view: DoorView) -> Decision:
        """Return the checked decision of the door method."""
        door = self.plan.methods.door
        assert door is not None
        if self.plan.clip is not None:
            view = replace(view, relevance=self.plan.clip.of(view))
        return check_decision(door.decide(view), view, door.name)

    def check_module_trains(self) -> None:
        """Raise ConfigError if PEFT would train only a copy of the learned module."""
        if hasattr(getattr(self.parts.model, MODULE_NAME, None), "modules_to_save"):
            raise ConfigError(
                f"PEFT's modules_to_save trains a copy of {MODULE_NAME} that nothing uses; leave "
                f"it out, and call model.{MODULE_NAME}.requires_grad_(True)."
            )

    def decide(self, view: View) -> Decision:
        """Return the checked decision of the layer method."""
        assert self.method is not None
        self.check_module_trains()
        control = self.thread.control
        decision = self.method.decide(view, self.learned_module if control is None else control)
        return check_decision(decision, view, self.method.name)

    def finished(self, prefill: Prefill) -> None:
        """Store the trace of a forward pass with images."""
        layers, layout, tokens = {}, prefill.layout, prefill.tokens
        whole = VisualTokens.all_of(layout)
        previous = layout.totals
        for layer in (0, *self.layers) if self.config.before is not None else self.layers:
            choice = tokens.choices.get(layer)
            if choice is not None:
                previous = choice.kept
            seen, alive = whole if choice is None else choice.tokens, tokens.survivors(layer)
            layers[layer] = LayerTrace(
                layout=layout,
                kept_counts=previous,
                decision=None if choice is None else choice.decision,
                token=seen.token,
                token_valid=seen.valid,
                alive=None if alive is None else (alive.index, alive.valid),
                attended=tokens.attended,
            )
        counts = zip(prefill.prompt_tokens, layout.totals, strict=True)
        rows = prefill.rows
        self.thread.trace = PruningTrace(
            layers=layers,
            layout=layout,
            shape=decoder_shape(self.parts.config, self.parts.layers),
            text_tokens=tuple(all_tokens - visual for all_tokens, visual in counts),
            bytes_per_element=prefill.embeds.element_size(),
            last_rows=None if rows is None else (self.parts.first_reusing_layer, rows),
        )

    def losses(
        self, prefill: Prefill, learned: Learned, output: Any
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the losses that training adds, and store their values in the trace."""
        if self.rope_2d and not self.plan.rope_2d_forced:
            check_rope_2d(self.family, self.parts)
        # From now on a checkpoint must hold the learned module, so that training can be resumed.
        self.restore_ignored()
        entered, soft_counts = prefill.entered, learned.soft_counts
        seen = [b for b, total in enumerate(entered) if total]
        totals = torch.tensor([entered[b] for b in seen], dtype=torch.float32)
        target = self.config.goal(float(totals.mean()))
        counts = [count[seen].to(soft_counts[0].device) for count in soft_counts]
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
                views=learned.views,
                decisions={n: prefill.tokens.choices[n].decision for n in learned.views},
                output=output,
            )
        )
        parts = {name: float(loss.detach()) for name, (_, loss) in terms.items()}
        self.thread.trace = replace(trace, losses=parts)
        return terms
