"""Costs of a decoder: the paper's formula, exact FLOPs, and bytes of the key/value cache."""

from __future__ import annotations

from collections.abc import Sequence


def paper_layer_flops(tokens: float, hidden_size: int, mlp_size: int) -> float:
    """Return FLOPs of one layer by ATP-LLaVA's eq. 15 as printed: ``4 L D^2 + 2 L^2 D + 2 L D m``.

    The equation counts a multiply-add as one operation, and two matrices of the MLP.
    :func:`layer_flops` is exact.

    Args:
        tokens: ``L``, how many tokens the layer runs on.
        hidden_size: ``D``.
        mlp_size: ``m``, the inner size of the MLP.
    """
    return (
        4 * tokens * hidden_size**2
        + 2 * tokens**2 * hidden_size
        + 2 * tokens * hidden_size * mlp_size
    )


def paper_flops_reduction(
    tokens: float,
    kept: Sequence[float],
    layers: Sequence[int],
    num_layers: int,
    hidden_size: int,
    mlp_size: int,
) -> float:
    """Return the FLOPs that pruning saves over the whole decoder, by ATP-LLaVA's eq. 16.

    Args:
        tokens: how many tokens enter the decoder.
        kept: how many are left after each pruning layer.
        layers: the pruning layers.
        num_layers: how many layers the decoder has.
        hidden_size, mlp_size: as of :func:`paper_layer_flops`.
    """
    full = paper_layer_flops(tokens, hidden_size, mlp_size)
    ends = [*layers[1:], num_layers]
    return sum(
        (end - start) * (full - paper_layer_flops(left, hidden_size, mlp_size))
        for start, end, left in zip(layers, ends, kept, strict=True)
    )


def layer_flops(
    queries: float,
    keys: float,
    hidden_size: int,
    mlp_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    gated: bool = True,
    *,
    mixer_weights: int | None = None,
    attends: bool = True,
) -> float:
    """Return exact FLOPs of one decoder layer, with 2 for each multiply-add.

    The attention products are counted over all queries and keys, as kernels that do not skip hidden
    keys compute them. Norms, rotary embedding and softmax are left out, and so are the convolution
    and the recurrence of a layer that keeps a state in place of keys.

    Args:
        queries, keys: how many tokens attend, and how many are attended to.
        hidden_size, mlp_size: sizes of the hidden states and inside the MLP.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, and the size of one head.
        gated: the MLP has three matrices, not two.
        mixer_weights: how many weights the matrices of the attention have, or of what stands in
            its place; None where they follow from the heads.
        attends: False where queries and keys are not multiplied.
    """
    if mixer_weights is None:
        mixer_weights = hidden_size * head_dim * 2 * (num_heads + num_kv_heads)
    projections = 2 * queries * mixer_weights
    attention = 2 * 2 * queries * keys * num_heads * head_dim if attends else 0
    mlp = 2 * queries * hidden_size * mlp_size * (3 if gated else 2)
    return projections + attention + mlp


def prefill_flops(
    tokens_per_layer: Sequence[float],
    *,
    hidden_size: int,
    mlp_sizes: Sequence[int],
    num_heads: int | Sequence[int],
    num_kv_heads: int | Sequence[int],
    head_dim: int | Sequence[int],
    vocab_size: int,
    logits_rows: float = 1,
    states: Sequence[int] = (),
    mixer_weights: Sequence[int] = (),
    queries_per_layer: Sequence[float] = (),
) -> float:
    """Return exact FLOPs of a prefill of one sample, and of the head for ``logits_rows`` tokens.

    Args:
        tokens_per_layer: how many tokens enter each decoder layer, text included.
        hidden_size: the size of the hidden states.
        mlp_sizes: the inner size of each layer's MLP. In a mixture of experts it is that of all
            experts together that one token visits, and the router is left out.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, and the size of one head,
            in all layers or in each. A layer without key/value heads attends to those of an earlier
            one.
        vocab_size: how many logits the head computes for one token.
        logits_rows: how many tokens the head runs on.
        states: the layers that keep a state in place of keys.
        mixer_weights: for each layer, as of :func:`layer_flops`; empty where they follow from the
            heads.
        queries_per_layer: how many tokens each layer runs on, where some layers attend to the keys
            of more tokens than that; empty where they run on all that enter.
    """
    sizes = _of_layers(len(tokens_per_layer), num_heads, num_kv_heads, head_dim)
    layers = sum(
        layer_flops(
            queries,
            keys,
            hidden_size,
            mlp_size,
            heads,
            kv_heads,
            size,
            mixer_weights=mixer_weights[layer] if mixer_weights else None,
            attends=layer not in states,
        )
        for layer, (queries, keys, mlp_size, (heads, kv_heads, size)) in enumerate(
            zip(
                queries_per_layer or tokens_per_layer,
                tokens_per_layer,
                mlp_sizes,
                sizes,
                strict=True,
            )
        )
    )
    return layers + 2 * logits_rows * hidden_size * vocab_size


def kv_bytes(
    tokens_per_layer: Sequence[int],
    num_kv_heads: int | Sequence[int],
    head_dim: int | Sequence[int],
    bytes_per_element: int,
) -> int:
    """Return bytes of the keys and values of all layers.

    ``num_kv_heads`` and ``head_dim`` hold for all layers, or are given for each.

    ATP-LLaVA (Table 6) gives 302.4 and 75.6 MB for 576 and 144 visual tokens of LLaVA-1.5-7B in
    16 bits: both are 0.525 MB a token, where this function counts 524,288 bytes. So MB are 10^6
    bytes there, to 0.14 % (301,989,888 and 75,497,472); in units of 2^20 they would be 288 and 72.
    """
    sizes = _of_layers(len(tokens_per_layer), num_kv_heads, head_dim)
    held = zip(tokens_per_layer, sizes, strict=True)
    return 2 * sum(n * heads * size for n, (heads, size) in held) * bytes_per_element


def _of_layers(count: int, *sizes: int | Sequence[int]) -> list[tuple[int, ...]]:
    """Return the sizes of each of ``count`` layers, where each is given once or for each layer."""
    each = [[size] * count if isinstance(size, int) else size for size in sizes]
    return list(zip(*each, strict=True))
