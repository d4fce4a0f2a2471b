"""What a family file says about its models, and the registry of families."""

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
        name: what errors, adapters and tables call it.
        model_types: ``config.model_type`` values that belong to it.
        grids: where the grids of each sample's placeholders lie.
        token_ids: config attributes that hold the ids of visual placeholders.
        causal: whether the decoder attends causally everywhere (no prefix, no images attending both
            ways), so that without padding no mask is needed.
        newline: name of the parameter of the model without its head that stands at the end of rows
            of features, under the image's id; it belongs to no grid.
        visual_tokens: prunable tokens of one image where the config alone fixes them, else None.
        late_layers: after how many of the first decoder layers visual features are still added.
        check: raises UnsupportedModelError for configs that the family cannot serve.
        tower: where its vision tower is for pruning before the decoder, None where it cannot.
        resizable: its tower takes pictures of any size.
        outer: how a model of another package holds its language model; None for transformers' own.
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
    resizable: bool = False
    outer: Outer | None = None

    @property
    def has_tower(self) -> bool:
        """Whether models of the family, or some, can be pruned before the decoder."""
        return self.tower is not _no_tower

    @property
    def compressible(self) -> bool:
        """Whether learned tokens can stand behind images, in models of the family or in some.

        Not where images or prefixes attend both ways, where visual features are added inside the
        decoder, or where another package feeds it.
        """
        return self.causal and self.outer is None and self.late_layers is _none

    def placeholder_ids(self, config: Any) -> tuple[int, ...]:
        """The ids of visual placeholders in ``input_ids``."""
        ids = (getattr(config, name, None) for name in self.token_ids)
        return tuple(int(token_id) for token_id in ids if token_id is not None)

    def default_layers(self, config: Any, num_layers: int) -> tuple[int, ...]:
        """Where tokens are pruned if nobody says so: the paper's layers in proportion to the depth,
        and none before the last visual features are added.

        Args:
            config: of the whole vision-language model.
            num_layers: of its decoder.
        """
        late = self.late_layers(config)
        latest = max(1, num_layers - 1)
        places = {min(max(layer, late), latest) for layer in scaled_layers(num_layers)}
        return tuple(sorted(places))

    def check_layers(self, config: Any, layers: Sequence[int]) -> None:
        """Raise ConfigError where the first pruning layer comes too early for the model."""
        late = self.late_layers(config)
        if layers[0] < late:
            raise ConfigError(
                f"this model adds visual features after each of its first {late} decoder layers, "
                f"so no token can go before layer {late}; layers={list(layers)} begins earlier. "
                f"Begin at {late} or later."
            )


def scaled_layers(num_layers: int) -> list[int]:
    """The paper's [4, 14, 24] of 32 in proportion for a decoder of ``num_layers``.

    >>> scaled_layers(28)
    [4, 12, 21]

    Raises:
        ConfigError: where the decoder has fewer than two layers.
    """
    if num_layers < 2:
        raise ConfigError(f"a decoder of {num_layers} layers has no layer to prune before.")
    layers = {
        min(max(1, round(i * num_layers / _PAPER_DEPTH)), num_layers - 1) for i in _PAPER_LAYERS
    }
    return sorted(layers)


def equal_images(spans: Sequence[Span], tokens: int, mend: str) -> list[Span]:
    """Cut runs of placeholders into images of ``tokens`` each (images may follow each other
    directly).

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
    """Runs of placeholders as squares of ``side`` x ``side`` tokens, one after the other."""
    mend = "let the model's own processor expand the image to placeholders."
    return [VisualGrid(tile.start, 1, side, side) for tile in equal_images(spans, side**2, mend)]
