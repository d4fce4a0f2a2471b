"""Finding the parts of a loaded model, and checking that the seam can hook into them."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import cache_utils

from atp_patch.contract import DecoderShape, Outer
from atp_patch.contract.errors import ConfigError, UnsupportedModelError
from atp_patch.seam.host.embedding import embeds_itself


@dataclass
class Parts:
    """The modules that the seam hooks into.

    Attributes:
        model: the model that the user holds.
        top: the module that is given labels and generates, which is ``model`` or its language
            model.
        base: the model without its head, which is given images and ids.
        decoder: the module with ``.layers``.
        layers: the decoder's layers.
        key_layers: for each of them the number of the layer whose keys it attends to, which is an
            earlier one where layers share keys.
        outer: how ``model`` feeds its language model where it is of another package, else None.
        attending: the numbers of the layers that attend. The others keep a state in place of keys.
    """

    model: Any
    top: Any
    base: Any
    decoder: Any
    layers: Any
    key_layers: tuple[int, ...]
    outer: Outer | None = None
    attending: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        numbers = range(len(self.layers))
        self.attending = tuple(number for number in numbers if attends(self.layers[number]))

    @property
    def config(self) -> Any:
        """The text config of the decoder."""
        return self.decoder.config

    @property
    def keeps_state(self) -> bool:
        """Whether some layers keep a recurrent or convolution state in place of keys."""
        return len(self.attending) < len(self.layers)

    @property
    def first_reusing_layer(self) -> int:
        """The first layer that reuses the keys of an earlier one; the number of layers if none."""
        reusing = [layer for layer, keys in enumerate(self.key_layers) if keys != layer]
        return min([len(self.layers), *reusing])

    @property
    def last_prunable_layer(self) -> int:
        """The last layer before which tokens may go.

        Where later layers reuse the keys of an earlier one, that layer must run on the survivors
        already.
        """
        producers = [keys for layer, keys in enumerate(self.key_layers) if keys != layer]
        return min([len(self.layers) - 1, *producers])


# Types of layers that keep a state in place of keys, as ``config.layer_types`` calls them. Their
# mask is (B, L), and zeroes what enters them at padding.
_STATES = ("linear_attention", "conv")


def attends(layer: Any) -> bool:
    """Return whether a decoder layer has an attention, and so keys."""
    return hasattr(layer, "self_attn")


def decoder_shape(config: Any, layers: Iterable[nn.Module] = ()) -> DecoderShape:
    """Read the decoder's sizes from its text config, those of heads for each layer by itself.

    Args:
        config: the text config.
        layers: the decoder's layers; without them all are taken to attend.
    """
    count = config.num_hidden_layers
    configs, layers = _layer_configs(config), tuple(layers)
    states = tuple(number for number, layer in enumerate(layers) if not attends(layer))
    own = count - (getattr(config, "num_kv_shared_layers", None) or 0)
    heads = [int(layer.num_attention_heads) for layer in configs]
    kv_heads = [
        getattr(layer, "num_key_value_heads", None) or n
        for layer, n in zip(configs, heads, strict=True)
    ]
    sizes = [_head_dim(layer, n) for layer, n in zip(configs, heads, strict=True)]
    latent = getattr(config, "kv_lora_rank", None)
    # Early versions of transformers expand the latents of keys and values before they cache them.
    cached = all(hasattr(layer.self_attn, "expand_kv") for layer in layers if attends(layer))
    compressed = (latent + config.qk_rope_head_dim,) * count if latent and cached else ()
    held = (layer < own and layer not in states for layer in range(count))
    return DecoderShape(
        num_layers=count,
        hidden_size=config.hidden_size,
        mlp_sizes=_mlp_sizes(config),
        num_heads=tuple(heads),
        num_kv_heads=tuple(n if here else 0 for n, here in zip(kv_heads, held, strict=True)),
        head_dims=tuple(sizes),
        vocab_size=config.vocab_size,
        states=states,
        mixer_weights=tuple(map(_mixer_weights, layers)) if states or latent else (),
        kv_sizes=compressed,
    )


def _head_dim(config: Any, heads: int) -> int:
    """Return the size of a head, or the mean of a key's and a value's size where these differ."""
    if getattr(config, "kv_lora_rank", None):
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
        return int(key + config.v_head_dim) // 2
    return int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _mixer_weights(layer: Any) -> int:
    """Count the weights in the matrices of a layer's attention, or of what stands in its place."""
    mixers = (getattr(layer, name, None) for name in ("self_attn", "linear_attn", "conv"))
    mixer: nn.Module = next(mixer for mixer in mixers if mixer is not None)
    return sum(
        module.in_features * module.out_features
        for module in mixer.modules()
        if isinstance(module, nn.Linear)
    )


def _layer_configs(config: Any) -> list[Any]:
    """Return for each layer the config that its sizes are read from.

    A config whose layers differ does not give such sizes itself, and has one config a layer. In
    early versions of transformers it names the sizes of Gemma 4's full layers apart.
    """
    count = config.num_hidden_layers
    if getattr(config, "is_heterogeneous", False):
        return [config.per_layer_config[layer] for layer in range(count)]
    if not getattr(config, "global_head_dim", None):
        return [config] * count
    full = copy(config)
    full.head_dim = config.global_head_dim
    if config.attention_k_eq_v:
        full.num_key_value_heads = config.num_global_key_value_heads
    return [full if kind == "full_attention" else config for kind in config.layer_types]


def _mlp_sizes(config: Any) -> tuple[int, ...]:
    """Return the inner size of each layer's MLP, for costs.

    In a mixture of experts it is that of all experts that a token visits, under whichever names the
    config has for them.
    """

    def option(*names: str) -> Any:
        found = (getattr(config, name, None) for name in names)
        value = next((value for value in found if value is not None), 0)
        return value[0] if isinstance(value, (list, tuple)) and value else value

    layers = range(config.num_hidden_layers)
    if getattr(config, "use_double_wide_mlp", False):  # in layers that reuse keys
        own = config.num_hidden_layers - config.num_kv_shared_layers
        return tuple(option("intermediate_size") * (1 if k < own else 2) for k in layers)
    if getattr(config, "enable_moe_block", False):  # experts beside the dense MLP
        beside = config.top_k_experts * config.moe_intermediate_size
        return (option("intermediate_size") + beside,) * len(layers)
    listed = getattr(config, "moe_layers", None)
    if listed is not None and hasattr(config, "interleave_moe_layer_step"):  # with a shared expert
        sparse = (config.num_experts_per_tok + 1) * config.intermediate_size
        return tuple(sparse if k in listed else config.intermediate_size_mlp for k in layers)
    dense = option("intermediate_size_mlp", "intermediate_size")
    visited = option("num_experts_per_tok", "moe_topk", "moe_k")
    if not visited:
        return (_adjusted(config, option("intermediate_size")),) * len(layers)
    size = option("moe_intermediate_size", "intermediate_size")
    shared = option("n_shared_experts", "moe_num_shared_experts")
    sparse = (visited + shared) * size
    sparse += option("shared_expert_intermediate_size", "share_expert_dim")
    types = getattr(config, "mlp_layer_types", None)
    if types is not None:
        return tuple(dense if kind == "dense" else sparse for kind in types)
    first = option("first_k_dense_replace", "moe_layer_start_index")
    step = option("decoder_sparse_step", "moe_layer_interval") or 1
    alone = getattr(config, "mlp_only_layers", None) or ()
    return tuple(dense if k < first or k in alone or (k + 1) % step else sparse for k in layers)


def _adjusted(config: Any, size: int) -> int:
    """Return the inner size of an MLP, which LFM2 computes from the one in its config."""
    if not getattr(config, "block_auto_adjust_ff_dim", False):
        return size
    size = int(2 * size / 3)
    if config.block_ffn_dim_multiplier is None:
        return size
    size, step = int(config.block_ffn_dim_multiplier * size), config.block_multiple_of
    return int(-(-size // step) * step)


def locate(model: Any, outer: Outer | None = None, *, bare: bool = False) -> Parts:
    """Find base model, decoder and layers of a vision-language model.

    Args:
        outer: how it holds its language model, where it is of another package than transformers.
        bare: it may be a language model alone, which is given embeddings.

    Raises:
        UnsupportedModelError: where the model has no such parts or its layers keep another
            contract.
    """
    name = type(model).__name__
    if outer is not None:
        return _inside(model, name, outer)
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{name} is not a transformers model; load one with "
            "AutoModelForImageTextToText.from_pretrained(...)."
        )
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    decoder, layers = _decoder(model)
    bare = bare or embeds_itself(decoder)
    if not isinstance(layers, nn.ModuleList) or (decoder is base and not bare):
        raise UnsupportedModelError(
            f"{name} has no language decoder apart from its vision model: nothing to prune. "
            "Give a vision-language model."
        )
    _check_layers(name, decoder)
    return Parts(model, model, base, decoder, layers, _key_layers(layers))


def check_uncompiled(parts: Parts, around: Iterable[nn.Module] = ()) -> None:
    """Raise ConfigError where a part or a wrapper is compiled: what was traced before knows
    nothing of hooks.
    """
    modules = (*around, parts.model, parts.top, parts.base, parts.decoder, *parts.layers)
    for module in modules:
        forward = vars(module).get("forward")
        wrapped = hasattr(forward, "_torchdynamo_orig_callable")
        if (
            hasattr(module, "_orig_mod")
            or getattr(module, "_compiled_call_impl", None) is not None
            or (wrapped and not getattr(forward, "_torchdynamo_disable", False))
        ):
            raise ConfigError(
                f"{type(module).__name__} is compiled: patch the model first, then compile it."
            )


def _inside(model: Any, name: str, outer: Outer) -> Parts:
    """Return the parts of a model of another package, which is the top itself or holds its language
    model.
    """
    wanted = [name for name in (outer.decoder, outer.embed, outer.image_token) if name is not None]
    missing = [attribute for attribute in wanted if not hasattr(model, attribute)]
    if missing:
        raise UnsupportedModelError(f"{name} has no {' and no '.join(missing)}: {outer.mend}")
    language_model = getattr(model, outer.decoder)
    decoder, layers = _decoder(language_model)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"the {outer.decoder} of {name} is no causal language model of transformers: "
            f"{outer.mend}"
        )
    _check_layers(name, decoder)
    keys = _key_layers(layers)
    if outer.embed is None:
        return Parts(model, model, language_model, decoder, layers, keys, outer)
    return Parts(model, language_model, decoder, decoder, layers, keys, outer)


def _decoder(model: Any) -> tuple[Any, Any]:
    """Return the decoder and its ``layers``, None where it has none."""
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers") and hasattr(decoder, "model"):
        decoder = decoder.model
    return decoder, getattr(decoder, "layers", None)


def _key_layers(layers: nn.ModuleList) -> tuple[int, ...]:
    """Return for each layer the number of the layer whose keys it attends to, or its own without
    keys.

    A layer that reuses keys attends to those of the last layer of its kind that makes its own.
    """
    found: list[int] = []
    latest: dict[str | None, int] = {}
    for number, layer in enumerate(layers):
        if not attends(layer):
            found.append(number)
            continue
        kind = getattr(layer.self_attn, "layer_type", None)
        if not getattr(layer.self_attn, "is_kv_shared_layer", False):
            latest[kind] = number
        found.append(latest[kind])
    return tuple(found)


def _check_layers(name: str, decoder: Any) -> None:
    types = getattr(decoder.config, "layer_types", None) or ()
    for idx, layer in enumerate(decoder.layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None and types[idx : idx + 1] and types[idx] in _STATES:
            if not hasattr(cache_utils, "LinearAttentionCacheLayerMixin"):
                raise UnsupportedModelError(
                    f"this version of transformers holds the states of {name} in a cache of its "
                    "own, which cannot hold a pruned prompt; install transformers >= 5.5."
                )
            continue
        if attention is None or not hasattr(attention, "config"):
            raise UnsupportedModelError(
                f"layer {idx} of {name} has no self_attn that reads its attention function from a "
                f"config, and its config does not call it one of {', '.join(_STATES)}, so nothing "
                "is known of what it keeps of a token."
            )
