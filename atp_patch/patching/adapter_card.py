"""The model card of an adapter, which says what it is for and how it is loaded."""

from __future__ import annotations

from typing import Literal

from atp_patch.methods import make_method
from atp_patch.patching.config import PruningConfig

Beside = Literal["lora", "model"]  # what was trained with an adapter, and the name of its folder

# How an adapter is loaded, for each value of ``beside``.
_LOADED = {
    None: 'import atp_patch\n\natp_patch.patch_model(model, weights="THIS_REPOSITORY_OR_FOLDER")',
    "lora": "from atp_patch import load_trained\n\n"
    "# This adapter is in FOLDER/adapter; FOLDER/lora is the LoRA that learned with it.\n"
    'load_trained(model, "FOLDER")',
    "model": "import atp_patch\n\n# The model in FOLDER/model learned with this adapter.\n"
    'atp_patch.patch_model(model, weights="FOLDER/adapter")',
}


def model_card(pruning: PruningConfig, beside: Beside | None, *, learned: bool) -> str:
    """Write the model card of an adapter.

    Args:
        pruning: the configuration of the adapter.
        beside: what was trained together with the adapter, or None.
        learned: whether the adapter holds learned weights.
    """
    base = pruning.base
    return (
        "---\nlibrary_name: atp_patch\ntags:\n- atp_patch\n- visual-token-pruning\n---\n\n"
        f"# Visual token pruning: {pruning.name}\n\n"
        f"Made for a `{base.family}` model with {base.num_layers} decoder layers of hidden "
        f"size {base.hidden_size}. {_what_it_does(pruning, learned)}\n\n"
        f"```python\n{_LOADED[beside]}\n```\n"
    )


def _what_it_does(pruning: PruningConfig, learned: bool) -> str:
    """Say where the adapter prunes and how many tokens stay."""
    before = pruning.before
    if before is not None and "num_tokens" in before.options:
        count = before.options["num_tokens"]
        return (
            f"It puts {count} learned token{'s' * (count != 1)} behind each image, and what "
            "follows sees of the image these alone."
        )
    budget = "its own learned thresholds"
    if pruning.keep is not None:
        budget = f"keep={list(pruning.keep)}"
    elif pruning.target_tokens is not None:
        budget = f"{pruning.target_tokens:g} visual tokens on average over all decoder layers"
    elif before is not None and pruning.method is None and before.options.get("share"):
        budget = f"a share of {before.options['share']:g} of the visual tokens"
    elif (
        before is not None
        and pruning.method is None
        and not make_method(before.method, before.options).needs_budget
    ):
        budget = "the image decides"
    elif not learned:
        budget = "a quarter of the visual tokens on average over all decoder layers"
    where = f"layers {list(pruning.layers)}"
    if before is not None:
        where = "the decoder" + (f" and {where}" if pruning.layers else "")
    return f"It prunes before {where}; budget: {budget}."
