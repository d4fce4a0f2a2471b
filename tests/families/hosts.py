"""What the installed version of transformers does otherwise, or wrong, with the plain model too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from transformers.models.gemma3 import modeling_gemma3

from tests.helpers.run import TOLERANCE, generate

HOST = Version(transformers.__version__)
NEWEST = Version("5.23")  # from here on nothing is excused

# Before, `generate` repeated the images of beams one by one, not sample by sample.
REPEATS_SAMPLES = Version("5.18") <= HOST

# Of these it still does so.
REPEATED_ONE_BY_ONE = ("granite4_vision", "phi4_multimodal")

# Before, prompt lookup failed where no token ends an answer.
LOOKUP_NEEDS_AN_END = Version("5.13") > HOST

# Gemma 3's first masks let an image see itself beyond the window.
WINDOWS_OVER_IMAGES = not hasattr(modeling_gemma3, "token_type_ids_mask_function")


def can_be_built(kind: Any) -> bool:
    """Whether the host takes the values of a row's config.

    Early versions declare wrong types of some values, their own defaults among them, and late
    versions of huggingface_hub check the types.
    """
    if HOST >= NEWEST:
        return True
    try:
        kind.config()
    except StrictDataclassError:
        return False
    return True


def skip_where_samples_share_places(plain: Any) -> None:
    """Skip where the plain model itself answers a sample otherwise beside other samples."""
    if plain.config.model_type == "hunyuan_vl":
        pytest.skip("the plain hunyuan_vl numbers images through the whole batch")


def shares_keys_by_the_cache(plain: Any) -> bool:
    """Whether later layers find the keys of earlier ones in a cache alone."""
    return bool(plain.config.model_type == "gemma3n" and Version("5.13") > HOST)


def skip_where_keys_are_shared_by_the_cache(plain: Any) -> None:
    """Skip where the plain model answers otherwise without a cache, so that no oracle judges it."""
    if shares_keys_by_the_cache(plain):
        pytest.skip("the plain gemma3n shares keys through its cache alone")


def skip_where_states_take_one_token_at_a_time(plain: Any) -> None:
    """Skip where the plain model forgets its state when several tokens follow a cache."""
    if plain.config.model_type == "lfm2_vl" and NEWEST > HOST:
        pytest.skip("the plain lfm2_vl continues a cache by one token at a time")


def skip_where_the_cache_matters(plain: Any, inputs: Any) -> None:
    """Skip where the plain model cannot generate without its cache, and where an early version's
    answers otherwise then.
    """
    if plain.config.model_type == "ernie4_5_vl_moe":
        pytest.skip("the plain ernie4_5_vl_moe generates with a cache alone")
    if HOST >= NEWEST:
        return
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (
        torch.stack(generate(plain, inputs, use_cache=use, **wanted).logits)
        for use in (True, False)
    )
    if (cached - uncached).abs().max() > TOLERANCE:
        kind = plain.config.model_type
        pytest.skip(f"the plain {kind} itself answers otherwise without a cache")
