"""Costs of a decoder: the papers' formula, exact FLOPs, bytes of the key/value cache."""

from __future__ import annotations

from collections.abc import Sequence


def paper_layer_flops(tokens: float, hidden_size: int, mlp_size: int) -> float:
    """Eq. 15 as printed: ``4 L D^2 + 2 L^2 D + 2 L D m``.

    It counts a multiply-add as one and two MLP matrices; :func:`layer_flops` is exact.
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
    """Eq. 16: what pruning from ``tokens`` to ``kept`` at ``layers`` saves over the decoder."""
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
) -> float:
    """Exact FLOPs of one decoder layer: 2 a multiply-add, grouped key/value heads, gated MLP.

    The attention products are counted over all queries and keys, as kernels without causal skipping
    compute them. Norms, rotary embedding and softmax are left out.
    """
    projections = 2 * queries * hidden_size * head_dim * 2 * (num_heads + num_kv_heads)
    attention = 2 * 2 * queries * keys * num_heads * head_dim
    mlp = 2 * queries * hidden_size * mlp_size * (3 if gated else 2)
    return projections + attention + mlp


def prefill_flops(
    tokens_per_layer: Sequence[float],
    *,
    hidden_size: int,
    mlp_sizes: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    vocab_size: int,
    logits_rows: float = 1,
) -> float:
    """Exact FLOPs of a prefill of one sample, and of the head for ``logits_rows`` tokens.

    Args:
        tokens_per_layer: tokens that enter each decoder layer, text included.
        mlp_sizes: of each layer; of a mixture, the experts together that a token visits. What
            chooses them is left out.
    """
    layers = sum(
        layer_flops(n, n, hidden_size, mlp_size, num_heads, num_kv_heads, head_dim)
        for n, mlp_size in zip(tokens_per_layer, mlp_sizes, strict=True)
    )
    return layers + 2 * logits_rows * hidden_size * vocab_size


def kv_bytes(
    tokens_per_layer: Sequence[int], num_kv_heads: int, head_dim: int, bytes_per_element: int
) -> int:
    """Bytes of keys and values over all layers.

    ATP-LLaVA (Table 6) gives 302.4 and 75.6 MB for 576 and 144 visual tokens of LLaVA-1.5-7B in
    16 bits: both are 0.525 MB a token, where this function counts 524,288 bytes. So MB are 10^6
    bytes there, to 0.14 % (301,989,888 and 75,497,472); in units of 2^20 they would be 288 and 72.
    """
    return 2 * sum(tokens_per_layer) * num_kv_heads * head_dim * bytes_per_element
