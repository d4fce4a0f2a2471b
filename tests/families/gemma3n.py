"""Gemma 3n: several streams of hidden states, inputs of each layer, keys that later layers reuse.

Its tower is timm's; the stand-in of the tests takes its place.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from tests.families.kinds import TEXT, Drawn, Paint, installed, stacked
from tests.families.newer import TILE, StandInTower
from tests.families.square import SIDE
from tests.helpers import tiny

OPEN, CLOSE = 6, 7
SLIDING, FULL = "sliding_attention", "full_attention"
SOFT = 1000  # the first of the ids that the towers' own vocabularies hold


class StandInVisionConfig(transformers.Gemma3nVisionConfig):
    model_type = "stand_in_gemma3n_vision"


class StandInVision(StandInTower):
    config_class = StandInVisionConfig


AutoConfig.register("stand_in_gemma3n_vision", StandInVisionConfig)
AutoModel.register(StandInVisionConfig, StandInVision)


def _gemma3n() -> Any:
    """The last three layers reuse the keys of layers 3 and 4."""
    vision = StandInVisionConfig(
        hidden_size=32,
        vocab_size=8,
        vocab_offset=SOFT,
        stand_in_patch=TILE // SIDE,
        stand_in_flat=False,
    )
    text = transformers.Gemma3nTextConfig(
        **TEXT,
        sliding_window=tiny.WINDOW,
        layer_types=[SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        num_kv_shared_layers=3,
        vocab_size_per_layer_input=tiny.VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
    )
    audio = transformers.Gemma3nAudioConfig(
        hidden_size=32,
        vocab_size=8,
        vocab_offset=SOFT + 8,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=1,
        sscp_conv_channel_size=(4, 4),
    )
    return transformers.Gemma3nConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        vision_soft_tokens_per_image=SIDE**2,
        image_token_id=tiny.IMAGE,
        audio_token_id=9,
        boi_token_id=OPEN,
        eoi_token_id=CLOSE,
    )


def _picture(config: Any, which: int, paint: Paint, count: int) -> Drawn:
    drawn = Drawn(tensors={"pixel_values": paint(TILE, TILE)[None]})
    drawn.mark(OPEN)
    drawn.square(tiny.IMAGE, 0, SIDE, SIDE)
    drawn.mark(CLOSE)
    return drawn


def _less_sharp(model: PreTrainedModel) -> None:
    """Gemma 3n does not scale attention logits by the size of a head."""
    for name, weight in model.get_decoder().named_parameters():
        if "q_norm" in name:
            weight *= 0.4


KINDS = installed(
    {
        "Gemma3n": (
            "gemma3n",
            _gemma3n,
            _picture,
            stacked("pixel_values"),
            {"adjust": _less_sharp, "layers": (1, 2, 3), "last_layer": 3},
        )
    }
)
