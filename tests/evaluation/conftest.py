"""A model folder that answers some questions rightly: random, 36 visual tokens, 8 layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from atp_patch.builtin.tokens import ASSISTANT, BOS, EOS, IMAGE, PAD, word_ids
from atp_patch.evaluation import scenes  # noqa: F401  (registers its tasks)
from atp_patch.evaluation.runner import Bench
from workshop.processing import build_processor

IMAGE_PX, PATCH_PX, LAYERS = 192, 32, 8
TOKENS = (IMAGE_PX // PATCH_PX) ** 2
WORDS = ("yes", "no")


def build() -> tuple[LlavaForConditionalGeneration, Any]:
    """Its processor is the built-in one, with larger patches; it says WORDS and little else."""
    ids = word_ids()
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE],
        tie_word_embeddings=False,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                gain = 0.4 if "o_proj" in name or "down_proj" in name else 1.2
                weight.normal_(std=gain * weight.shape[1] ** -0.5)
            if "embed_tokens" in name:
                weight.normal_()
        head = model.lm_head.weight
        head.zero_()
        spoken = [ids[word] for word in WORDS]
        head[spoken] = torch.randn(len(WORDS), head.shape[1])
        # After a word, the end, and not before: a state still holds its token's embedding.
        embedding = model.model.language_model.embed_tokens.weight
        head[ids[EOS]] = 1.5 * embedding[spoken].sum(0) - embedding[ids[ASSISTANT]]
    processor = build_processor()
    processor.patch_size = PATCH_PX
    return model, processor


@pytest.fixture(scope="session")
def bench() -> Bench:
    """The model as the runner wants it."""
    return Bench(*build(), speaks=True, answers="forced", batch_size=5)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model on disk."""
    path = tmp_path_factory.mktemp("model")
    for part in build():
        part.save_pretrained(path)
    return path
