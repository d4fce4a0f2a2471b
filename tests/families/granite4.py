"""Granite 4 Vision: LLaVA-NeXT's packing, and features that are added before several layers."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import SiglipVisionConfig

from tests.families.anyres import PATCH, PINPOINTS, TILE, _collate, _picture
from tests.families.kinds import TEXT, TOWER, installed
from tests.helpers import tiny

ADDED = (0, 2, 3, 4, 5, 6)  # the decoder layers before which features are added


def _granite4() -> Any:
    """Windows of 4 x 4 patches become 2 x 2 tokens, so a token is as wide as LLaVA-NeXT's patch."""
    vision = {**TOWER, "hidden_size": 64, "image_size": TILE, "patch_size": PATCH // 2}
    return transformers.Granite4VisionConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=transformers.Granite4VisionTextConfig(
            **TEXT,
            attention_multiplier=tiny.HEAD_DIM**-0.5,
            embedding_multiplier=1.5,
            residual_multiplier=0.8,
            logits_scaling=0.5,
        ),
        qformer_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 64,
            "encoder_hidden_size": 64,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        image_token_index=tiny.IMAGE,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="2/4",
        vision_feature_select_strategy="full",
        deepstack_layer_map=[[-1, ADDED[0]], [-2, ADDED[1]]],
        spatial_target_layers=list(ADDED[2:]),
        projector_dropout=0.0,
    )


KINDS = installed(
    {"Granite4Vision": ("granite4_vision", _granite4, _picture, _collate, {"placed": False})}
)
