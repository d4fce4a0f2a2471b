"""Puts the third built-in model together: the tower, the decoder, and what was trained of it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from atp_patch.builtin.smol.processing import RowsProcessor, build_processor
from atp_patch.contract.errors import ConfigError, WeightsError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOWER, PROJECTOR, DOWN, UP = "tower.", "projector.", ".down", ".up"
"""Beginnings and ends of names of the weights that ship; the low-rank additions to the decoder's
matrix ``layers.0.self_attn.q_proj`` end in DOWN and UP."""


def assemble(
    folder: Path,
    base: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Mistral3ForConditionalGeneration, RowsProcessor]:
    """Load the model, in evaluation mode, and its processor.

    The low-rank additions are merged into the decoder's weights.

    Args:
        folder: the configuration and the weights of tower, projector and low-rank additions.
        base: the decoder, a GGUF file or a folder that ``save_pretrained`` wrote.
        dtype: dtype of the parameters.
        device: device of the model.

    Raises:
        ConfigError: if a file is missing, or the package gguf where it is needed.
        WeightsError: if the weights do not fit the configuration or the decoder.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} has no {name}; give the folder of the trained model.")
    decoder, tokenizer = read_decoder(base)
    config = Mistral3Config.from_dict(json.loads((folder / CONFIG).read_text("utf-8")))
    config.text_config = decoder.config
    config.image_token_id = build_processor(tokenizer).image_token_id
    model = Mistral3ForConditionalGeneration(config).float()
    stored = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
    with torch.no_grad():
        model.model.language_model.load_state_dict(decoder.model.state_dict())
        model.tie_weights()
        _fill(model.model.vision_tower, stored, TOWER)
        _fill(model.model.multi_modal_projector, stored, PROJECTOR)
        merge_additions(model.model.language_model, stored)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model = model.to(device=torch.device(device), dtype=dtype)
    return model.eval(), build_processor(tokenizer)


def read_decoder(base: Path) -> tuple[Any, Any]:
    """Load the decoder in float32, and its tokenizer.

    Args:
        base: a GGUF file or a folder that ``save_pretrained`` wrote.

    Raises:
        ConfigError: if there is nothing at the path, or the package gguf is missing.
    """
    if base.is_dir():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(base)
    if not base.is_file():
        raise ConfigError(f"there is no decoder at {base}; give a GGUF file or a model folder.")
    if find_spec("gguf") is None:  # transformers reads the file with it
        raise ConfigError(f"the package gguf is needed to read {base}; pip install gguf.")
    tokenizer = AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
    model = AutoModelForCausalLM.from_pretrained(
        base.parent,
        gguf_file=base.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, tokenizer


def merge_additions(decoder: nn.Module, stored: dict[str, Tensor]) -> None:
    """Add the products of the low-rank additions to the decoder's matrices.

    Args:
        decoder: the decoder, without its head.
        stored: (rank, in) matrices whose names end in DOWN, and (out, rank) ones that end in UP.

    Raises:
        WeightsError: if a matrix has no partner or does not fit.
    """
    matrices: dict[str, Tensor] = dict(decoder.named_parameters())
    begun = {name.removesuffix(DOWN) for name in stored if name.endswith(DOWN)}
    ended = {name.removesuffix(UP) for name in stored if name.endswith(UP)}
    for name in sorted(begun | ended):
        weight = matrices.get(f"{name}.weight")
        if name not in begun & ended or weight is None:
            raise WeightsError(f"the low-rank addition {name} is not whole, or fits no matrix.")
        product = stored[name + UP] @ stored[name + DOWN]
        if product.shape != weight.shape:
            raise WeightsError(
                f"the low-rank addition {name} is {tuple(product.shape)}, and the decoder's matrix "
                f"{tuple(weight.shape)}."
            )
        weight += product


def _fill(module: nn.Module, stored: dict[str, Tensor], start: str) -> None:
    mine = {n.removeprefix(start): value for n, value in stored.items() if n.startswith(start)}
    try:
        module.load_state_dict(mine)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise WeightsError(f"the weights {start}* do not fit the configuration: {what}") from error
