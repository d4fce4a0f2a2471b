"""The files beside the weights: tokenizer, processor and generation configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers  # which loads a class of its own when it is used

from atp_patch.contract.errors import ConfigError
from atp_patch.tools.loading import first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# The roles alternate, and an image stands at its place in the message.
USER_ASSISTANT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set name = '' %}"
    "{% elif message['role'] == 'user' %}{% set name = 'USER: ' %}"
    "{% else %}{% set name = 'ASSISTANT: ' %}{% endif %}"
    "{{ name }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def tokenizer_of(folder: Path, **options: Any) -> Any:
    """Return the tokenizer in a folder, or None where there is no file of one.

    Raises:
        ConfigError: where there is one that cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **options
        )
    except Exception as error:  # tokenizers raises nothing more special for a broken file
        raise ConfigError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); install "
            "sentencepiece and protobuf, or put its tokenizer.json there."
        ) from error


def save_generation_config(
    folder: Path, out: Path, text: Any, unused: Sequence[int], notes: list[str]
) -> None:
    """Copy the generation configuration, or make one with the language model's special tokens.

    Args:
        folder: the folder of the old checkpoint.
        out: the folder of the new one.
        text: configuration of the language model.
        unused: ids that must never be generated.
        notes: is appended to where the user still has to do something.

    Raises:
        ConfigError: where the file is broken.
    """
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.GenerationConfig(**ids)
    if (folder / "generation_config.json").is_file():
        try:
            given = transformers.GenerationConfig.from_pretrained(folder)
        except Exception as error:  # a broken file raises errors of every kind
            raise ConfigError(
                f"generation_config.json in {folder} cannot be read ({first_line(error)}); mend or "
                "remove it."
            ) from error
        try:
            given.validate(strict=True)
            config = given
        except ValueError as error:
            notes.append(
                f"generation_config.json contradicts itself ({first_line(error).rstrip(':')}); "
                "only its special tokens were taken over."
            )
            config = transformers.GenerationConfig(**{name: getattr(given, name) for name in ids})
    if unused:
        config.suppress_tokens = [*(config.suppress_tokens or ()), *unused]
    config.save_pretrained(out)


def save_llava_processor(out: Path, tokenizer: Any, config: Any, *, squared: bool) -> None:
    """Write a processor that makes one placeholder of an image for each patch of the tower.

    Args:
        out: the folder to write to.
        tokenizer: the tokenizer of the model.
        config: the config of the model.
        squared: whether images are padded to squares. Otherwise a square is cut from their middle.
    """
    # Where torchvision is missing, importing these prints a long notice, so it is done late.
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    side = config.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images = LlavaImageProcessor(do_pad=True, **sizes) if squared else CLIPImageProcessor(**sizes)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=USER_ASSISTANT,
    ).save_pretrained(out)


def save_internvl_processor(
    out: Path, tokenizer: Any, config: Any, side: int, tiles: tuple[int, int]
) -> None:
    """Write the tokenizer, and the JSON file from which transformers makes the processor.

    The file is written without making the processor, which would need torchvision.

    Args:
        out: the folder to write to.
        tokenizer: the tokenizer of the model.
        config: the config of the model.
        side: width and height of a tile in pixels.
        tiles: the least and the most tiles of an image.
    """
    tokenizer.save_pretrained(out)
    size = {"height": side, "width": side}
    table = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": config.image_seq_length,
        "image_processor": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": True,
            "min_patches": tiles[0],
            "max_patches": tiles[1],
            "size": size,
            **IMAGENET,
        },
        "video_processor": {
            "video_processor_type": "InternVLVideoProcessor",
            "size": size,
            **IMAGENET,
        },
    }
    (out / "processor_config.json").write_text(json.dumps(table, indent=2), encoding="utf-8")
