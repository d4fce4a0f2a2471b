"""The base class of all methods, and one class for each of the four places where they prune.

A method is a frozen dataclass. Its fields are its options: they are checked when the method is made
and written to an adapter's JSON. What a method learns is in a separate module, which ``build``
makes.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from atp_patch.contract.arguments import check_fields
from atp_patch.contract.decision import Decision
from atp_patch.contract.errors import ConfigError
from atp_patch.contract.method_learning import LearningStep, ModuleSpec
from atp_patch.contract.tower import Merge, TextEncoder, TokenGroups
from atp_patch.contract.view import DoorView, View


@dataclass(frozen=True)
class Method(ABC):
    """Base class of every method, with a name, and with its options as fields.

    A method derives from the class for the place where it prunes: :class:`PictureMethod`,
    :class:`TowerMethod`, :class:`DoorMethod` or :class:`LayerMethod`.

    Class attributes:
        name: the name that ``patch_model(method=...)`` takes.
        summary: one line for listings.
        where: the place where the method prunes: "picture", "tower", "door", "layer" or "voco".

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Every(LayerMethod):
    ...     name, summary = "every", "every so many tokens"
    ...     step: int = 2
    ...     def decide(self, view, module):
    ...         return Decision(view.token % self.step == 0)
    >>> Every(step=3).options(), Every.where
    ({'step': 3}, 'layer')
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    where: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make a class that derives from ``Method`` directly, as in 0.1, a layer method."""
        super().__init_subclass__(**kwargs)
        if "decide" in vars(cls) and not hasattr(cls, "where"):
            warnings.warn(
                f"{cls.__name__} derives from Method and decides within the decoder; derive it "
                "from atp_patch.LayerMethod.",
                DeprecationWarning,
                stacklevel=3,  # the class statement, past the metaclass
            )
            others = tuple(base for base in cls.__bases__ if base is not Method)
            cls.__bases__ = (*others, LayerMethod)

    def __post_init__(self) -> None:
        """Check that each option is of the kind that its field declares."""
        check_fields(self)

    @property
    def needs_budget(self) -> bool:
        """Whether the method must be given a number of tokens to keep.

        A method that need not be given one can decide the number itself.
        """
        return True

    @property
    def takes_budget(self) -> bool:
        """Whether the method keeps exactly the number of tokens that it is given."""
        return True

    def options(self) -> dict[str, Any]:
        """Return the fields by name, as an adapter's JSON holds them."""
        return asdict(self)


@dataclass(frozen=True)
class PictureMethod(Method):
    """Base class of methods that shrink pictures, so that the vision tower makes fewer tokens.

    >>> class Halved(PictureMethod):
    ...     name, summary = "halved", "half as many rows and columns"
    ...     def grid(self, height, width, count, minimum, *, square):
    ...         return height // 2, width // 2
    >>> Halved().grid(24, 24, 144, 1, square=True)
    (12, 12)
    """

    where: ClassVar[str] = "picture"

    @abstractmethod
    def grid(
        self, height: int, width: int, count: int, minimum: int, *, square: bool
    ) -> tuple[int, int]:
        """Return the height and width of the grid that replaces one of ``height`` x ``width``.

        Neither may be larger than before. What is returned is checked (``DecisionError``).

        Args:
            height, width: the size of the grid in tokens.
            count: number of tokens that the new grid should have approximately.
            minimum: number of tokens that it must have at least.
            square: whether the new grid must be square.
        """


@dataclass(frozen=True)
class TowerMethod(Method):
    """Base class of methods that merge the vision tower's tokens into fewer ones.

    >>> import torch
    >>> class First(TowerMethod):
    ...     name, summary = "first", "the first tokens of each image, as they are"
    ...     def merge(self, groups):
    ...         count = max(groups.counts)
    ...         places = torch.arange(groups.valid.shape[1])
    ...         keep = (places < torch.tensor(groups.counts)[:, None]) & groups.valid
    ...         index = places[:count].expand(len(keep), -1)
    ...         changed = torch.zeros_like(index, dtype=torch.bool)
    ...         return Merge(keep, index, torch.eye(keep.shape[1])[index], changed)
    >>> First().options()
    {}
    """

    where: ClassVar[str] = "tower"

    @abstractmethod
    def merge(self, groups: TokenGroups) -> Merge:
        """Choose the tokens to keep in each group, and what is merged into each of them.

        What is returned is checked (``DecisionError``).
        """


@dataclass(frozen=True)
class DoorMethod(Method):
    """Base class of methods that choose among the projected visual features, before layer 0.

    A door method that is used alone takes the budget: ``keep`` is the share of a sample's visual
    tokens that enter the decoder, ``target_tokens`` is their number. In a pair with a layer method
    the budget belongs to the layer method, and ``share`` says how many tokens enter. Without a
    ``share`` the first number of ``keep`` says so; under ``target_tokens`` so many enter that the
    layers behind the first pruning keep a third of them.

    Class attributes:
        reads_question: whether the choice may depend on the text of the prompt. Where it does not,
            an evaluation chooses once for all questions about an image.

    Attributes:
        share: the share of a sample's visual tokens that enter if ``patch_model`` is given no
            budget for this method, or None if it follows from the layer method's budget, or if
            the method itself decides how many enter.

    >>> class Loud(DoorMethod):
    ...     name, summary = "loud", "the features of the largest norm"
    ...     def decide(self, view):
    ...         norm = view.features.float().norm(dim=-1).masked_fill(~view.slot_valid, -1)
    ...         rank = norm.argsort(dim=1, descending=True).argsort(dim=1)
    ...         keep = rank < view.counts_tensor()[:, None]
    ...         return Decision(keep, scores={"norm": norm})
    >>> Loud(share=0.5).options()
    {'share': 0.5}
    """

    where: ClassVar[str] = "door"
    reads_question: ClassVar[bool] = True

    share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share} must be above 0 and at most 1, or None.")

    @property
    def tower_blocks(self) -> tuple[float, ...]:
        """The blocks of the vision tower whose attention the method needs; by default none.

        Numbers from 0 count blocks from the first; -1 is the block whose output the model uses, -2
        the block before it. A number between 0 and 1 is a share of the tower's depth: 0.25 is the
        sixth of 24 blocks. Where other blocks attend within windows, it is the nearest block that
        attends to the whole picture, the later of two equally near ones.
        """
        return ()

    @property
    def tower_queries(self) -> str:
        """Whose attention in the tower counts.

        "class" is that of the class token, or of all patches in a tower without one; "all" is the
        mean over all tokens of the tower, its class token included.
        """
        return "class"

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The CLIP model that compares the picture with the question, by default none.

        With one, ``tower_blocks`` is (-1,), and the cosines are in ``view.relevance``.
        """
        return None

    @abstractmethod
    def decide(self, view: DoorView) -> Decision:
        """Choose which of the view's visual tokens enter the decoder."""


@dataclass(frozen=True)
class LayerMethod(Method):
    """Base class of methods that prune inside the decoder, before its layers.

    Class attributes:
        depths: the pruning layers where the caller names none, as shares of the decoder's depth;
            None if they are those of every method.
        default_keep: the share that each pruning layer keeps of what reaches it where the caller
            gives no budget, or None for the common default.

    >>> class Near(LayerMethod):
    ...     name, summary = "near", "the tokens that stand closest to the question"
    ...     def attention_layers(self, layer):
    ...         return ()
    ...     def decide(self, view, module):
    ...         left = view.slot_valid.sum(1, keepdim=True)
    ...         place = view.slot_valid.cumsum(1)
    ...         return Decision(place > left - view.counts_tensor()[:, None])
    >>> Near().attention_layers(4)
    ()
    """

    where: ClassVar[str] = "layer"
    depths: ClassVar[tuple[float, ...] | None] = None
    default_keep: ClassVar[float | None] = None

    def attention_layers(self, layer: int) -> tuple[int, ...]:
        """Return the decoder layers whose attention the method needs to prune before ``layer``.

        By default this is the layer just before. A method may name earlier layers, or none, and
        then no attention is recorded for it. A layer that keeps a state in place of keys has no
        attention: the method then sees that of the last layer before it that has one.
        """
        return (layer - 1,)

    def stage_before(self) -> DoorMethod | None:
        """Return the part of a method of two stages that prunes at the decoder's door, or None."""
        return None

    @abstractmethod
    def decide(self, view: View, module: nn.Module | None) -> Decision:
        """Choose which of the view's visual tokens are kept.

        Args:
            view: what the method sees.
            module: the module that :meth:`build` made, or None.
        """

    def build(self, spec: ModuleSpec) -> nn.Module | None:
        """Make the module that holds what the method learns, or return None.

        This is also called under ``torch.device("meta")``, to find the names and shapes that an
        adapter must hold before any of its weights is read.
        """
        return None

    def losses(
        self,
        counts: Sequence[Tensor],
        totals: Tensor,
        layers: Sequence[int],
        num_layers: int,
        target: float,
    ) -> dict[str, tuple[float, Tensor]]:
        """Return losses that training adds to the host's loss, from the numbers of tokens alone.

        ``S`` is the number of samples with visual tokens.

        Args:
            counts: for each pruning layer, (S,) float with a gradient, the tokens left after it.
            totals: (S,) float, the tokens before any pruning.
            layers: the pruning layers.
            num_layers: the number of decoder layers.
            target: the number of visual tokens, averaged over all decoder layers, to aim at.

        Returns:
            For each name, the weight of the loss and the loss, a scalar tensor.
        """
        return {}

    def step_losses(self, step: LearningStep) -> dict[str, tuple[float, Tensor]]:
        """Return losses that training adds to the host's loss, from everything that a forward pass
        shows.

        By default these are the :meth:`losses`.

        Returns:
            For each name, the weight of the loss and the loss, a scalar tensor.
        """
        return self.losses(step.counts, step.totals, step.layers, step.num_layers, step.target)

    def margins(self, decision: Decision) -> Tensor:
        """Return (B, V) floating point: how far each token is above the threshold that drops it.

        The unit is that of :meth:`LearnedThresholds.shift <atp_patch.LearnedThresholds.shift>`;
        numbers above 30 and below -30 count as infinite. By default the unit is a logit: scores and
        thresholds of the same name are between 0 and 1, and a token is kept if one of its scores
        reaches its threshold.

        Raises:
            ConfigError: if no score has a threshold of the same name.
        """
        names = [name for name in decision.thresholds if name in decision.scores]
        if not names:
            raise ConfigError(
                f"{self.name} returns no score with a threshold of the same name, so its "
                "thresholds cannot be set to a budget; name them alike in its Decision, or give "
                "it margins() of its own."
            )
        return torch.stack(
            [
                decision.scores[name].double().clamp(0, 1).logit()
                - decision.thresholds[name].double().logit(eps=1e-6)[:, None]
                for name in names
            ]
        ).amax(0)
