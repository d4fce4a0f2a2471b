"""What the examples beside this file train: a patched model, on built-in scenes."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

import atp_patch
from atp_patch.builtin import builtin_path
from atp_patch.training.dataset import Samples, collate
from atp_patch.training.encode import Encoder
from atp_patch.training.records import Scenes


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of every example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(builtin_path()), help="a folder or Hub id")
    parser.add_argument("--layers", default="4,14,24", type=lambda text: text.split(","))
    parser.add_argument("--target-tokens", type=float, help="default: a quarter of the image's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", default="adapter", help="folder of what was learned")
    return parser.parse_args(argv)


def load(asked: argparse.Namespace) -> tuple[Any, Any]:
    """The patched model, of which only the threshold heads learn, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(asked.model, dtype="float32")
    layers = [int(layer) for layer in asked.layers]
    atp_patch.patch_model(model, layers, thresholds="learned", target_tokens=asked.target_tokens)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("atp_patch_heads."))
    return model, AutoProcessor.from_pretrained(asked.model)


def dataset(model: Any, processor: Any, count: int) -> tuple[Samples, Any]:
    """Questions about scenes, labelled on their answers, and what makes batches of them."""
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    samples = Samples(Scenes(count), Encoder(processor, [image], None), skip_bad=False)
    make = partial(collate, pad_id=processor.tokenizer.pad_token_id)

    def batch(chosen: Any) -> dict[str, Any]:
        inputs = make(chosen)
        del inputs["skipped"]  # numbers of bad samples: scenes have none
        return inputs

    return samples, batch
