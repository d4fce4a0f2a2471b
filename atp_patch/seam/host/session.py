"""What a call of ``generate`` tells the forward passes within it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract import Decision
from atp_patch.contract.errors import UnsupportedModelError
from atp_patch.seam.host.outside import Outside

#: The arguments of a model that say how large the pictures of a call are. A family's grids may
#: depend on them; :class:`~atp_patch.contract.GridQuery` says what they hold.
PICTURE_SIZES = (
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "image_attention_mask",
    "image_merge_sizes",
    "video_merge_sizes",
    "image_position_ids",
    "video_position_ids",
    "spatial_shapes",
    "target_sizes",
    "target_sizes_videos",
)


@dataclass
class Session:
    """One call of ``generate``.

    Attributes:
        prompt_length: how many tokens the prompt has, those in the cache included. Later tokens are
            generated or guessed, and never score visual tokens.
        visual_mask: (B, L) bool that came with ``inputs_embeds``, or None.
        visual_grids: for each sample the (frames, height, width) of its images, or None.
        ids: (B, L) int64 of the prompt, or None where it came as embeddings alone.
        attention_mask: (B, L) of the prompt where one was given, or None. Passes with a static
            cache get another one.
        samples: how many prompts it was given; each may run in several rows (beams, sequences).
        picture_sizes: the arguments of ``PICTURE_SIZES`` that were given: ``generate`` keeps them
            from the passes within.
        choices: layer -> the decision of the first pass, which later passes without a cache repeat.
    """

    prompt_length: int | None
    visual_mask: Tensor | None = None
    choices: dict[int, Decision] = field(default_factory=dict)
    ids: Tensor | None = None
    visual_grids: Any = None
    attention_mask: Tensor | None = None
    samples: int = 0
    picture_sizes: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_generate(
        cls, outside: Outside, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Session:
        """Read the arguments of ``generate``.

        Raises:
            UnsupportedModelError: for a prefill in chunks, which would choose tokens before the
                whole text is read.
        """
        given = outside.named("generate", args, kwargs)
        if _chunk_size(given, outside.generation_config) is not None:
            raise UnsupportedModelError(
                "prefill_chunk_size would choose visual tokens before the whole question is "
                "read; set it to None, or generate within atp_patch.disabled(model)."
            )
        named = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        prompts = [tensor for tensor in named if tensor is not None]
        length = max((int(tensor.shape[1]) for tensor in prompts), default=None)
        visual_mask = kwargs.get("visual_mask")
        if visual_mask is None:
            visual_mask = outside.visual("generate", args, kwargs)
        ids = next((tensor for tensor in prompts if not tensor.is_floating_point()), None)
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if length is not None and mask is not None:
            length = max(length, mask.shape[1])  # the ids may be those of a later turn alone
        return cls(
            length,
            visual_mask,
            ids=ids,
            visual_grids=kwargs.get("visual_grids"),
            attention_mask=mask,
            samples=len(prompts[0]) if prompts else 0,
            picture_sizes=sizes_given(given),
        )


def sizes_given(given: dict[str, Any]) -> dict[str, Tensor]:
    """Return those of the arguments ``PICTURE_SIZES`` that a call was given, as tensors."""
    return {
        name: torch.as_tensor(given[name]) for name in PICTURE_SIZES if given.get(name) is not None
    }


def _chunk_size(given: dict[str, Any], own: Any) -> int | None:
    """Return the size of chunks as ``generate`` finds it: from its arguments, from the
    configuration that it is given, or from the model's ``own``.
    """
    name = "prefill_chunk_size"
    if name in given:
        size: int | None = given[name]
        return size
    chosen = getattr(given.get("generation_config"), name, None)
    return getattr(own, name, None) if chosen is None else chosen
