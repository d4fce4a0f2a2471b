"""What a family says about its models, and helpers that several families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atp_patch.contract import GridQuery, Outer, Span, Tower, VisualGrid
from atp_patch.contract.errors import ConfigError, UnsupportedModelError

Grids = list[list[VisualGrid]]

_PAPER_LAYERS, _PAPER_DEPTH = (4, 14, 24), 32  # where ATP-LLaVA prunes


def _unknown(config: Any) -> int | None:
    return None


def _accept(config: Any) -> None:
    return None


def _none(config: Any) -> int:
    return 0


def _no_tower(config: Any) -> Tower | None:
    return None


@dataclass(frozen=True)
class Family:
    """Facts about one family of vision-language models.

    Attributes:
        name: the name by which errors, adapters and tables call the family.
        model_types: the values of ``config.model_type`` that belong to the family.
        grids: a function that says where the grids of each sample's placeholders lie.
        token_ids: the names of the config's attributes that hold the ids of visual placeholders;
            "part.name" is an attribute of a part.
        causal: True where the decoder attends causally everywhere (it has no prefix, and images do
            not attend both ways), so that no mask is needed without padding.
        newline: the name of the parameter, in the model without its head, that ends each row of
            features. It has the image's id and belongs to no grid. None where there is none.
        visual_tokens: a function from the config to the prunable tokens of one image, or to None
            where images have different sizes.
        late_layers: a function from the config to the number of first decoder layers after which
            visual features are still added.
        check: a function that raises UnsupportedModelError for configs that the family cannot
            serve.
        tower: a function from the config to the vision tower's parts, which pruning before the
            decoder needs, or to None where the tower cannot be pruned.
        read_only: True where no method may merge the tower's tokens, in any model of the family.
        resizable: True where the tower takes pictures of any size.
        keeps_state: True where some decoder layers keep a recurrent or convolution state in place
            of keys, as the text config's ``layer_types`` say.
        told_kinds: True where the decoder is told more of each token than its embedding (whether it
            is text or of a picture, or an input of each layer), so that no token can be added.
        outer: how a model of another package holds its language model; None for models of
            transformers.
        layout: how its visual tokens lie, in a few words for tables.
    """

    name: str
    model_types: tuple[str, ...]
    grids: Callable[[GridQuery], Grids]
    token_ids: tuple[str, ...] = ("image_token_id",)
    causal: bool = True
    newline: str | None = None
    visual_tokens: Callable[[Any], int | None] = _unknown
    late_layers: Callable[[Any], int] = _none
    check: Callable[[Any], None] = _accept
    tower: Callable[[Any], Tower | None] = _no_tower
    read_only: bool = False
    resizable: bool = False
    keeps_state: bool = False
    told_kinds: bool = False
    outer: Outer | None = None
    layout: str = ""

    @property
    def has_tower(self) -> bool:
        """Whether the vision tower of at least some models of the family can be read."""
        return self.tower is not _no_tower

    @property
    def takes_voco(self) -> bool:
        """Whether learned tokens can stand behind images, in at least some models of the family.

        They cannot where images or prefixes attend both ways, where visual features are added
        inside the decoder, where a state tells later tokens of an image, where the call tells of
        each token what it is, or where another package feeds the decoder.
        """
        free = self.causal and not self.told_kinds and not self.keeps_state
        return free and self.outer is None and self.late_layers is _none

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy one of the package's own families as its name, for its rules may be
        lambdas; a family of the caller's own is pickled as any dataclass.
        """
        from atp_patch import families  # it imports this file

        if any(self is family for family in families.FAMILIES):
            return families.family_named, (self.name,)
        return super().__reduce_ex__(protocol)

    def placeholder_ids(self, config: Any) -> tuple[int, ...]:
        """Return the ids of visual placeholders in ``input_ids``."""
        ids = (_attribute(config, name) for name in self.token_ids)
        return tuple(int(token_id) for token_id in ids if token_id is not None)

    def default_layers(
        self, config: Any, num_layers: int, depths: Sequence[float] | None = None
    ) -> tuple[int, ...]:
        """Return the pruning layers where the caller names none.

        They are the paper's layers in proportion to the decoder's depth, and none comes before the
        last visual features are added. Where some layers keep a state, each is moved on to stand
        directly behind a layer that attends.

        Args:
            config: the config of the whole vision-language model.
            num_layers: how many layers its decoder has.
            depths: the layers of a method's own paper, as shares of the decoder's depth.
        """
        late = self.late_layers(config)
        latest = max(1, num_layers - 1)
        layers = {min(max(layer, late), latest) for layer in scaled_layers(num_layers, depths)}
        if self.keeps_state:
            behind = [at + 1 for at in _attending(config) if late <= at + 1 <= latest]
            layers = {min((at for at in behind if at >= n), default=behind[-1]) for n in layers}
        return tuple(sorted(layers))

    def check_layers(self, config: Any, layers: Sequence[int]) -> None:
        """Raise ConfigError where the first pruning layer comes too early for the model."""
        late = self.late_layers(config)
        if layers[0] < late:
            raise ConfigError(
                f"this model adds visual features after each of its first {late} decoder layers, "
                f"so no token can go before layer {late}; layers={list(layers)} begins earlier. "
                f"Begin at {late} or later."
            )


def _attribute(config: Any, path: str) -> Any:
    """Return an attribute of a config or of a part of it, or None where there is none."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _attending(config: Any) -> list[int]:
    """Return the decoder layers that attend, by the text config's ``layer_types``."""
    types = config.get_text_config().layer_types
    found = [at for at, kind in enumerate(types) if kind in ("full_attention", "sliding_attention")]
    if not found or found[0] + 1 >= len(types):
        raise UnsupportedModelError(
            "no layer of this decoder attends before its last one, so nothing scores its visual "
            "tokens; name layers= and a method that reads no attention (uniform, random)."
        )
    return found


def scaled_layers(num_layers: int, depths: Sequence[float] | None = None) -> list[int]:
    """Return pruning layers in proportion to ``num_layers``; by default the paper's, [4, 14, 24] of
    32.

    >>> scaled_layers(28)
    [4, 12, 21]

    Raises:
        ConfigError: where the decoder has fewer than two layers.
    """
    if num_layers < 2:
        raise ConfigError(f"a decoder of {num_layers} layers has no layer to prune before.")
    shares = [layer / _PAPER_DEPTH for layer in _PAPER_LAYERS] if depths is None else depths
    return sorted({min(max(1, round(share * num_layers)), num_layers - 1) for share in shares})


def equal_images(spans: Sequence[Span], tokens: int, mend: str) -> list[Span]:
    """Cut runs of placeholders into images of ``tokens`` each.

    One run may hold several images that follow each other directly.

    Args:
        spans: the runs of one sample.
        tokens: how many placeholders an image has.
        mend: the end of the error message, which says what the caller can do.

    Raises:
        UnsupportedModelError: where a run is no multiple of ``tokens``.
    """
    images = []
    for span in spans:
        if span.length % tokens:
            raise UnsupportedModelError(
                f"{span.length} visual tokens stand in a row, but an image of this model has "
                f"{tokens}: {mend}"
            )
        starts = range(span.start, span.stop, tokens)
        images += [Span(start, start + tokens, span.token_id) for start in starts]
    return images


def square_grids(spans: Sequence[Span], side: int) -> list[VisualGrid]:
    """Cut runs of placeholders into squares of ``side`` x ``side`` tokens."""
    mend = "let the model's own processor expand the image to placeholders."
    return [VisualGrid(tile.start, 1, side, side) for tile in equal_images(spans, side**2, mend)]
