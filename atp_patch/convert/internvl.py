"""Conversion of InternVL-2 with a Qwen2 or LLaMA language model to transformers' ``internvl``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers  # which loads a class of its own when it is used
from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Qwen2Config

from atp_patch.contract.errors import ConfigError, UnsupportedModelError
from atp_patch.convert.configs import config_of
from atp_patch.convert.plan import Plan, Rule
from atp_patch.convert.processors import (
    INTERNVL_TOKENS,
    save_generation_config,
    save_internvl_processor,
    tokenizer_of,
)
from atp_patch.convert.source import Source, read_json

BACKBONES = {"qwen2": Qwen2Config, "llama": LlamaConfig}
CONTEXT = INTERNVL_TOKENS["context_image_token"]
IMAGE_WORDS = [word for role, word in INTERNVL_TOKENS.items() if role != "video_token"]

_LAYER, _NEW = r"vision_model\.encoder\.layers\.(\d+)\.", r"vision_tower.encoder.layer.\1."
RULES = (
    Rule(r".*\.(?:position_ids|rotary_emb\.inv_freq)"),
    Rule(r"language_model\.(model\..+|lm_head\.weight)", (r"language_model.\1",)),
    Rule(r"mlp1\.0\.(weight|bias)", (r"multi_modal_projector.layer_norm.\1",)),
    Rule(r"mlp1\.1\.(weight|bias)", (r"multi_modal_projector.linear_1.\1",)),
    Rule(r"mlp1\.3\.(weight|bias)", (r"multi_modal_projector.linear_2.\1",)),
    Rule(r"vision_model\.embeddings\.class_embedding", ("vision_tower.embeddings.cls_token",)),
    Rule(
        r"vision_model\.embeddings\.position_embedding",
        ("vision_tower.embeddings.position_embeddings",),
    ),
    Rule(
        r"vision_model\.embeddings\.patch_embedding\.(weight|bias)",
        (r"vision_tower.embeddings.patch_embeddings.projection.\1",),
    ),
    Rule(
        _LAYER + r"attn\.qkv\.(weight|bias)",
        tuple(_NEW + rf"attention.{part}_proj.\2" for part in "qkv"),
    ),
    Rule(_LAYER + r"attn\.([qk]_norm)\.weight", (_NEW + r"attention.\2.weight",)),
    Rule(_LAYER + r"attn\.proj\.(weight|bias)", (_NEW + r"attention.projection_layer.\2",)),
    Rule(_LAYER + r"norm1\.(weight|bias)", (_NEW + r"layernorm_before.\2",)),
    Rule(_LAYER + r"norm2\.(weight|bias)", (_NEW + r"layernorm_after.\2",)),
    Rule(_LAYER + r"ls([12])", (_NEW + r"lambda_\2",)),
    Rule(_LAYER + r"mlp\.(fc[12])\.(weight|bias)", (_NEW + r"mlp.\2.\3",)),
)


def internvl_plan(folder: Path) -> Plan:
    """Plan how a checkpoint of InternVL-2 is converted.

    Raises:
        ATPError: naming what is wrong with the folder and the mend.
    """
    old = read_json(folder / "config.json", "the folder of a whole checkpoint")
    _check(old)
    text = config_of(BACKBONES[old["llm_config"]["model_type"]], old["llm_config"])
    vision = _vision_config(old)
    # Where the output head shares the embeddings, the head in the file is a copy of them.
    tied = bool(text.tie_word_embeddings)
    tokenizer = _tokenizer(folder, text.vocab_size)
    ratio = float(old.get("downsample_ratio", 0.5))
    side = vision.image_size[0]
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=int(tokenizer.convert_tokens_to_ids(CONTEXT)),
        image_seq_length=round(side // vision.patch_size[0] * ratio) ** 2,
        downsample_ratio=ratio,
        vision_feature_layer=int(old.get("select_layer", -1)),
        tie_word_embeddings=tied,
    )
    notes = [
        f"chat_template.jinja cannot be derived from the template {old.get('template')!r} that "
        f"config.json names; add one in which an image reads {CONTEXT}."
    ]
    tiles = (int(old.get("min_dynamic_patch", 1)), int(old.get("max_dynamic_patch", 12)))

    def save_more(out: Path) -> None:
        save_generation_config(folder, out, text, [], notes)
        save_internvl_processor(out, tokenizer, config, side, tiles)

    head = r"language_model\.lm_head\.weight"
    return Plan(
        architecture=transformers.InternVLForConditionalGeneration,
        config=config,
        sources=[Source(folder)],
        rules=(Rule(head), *RULES) if tied else RULES,
        save_more=save_more,
        notes=notes,
    )


def _check(old: Mapping[str, Any]) -> None:
    name = next(iter(old.get("architectures") or ()), None)
    if name != "InternVLChatModel" or not {"llm_config", "vision_config"} <= set(old):
        raise UnsupportedModelError(
            f"config.json is of architecture {name}; InternVLChatModel with llm_config and "
            "vision_config can be converted. Checkpoints whose name ends in -hf need no conversion."
        )
    backbone = old["llm_config"].get("model_type")
    if backbone not in BACKBONES:
        raise UnsupportedModelError(
            f"its language model is of type {backbone!r}, which transformers does not have; "
            f"checkpoints with {' or '.join(BACKBONES)} can be converted."
        )
    if old.get("ps_version", "v1") != "v2":
        raise UnsupportedModelError(
            f"ps_version {old.get('ps_version')!r} orders the patches of a token differently "
            "from transformers; only v2 can be converted (InternVL-2 and later)."
        )
    vision = old["vision_config"]
    size = old.get("force_image_size") or vision["image_size"]
    if size != vision["image_size"]:
        raise UnsupportedModelError(
            f"force_image_size {size} is not the tower's image_size {vision['image_size']}: its "
            "positions would have to be stretched anew; load the -hf checkpoint."
        )


def _vision_config(old: Mapping[str, Any]) -> InternVLVisionConfig:
    vision = old["vision_config"]
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "hidden_act",
        "norm_type",
        "layer_norm_eps",
        "attention_dropout",
        "initializer_range",
    )
    return InternVLVisionConfig(
        **{name: vision[name] for name in same if name in vision},
        image_size=[vision["image_size"]] * 2,
        patch_size=[vision["patch_size"]] * 2,
        attention_bias=bool(vision.get("qkv_bias", False)),
        use_qk_norm=bool(vision.get("qk_normalization", False)),
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,  # so that the tower has no norm after its last layer
    )


def _tokenizer(folder: Path, vocabulary: int) -> Any:
    """Return the tokenizer, which must have the special words for an image and around it."""
    tokenizer = tokenizer_of(folder)
    known = {} if tokenizer is None else tokenizer.get_vocab()
    missing = [word for word in IMAGE_WORDS if known.get(word, vocabulary) >= vocabulary]
    if missing:
        raise ConfigError(
            f"the tokenizer in {folder} does not have {', '.join(missing)} among the {vocabulary} "
            "words of the model; give the tokenizer files that belong to the checkpoint."
        )
    return tokenizer_of(folder, extra_special_tokens=INTERNVL_TOKENS)
