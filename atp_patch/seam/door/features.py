"""Checking what the vision model made: scores of NaN or infinite features choose by chance."""

from __future__ import annotations

import torch
from torch import Tensor

from atp_patch.contract.errors import InputError
from atp_patch.seam.door.tombstones import are_mixed
from atp_patch.seam.host.prompt import Prompt


def check_features(embeds: Tensor, prompt: Prompt, dropped: Tensor | None = None) -> None:
    """Raise InputError where visual tokens hold NaN or infinity.

    Args:
        embeds: (B, L, D) what is about to enter the decoder.
        dropped: (B, L) bool, tombstones of tokens that were dropped before the decoder; None where
            there can be none.
    """
    broken = prompt.visual & ~prompt.finite
    if dropped is not None and bool(broken.any()):
        broken &= ~dropped.cpu()
    if not bool(broken.any()):
        return
    if dropped is not None and are_mixed(embeds.detach()[broken.to(embeds.device)]):
        raise InputError(
            "the model resized its grid of visual tokens after they were chosen (LLaVA-OneVision "
            "does so with videos and with pictures of many tiles); give it pictures of fewer "
            "tiles, or use a method that prunes inside the decoder."
        )
    sample, position = torch.nonzero(broken)[0].tolist()
    raise InputError(
        f"{int(broken.sum())} of {int(prompt.visual.sum())} visual tokens have features that are "
        f"NaN or infinite (the first at position {position} of sample {sample}), and nothing can "
        "be chosen by them. Look for such numbers in the pixel values and in the weights of the "
        "vision tower and projector; a model in float16 may overflow: load it in bfloat16 or "
        "float32."
    )
