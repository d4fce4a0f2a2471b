"""Decoders some of whose layers keep a state in place of keys: Qwen 3.5."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from tests.families.kinds import TEXT, Kind
from tests.families.mrope import ROPE, VISION, _collate, _picture
from tests.helpers import tiny

LINEAR = ["linear_attention"] * tiny.LAYERS
QWEN = [*LINEAR]
QWEN[1] = QWEN[4] = QWEN[7] = "full_attention"


# -- Qwen 3.5 --------------------------------------------------------------------------------------


def _qwen3_5(prefix: str, **text: Any) -> Any:
    make = getattr(transformers, f"{prefix}Config")
    return make(
        text_config={
            **TEXT,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
            "partial_rotary_factor": 1.0,
            "layer_types": QWEN,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            **text,
        },
        vision_config={**VISION, "num_position_embeddings": 64},
        **tiny._qwen_ids(),
    )


def _remembering(model: PreTrainedModel) -> None:
    """Norms that multiply by one more than their weight, and states that fade slowly."""
    for name, weight in model.get_decoder().named_parameters():
        if "norm" in name and "linear_attn.norm" not in name:
            weight -= 1
        elif "A_log" in name:
            weight -= 4
        elif "conv1d" in name:
            weight *= 4
        elif "linear_attn.out_proj" in name:
            weight *= 2


def _kinds() -> list[Kind]:
    """Those that the installed version of transformers has."""
    moe = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
    }
    videos = {"videos": True, "adjust": _remembering, "default_layers": (2, 5)}
    table: dict[str, tuple[Any, ...]] = {
        "Qwen3_5": ("qwen3_5", lambda: _qwen3_5("Qwen3_5"), _picture, _collate, videos),
        "Qwen3_5Moe": (
            "qwen3_5_moe",
            lambda: _qwen3_5("Qwen3_5Moe", **moe),
            _picture,
            _collate,
            videos,
        ),
    }
    kinds = []
    for prefix, (name, config, draw, collate, more) in table.items():
        model = getattr(transformers, f"{prefix}ForConditionalGeneration", None)
        if model is not None:
            kinds.append(Kind(name, model, config, draw, collate, **more))
    return kinds


KINDS = tuple(_kinds())
ROTARY_PLACES = tuple(kind for kind in KINDS if kind.draw is _picture)
