"""The most bytes that torch holds during a prefill at LLaVA-1.5-7B's layer shapes.

    PYTHONPATH=CHECKOUT python results/peak_memory.py

Four decoder layers with random weights in bfloat16, 640 tokens, and prunings before layers 1, 2 and
3. The allocations that torch's profiler saw are added up, so neither the machine nor the allocator
of the system changes the result.
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import atp_patch

IMAGE, TOKENS, VISUAL = 999, 640, 576


def model_and_inputs() -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """The model, and a prompt with one picture."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=1000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=4,
            num_attention_heads=32,
        ),
        image_token_id=IMAGE,
        image_seq_length=VISUAL,
    )
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 900, (1, TOKENS))
    ids[0, 5 : 5 + VISUAL] = IMAGE
    pixels = torch.randn(1, 3, 336, 336, dtype=torch.bfloat16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return model, inputs


def peak_bytes(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """The most bytes held above those at the start of a prefill, which a first one warms up."""
    with torch.inference_mode():
        model(**inputs, logits_to_keep=1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model(**inputs, logits_to_keep=1)
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    """Print one line a method."""
    model, inputs = model_and_inputs()
    print(f"plain: {peak_bytes(model, inputs) / 2**20:.2f} MiB")
    for method in ("atp", "fastv", "random"):
        atp_patch.patch_model(model, layers=[1, 2, 3], method=method, keep=[0.7, 0.6, 0.5])
        print(f"{method}: {peak_bytes(model, inputs) / 2**20:.2f} MiB")
        atp_patch.unpatch_model(model)


if __name__ == "__main__":
    main()
