"""Conversion of LLaVA and VILA-7B checkpoints to ``LlavaForConditionalGeneration``.

Both have a CLIP tower, a projector and a LLaMA or Mistral language model, either in one folder or,
as VILA does, in the folders ``llm``, ``mm_projector`` and ``vision_tower``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers  # which loads a class of its own when it is used
from torch.nn.functional import pad
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

from atp_patch.contract.errors import ConfigError, UnsupportedModelError
from atp_patch.convert.configs import config_of
from atp_patch.convert.plan import Plan, Rule
from atp_patch.convert.processors import (
    save_generation_config,
    save_llava_processor,
    tokenizer_of,
)
from atp_patch.convert.source import Source, read_json

PARTS = ("llm", "mm_projector", "vision_tower")
IMAGE_TOKEN = "<image>"

RULES = (
    # Position ids and rotary frequencies are computed. Of a whole CLIP only the tower is taken.
    Rule(r".*\.(?:position_ids|rotary_emb\.inv_freq)"),
    Rule(r"vision_tower\.(?:text_model\..+|logit_scale|(?:text|visual)_projection\.weight)"),
    Rule(r"(?:llm\.)?model\.((?:embed_tokens|layers|norm)\..+)", (r"language_model.model.\1",)),
    Rule(r"(?:llm\.)?lm_head\.weight", ("language_model.lm_head.weight",)),
    # The projector has one layer, or the two of mlp2x_gelu.
    Rule(
        r"(?:model\.)?mm_projector\.(?:layers\.)?(?:0\.)?(weight|bias)",
        (r"multi_modal_projector.linear_1.\1",),
    ),
    Rule(
        r"(?:model\.)?mm_projector\.(?:layers\.)?2\.(weight|bias)",
        (r"multi_modal_projector.linear_2.\1",),
    ),
    Rule(
        r"(?:model\.)?vision_tower\.(?:vision_tower\.)?vision_model\.(.+)",
        (r"vision_tower.vision_model.\1",),
    ),
)
ACTIVATIONS = {"linear": "linear", "mlp2x_gelu": "gelu"}
TEXT_CONFIGS = {
    "LlavaLlamaForCausalLM": LlamaConfig,
    "LlavaLlamaModel": LlamaConfig,
    "LlavaMistralForCausalLM": MistralConfig,
}
# Towers that LLaVA names without a copy of their configuration.
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
TOWERS = {
    "clip-vit-large-patch14-336": {**CLIP_LARGE, "image_size": 336},
    "clip-vit-large-patch14": {**CLIP_LARGE, "image_size": 224},
}


def llava_plan(folder: Path, tower: Path | None = None) -> Plan:
    """Plan how a checkpoint of LLaVA or VILA-7B is converted.

    Args:
        folder: the folder of the checkpoint.
        tower: folder of the CLIP model, where the checkpoint does not hold it; else None.

    Raises:
        ATPError: naming what is wrong with the folder and the mend.
    """
    old = read_json(folder / "config.json", "the folder of a whole checkpoint")
    make_text = _text_class(old)
    split = (folder / "llm").is_dir()
    language = folder / "llm" if split else folder
    inner = read_json(language / "config.json", "the language model's")
    if split and inner.get("model_type") != make_text.model_type:
        raise UnsupportedModelError(
            f"{language} holds a model of type {inner.get('model_type')!r}; "
            f"{make_text.model_type} can be converted."
        )
    text = config_of(make_text, inner)
    projector = _projector(folder, old, split)
    parts = [Source(folder / name, f"{name}.") for name in PARTS if (folder / name).is_dir()]
    sources = parts if split else [Source(folder)]
    if not any("vision_model." in name for source in sources for name, _ in source.meta()):
        sources = [source for source in sources if source.prefix != "vision_tower."]
        sources.append(Source(_tower_folder(tower, old), "vision_tower."))
    vision = _vision_config(tower or (folder / "vision_tower" if split else None), old)
    tokenizer, notes = tokenizer_of(language), []
    image_id, rows = _image_token(tokenizer, text.vocab_size)
    grown, text.vocab_size = rows - text.vocab_size, rows
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act=ACTIVATIONS[projector],
        vision_feature_select_strategy=_strategy(old),
        vision_feature_layer=int(old.get("mm_vision_select_layer", -2)),
        tie_word_embeddings=False,
        pad_token_id=text.pad_token_id,
    )
    if tokenizer is None:
        notes.append(
            f"there is no tokenizer in {language}: add the language model's, with {IMAGE_TOKEN} as "
            f"special token {image_id}, and a processor (LlavaProcessor)."
        )
    else:
        notes.append(
            "the prompts of chat_template.jinja read USER: ... ASSISTANT:, as LLaVA-1.5 and VILA "
            "were trained; change it if yours was trained otherwise."
        )
    if old.get("mm_use_im_start_end"):
        notes.append("it was trained with <im_start> before <image> and <im_end> behind it.")

    def save_more(out: Path) -> None:
        save_generation_config(language, out, text, [image_id], notes)
        if tokenizer is not None:
            squared = old.get("image_aspect_ratio") == "pad"
            save_llava_processor(out, tokenizer, config, squared=squared)

    table = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    grow = partial(pad, pad=(0, 0, 0, grown))  # with zeros: these words are not read or generated
    width, layer = text.hidden_size, "multi_modal_projector.linear_2"
    identity = {
        f"{layer}.weight": lambda dtype: torch.eye(width, dtype=dtype),
        f"{layer}.bias": lambda dtype: torch.zeros(width, dtype=dtype),
    }
    return Plan(
        architecture=transformers.LlavaForConditionalGeneration,
        config=config,
        sources=sources,
        rules=RULES,
        save_more=save_more,
        changes=dict.fromkeys(table, grow) if grown else {},
        made=identity if projector == "linear" else {},
        notes=notes,
    )


def _text_class(old: Mapping[str, Any]) -> Any:
    """Return the class of the language model's configuration."""
    name = next(iter(old.get("architectures") or ()), None)
    if name not in TEXT_CONFIGS:
        raise UnsupportedModelError(
            f"config.json is of architecture {name}; {', '.join(TEXT_CONFIGS)} can be converted. "
            "Checkpoints of transformers itself need no conversion."
        )
    if "anyres" in str(old.get("image_aspect_ratio")):
        raise UnsupportedModelError(
            "image_aspect_ratio is anyres: this is LLaVA-NeXT; load its -hf checkpoint "
            "(llava-hf/llava-v1.6-...) instead."
        )
    if old.get("s2"):
        raise UnsupportedModelError(
            "s2 reads images at several scales, which the transformers model cannot; patch the "
            "object of its own package instead."
        )
    return TEXT_CONFIGS[name]


def _projector(folder: Path, old: Mapping[str, Any], split: bool) -> str:
    """Return the kind of the projector, which is a key of ``ACTIVATIONS``."""
    kind = old.get("mm_projector_type")
    if split:
        own = read_json(folder / "mm_projector" / "config.json", "the projector's")
        kind = own.get("mm_projector_type", kind)
    kind = kind or "linear"  # the first LLaVA had this projector alone
    if kind not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"mm_projector_type {kind!r} has no counterpart in transformers' LLaVA (only "
            f"{', '.join(ACTIVATIONS)} have); VILA-1.5 and NVILA are patched as objects of their "
            "own package instead."
        )
    return str(kind)


def _tower_folder(tower: Path | None, old: Mapping[str, Any]) -> Path:
    if tower is None:
        raise ConfigError(
            f"the vision tower ({_tower_name(old)}) is not in the checkpoint; download it and give "
            "--vision-tower DIR."
        )
    return tower


def _tower_name(old: Mapping[str, Any]) -> str:
    return str(old.get("mm_vision_tower") or old.get("vision_tower") or "CLIP")


def _vision_config(folder: Path | None, old: Mapping[str, Any]) -> Any:
    """Return the tower's configuration: its own, or the known one of a tower with its name."""
    if folder is None:
        name = Path(_tower_name(old)).name
        if name not in TOWERS:
            raise ConfigError(
                f"the config of the vision tower {_tower_name(old)} is not known; give a folder "
                "that holds its config.json with --vision-tower DIR."
            )
        return CLIPVisionConfig(**TOWERS[name])
    table = read_json(folder / "config.json", "the folder of a CLIP model")
    if table.get("model_type") not in ("clip", "clip_vision_model"):
        raise UnsupportedModelError(
            f"{folder} holds a model of type {table.get('model_type')!r}, not CLIP; give LLaVA's "
            "own tower."
        )
    return config_of(CLIPVisionConfig, table.get("vision_config", table))


def _strategy(old: Mapping[str, Any]) -> str:
    kind = old.get("mm_vision_select_feature", "patch")
    known = {"patch": "default", "cls_patch": "full"}
    if kind not in known:
        raise UnsupportedModelError(
            f"mm_vision_select_feature {kind!r} is not one of {', '.join(known)}."
        )
    return known[kind]


def _image_token(tokenizer: Any, vocabulary: int) -> tuple[int, int]:
    """Return the id of the placeholder, and the number of words that the model has with it."""
    if tokenizer is None:
        return vocabulary, vocabulary + 1
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    return image_id, max(vocabulary, image_id + 1)
