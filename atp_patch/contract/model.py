"""What families say and are asked about a model, and the sizes of its decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from atp_patch.contract.layout import Span


@dataclass(frozen=True)
class GridQuery:
    """What a family may look at to say where the grids lie.

    Attributes:
        config: the config of the whole vision-language model.
        spans: for each sample, its runs of visual placeholders in order.
        position_ids: (..., B, L) int64 on the CPU as the decoder got them, or None.
        ids: (B, L) int64 on the CPU, or None where only embeddings were given.
        newlines: (B, L) bool on the CPU, the visual places that hold the model's newline feature;
            None for families without one.
        visual: (B, L) bool on the CPU, the visual places.
        sizes: for each sample the (frames, height, width) that the caller gave, or None.
        grid_thw: "image_grid_thw" and "video_grid_thw", each (images, 3) int64, where the call
            brought them: the frames, rows and columns of patches, in the order of the prompts.
        repeats: how many samples in a row share their images (beams, returned sequences).
    """

    config: object
    spans: Sequence[Sequence[Span]]
    position_ids: Tensor | None
    ids: Tensor | None = None
    newlines: Tensor | None = None
    visual: Tensor | None = None
    sizes: Sequence[Sequence[tuple[int, int, int]]] | None = None
    grid_thw: Mapping[str, Tensor] = field(default_factory=dict)
    repeats: int = 1


@dataclass(frozen=True)
class Outer:
    """How a model of another package holds a causal language model of transformers and feeds it.

    It writes visual features among the embeddings itself and calls the language model with
    ``inputs_embeds``, so one of the two last attributes says how visual positions are known.

    Attributes:
        decoder: its attribute that holds the language model, head included.
        embed: its method (input_ids, ..., labels, ...) -> (embeddings, labels, attention mask), of
            which the labels are -100 at visual positions; or None.
        image_token: its attribute that holds the id of the placeholders in ``input_ids``; or None.
        mend: what to do with an object that does not have these.
    """

    decoder: str
    embed: str | None = None
    image_token: str | None = None
    mend: str = ""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the language decoder, for costs: of an MLP of experts, those that a token visits."""

    num_layers: int
    hidden_size: int
    mlp_sizes: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
