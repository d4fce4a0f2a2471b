"""Plain data between the families and the seam, and the sizes of a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from atp_patch.contract.layout import Span


@dataclass(frozen=True)
class GridQuery:
    """What a family is given to find the grids of a prompt.

    Attributes:
        config: the config of the whole vision-language model.
        spans: for each sample, its runs of visual placeholders in order.
        position_ids: (..., B, L) int64 on the CPU, the position ids that the decoder was given, or
            None.
        ids: (B, L) int64 on the CPU, or None if only embeddings were given.
        newlines: (B, L) bool on the CPU, the visual positions that hold the model's newline
            feature; None for families without one.
        visual: (B, L) bool on the CPU, all visual positions.
        sizes: for each sample, the (frames, height, width) of its grids as the caller gave them, or
            None.
        grid_thw: the arguments "image_grid_thw" and "video_grid_thw" of the call, each (images, 3)
            int64: the frames, rows and columns of patches, in the order of the prompts. An argument
            that was not given is left out.
        sizes_given: the other arguments of the call that say how large its pictures are, in the
            order of the prompts: "image_sizes" (images, 2) int64, the height and width in pixels;
            "image_merge_sizes" and "video_merge_sizes" (images,) int64, how many patches along a
            side become one token; "image_attention_mask" (images, tiles, h, w), 1 at patches that
            are no padding; "image_position_ids" and "video_position_ids" (images or
            frames, patches, 2) int64, the column and row of each patch, -1 at padding;
            "spatial_shapes", "target_sizes" and "target_sizes_videos" (tiles or frames, 2) int64,
            rows and columns of patches. An argument that was not given is left out.
        repeats: the number of consecutive samples that share their images (beams, returned
            sequences).
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
    sizes_given: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    """How a model of another package holds a causal language model of transformers and feeds it.

    Such a model writes visual features among the embeddings itself and calls the language model
    with ``inputs_embeds``. Visual positions are found through ``embed`` or ``image_token``.

    Attributes:
        decoder: name of the attribute that holds the language model with its head.
        embed: name of the method that makes embeddings, or None. It takes (input_ids, ..., labels,
            ...) and returns (embeddings, labels, attention mask); its labels are -100 at visual
            positions.
        image_token: name of the attribute that holds the id of the placeholders in ``input_ids``,
            or None.
        mend: what errors tell the user to do with a model that does not have these.
    """

    decoder: str
    embed: str | None = None
    image_token: str | None = None
    mend: str = ""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the language decoder, from which costs are computed.

    Attributes:
        num_layers: number of decoder layers.
        hidden_size: hidden size of the decoder.
        mlp_sizes: inner size of each layer's MLP; in a mixture of experts that of all experts that
            a token visits.
        num_heads: number of query heads of each layer.
        num_kv_heads: number of key/value heads of each layer; 0 for a layer that reuses the keys
            and values of an earlier one, and for a layer that keeps a state in their place.
        head_dims: size of a head of each layer.
        vocab_size: number of logits of each position.
        states: the layers that keep a recurrent or convolution state in place of keys and values;
            its size does not depend on the number of tokens.
        mixer_weights: for each layer, number of weights in the matrices of its attention, or of
            what stands in its place; empty if they follow from the sizes of the heads.
        kv_sizes: for each layer, how many numbers it caches of one token; empty if they follow from
            the sizes of the heads.
    """

    num_layers: int
    hidden_size: int
    mlp_sizes: tuple[int, ...]
    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    vocab_size: int
    states: tuple[int, ...] = ()
    mixer_weights: tuple[int, ...] = ()
    kv_sizes: tuple[int, ...] = ()
