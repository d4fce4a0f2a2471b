"""The model card of an adapter: what it is for, how it is loaded, what it keeps, and its limits."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from huggingface_hub import ModelCardData

from atp_patch.methods import make_method
from atp_patch.patching.config import PruningConfig
from atp_patch.patching.made_with import MadeWith

Beside = Literal["lora", "model"]  # what was trained with an adapter, and the name of its folder

NO_LICENSE = "unknown"  # the Hub's word for it
KEEPS = "## What it keeps"
_BUILTIN = {"builtin": "", "builtin-dynamic": '"dynamic"'}
_NOT_MEASURED = (
    "Nothing was measured on held-out questions for this card. `atp-patch evaluate --adapters "
    "{place}` measures accuracy at this budget beside the unpruned model, and `atp-patch push "
    "--results` puts it here."
)


def model_card(
    pruning: PruningConfig,
    made_with: MadeWith,
    beside: Beside | None,
    *,
    learned: bool,
    place: str,
    section: str = "",
    license: str | None = None,  # noqa: A002  (the Hub's name for it)
) -> str:
    """Write the model card of an adapter.

    Args:
        pruning: the configuration of the adapter.
        made_with: what it was made with.
        beside: what was trained together with the adapter, or None.
        learned: whether the adapter holds learned weights.
        place: the folder or repository from which the card loads it; where more learned with it,
            the folder of the training.
        section: a section of the card that says how the adapter was trained, or nothing.
        license: the licence by the Hub's name; None: the author named none.
    """
    base = made_with.base_model
    parts = [
        f"---\n{_metadata(base, license)}---",
        f"# Visual token pruning: {pruning.name}" + ("" if base is None else f" for {base}"),
        f"Made for {_base(pruning, made_with)}. {_what_it_does(pruning, learned)}",
        "## Load it",
        f"```python\n{_loading(base, beside, place)}\n```",
        "It needs the package `atp-patch`. The adapter is a configuration in JSON"
        + (" and weights as safetensors" if learned else "")
        + "; no code of a repository is run, and no pickle is read.",
        KEEPS,
        _NOT_MEASURED.format(place=place),
        section.strip(),
        "## Limits",
        _limits(pruning, made_with, beside),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def at_place(card: str, place: str) -> str:
    """Return a card whose lines load the adapter from a repository."""
    string = r'"(?:[^"\\]|\\.)*"'
    named = re.compile(rf'(weights=|load_trained\(model, ){string}(?:, subfolder="adapter")?')
    card = named.sub(lambda found: found[1] + json.dumps(place), card)
    model = re.compile(rf'(from_pretrained\(){string}(, subfolder="model")')
    card = model.sub(lambda found: found[1] + json.dumps(place) + found[2], card)
    return re.sub(r"(--adapters )\S+(`)", lambda found: found[1] + place + found[2], card)


def with_results(card: str, results: str) -> str:
    """Return a card whose section on what is kept holds measured results."""
    section = re.compile(rf"^{KEEPS}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    new = f"{KEEPS}\n\n{results.strip()}\n\n"
    if section.search(card) is None:
        return f"{card.rstrip()}\n\n{new.rstrip()}\n"
    return section.sub(lambda found: new, card, count=1)


def with_license(card: str, name: str) -> str:
    """Return a card with another licence in its metadata."""
    head = re.compile(r"\A---\n.*?^---$", re.DOTALL | re.MULTILINE)
    found = head.search(card)
    if found is None:
        return f"---\nlicense: {name}\n---\n\n{card}"
    line, text = re.compile(r"^license:.*$", re.MULTILINE), found[0]
    said = f"license: {name}"
    changed = line.sub(lambda _: said, text, count=1) if line.search(text) else ""
    changed = changed or text.replace("---\n", f"---\n{said}\n", 1)
    return changed + card[found.end() :]


def _metadata(base: str | None, license: str | None) -> str:  # noqa: A002
    on_hub = base is not None and "/" in base
    data: dict[str, Any] = {
        "license": license or NO_LICENSE,
        "library_name": "atp_patch",
        "pipeline_tag": "image-text-to-text",
        "tags": ["atp_patch", "visual-token-pruning"],
    }
    if on_hub:
        data["base_model"] = base
        data["tags"] = [f"base_model:adapter:{base}", *data["tags"]]
    return ModelCardData(**data, ignore_metadata_errors=True).to_yaml() + "\n"


def _base(pruning: PruningConfig, made_with: MadeWith) -> str:
    """Return the model that an adapter is for, with a link where it is on the Hub."""
    base, name = pruning.base, made_with.base_model
    shape = (
        f"a `{base.family}` model with {base.num_layers} decoder layers of hidden size "
        f"{base.hidden_size}"
    )
    if name is None:
        return shape
    if name in _BUILTIN:
        return f"the built-in model `{name}` of atp_patch, {shape}"
    commit = made_with.base_revision
    at = "" if commit is None else f" (commit `{commit[:12]}`)"
    return f"[{name}](https://huggingface.co/{name}){at}, {shape}"


def _loading(base: str | None, beside: Beside | None, place: str) -> str:
    """Return the lines that load model, processor and adapter."""
    where = json.dumps(place)
    last = f"atp_patch.patch_model(model, weights={where})"
    if beside == "lora":
        last = f"atp_patch.load_trained(model, {where})  # with the LoRA that learned beside it"
    if base in _BUILTIN and beside != "model":
        return (
            "import atp_patch\nfrom atp_patch.builtin import load_builtin\n\n"
            f"model, processor = load_builtin({_BUILTIN[base]})\n{last}"
        )
    if base is None and beside != "model":
        return f"import atp_patch\n\n# model: the one named above, as transformers loads it\n{last}"
    source, inside = json.dumps(base), ""
    if beside == "model":
        source, inside = where, ', subfolder="model"'
        last = f'atp_patch.patch_model(model, weights={where}, subfolder="adapter")'
    return (
        "import atp_patch\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f'model = AutoModelForImageTextToText.from_pretrained({source}{inside}, dtype="auto")\n'
        f"processor = AutoProcessor.from_pretrained({source}{inside})\n{last}"
    )


def _limits(pruning: PruningConfig, made_with: MadeWith, beside: Beside | None) -> str:
    """Return what a user must know before relying on the adapter."""
    limits = [
        "It fits the model above alone: another family, depth or hidden size is refused, and other "
        "weights of the same shapes raise a warning"
        + (
            "."
            if made_with.fingerprint is None
            else f" (fingerprint of the decoder: `{made_with.fingerprint}`)."
        ),
        "What is pruned cannot be read by later layers: questions about small or many things lose "
        "most. Measure on your own data before you rely on it.",
    ]
    if pruning.before is not None and "num_tokens" in pruning.before.options:
        limits[1] = (
            "The answer sees of an image what its learned tokens carry: fine print and counts are "
            "lost first. Measure on your own data before you rely on it."
        )
    if beside == "model":
        limits.append("The model itself learned with it, and has to be loaded from there.")
    if beside == "lora":
        limits.append("Without the LoRA beside it, the adapter is not what was trained.")
    versions = [
        f"{name} {version}"
        for name, version in (
            ("atp_patch", made_with.atp_patch),
            ("torch", made_with.torch),
            ("transformers", made_with.transformers),
        )
        if version is not None
    ]
    if versions:
        limits.append(f"Made with {', '.join(versions)}.")
    return "\n".join(f"- {limit}" for limit in limits)


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
    elif pruning.target_share is not None:
        share = f"{100 * pruning.target_share:g} %"
        budget = f"{share} of the visual tokens on average over all decoder layers"
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
