"""Adapters: a configuration in JSON and, where something was learned, safetensors. Nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atp_patch.config import BaseModel, PruningConfig
from atp_patch.errors import WeightsError
from atp_patch.methods import Compressor, Method, ModuleSpec, make_method

CONFIG_FILE = "atp_config.json"
WEIGHTS_FILE = "atp_model.safetensors"
CARD_FILE = "README.md"


class Adapter(ModelHubMixin):
    """A pruning configuration and what was learned for it, as one thing to save, load and push."""

    def __init__(self, pruning: PruningConfig, tensors: dict[str, Tensor]) -> None:
        self.pruning, self.tensors = pruning, tensors
        # The mixin would write the arguments above into a config.json of its own.
        self._hub_mixin_config = None

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / CONFIG_FILE).write_text(self.pruning.to_json(), encoding="utf-8")
        weights = save_directory / WEIGHTS_FILE
        weights.unlink(missing_ok=True)
        if self.tensors:
            tensors = {
                name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()
            }
            save_file(tensors, weights, metadata={"format": "pt"})
        (save_directory / CARD_FILE).write_text(self.card(), encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """The card is written by :meth:`card`; the mixin's own template is not used."""
        from huggingface_hub import ModelCard

        return ModelCard(self.card())

    def card(self) -> str:
        """A model card that says what the adapter is for and how to load it."""
        pruning = self.pruning
        budget = "its own learned thresholds"
        if pruning.keep is not None:
            budget = f"keep={list(pruning.keep)}"
        elif pruning.target_tokens is not None:
            budget = f"{pruning.target_tokens:g} visual tokens on average over all decoder layers"
        elif not self.tensors:
            budget = "a quarter of the visual tokens on average over all decoder layers"
        base, where = pruning.base, f"layers {list(pruning.layers)}"
        if pruning.before is not None:
            where = "the decoder" + (f" and {where}" if pruning.layers else "")
            if "num_tokens" in pruning.before.options:
                budget = f"{pruning.before.options['num_tokens']} learned tokens an image"
            elif pruning.method is None and pruning.keep is None and pruning.target_tokens is None:
                budget = "the image decides"
        return (
            "---\nlibrary_name: atp_patch\ntags:\n- atp_patch\n- visual-token-pruning\n---\n\n"
            f"# Visual token pruning: {pruning.name}\n\n"
            f"Made for a `{base.family}` model with {base.num_layers} decoder layers of hidden "
            f"size {base.hidden_size}. It prunes before {where}; budget: {budget}.\n\n"
            "```python\nimport atp_patch\n\n"
            'atp_patch.patch_model(model, weights="THIS_REPOSITORY_OR_FOLDER")\n```\n'
        )


def adapter_of(config: PruningConfig, heads: nn.Module | None) -> Adapter:
    """The adapter of a patched model.

    Raises:
        WeightsError: where this process holds a part of what was learned.
    """
    learned = {} if heads is None else heads.state_dict(keep_vars=True)
    if any(map(_in_parts, learned.values())):
        raise WeightsError(
            "what was learned is spread over processes. With ZeRO-3 save it inside "
            "deepspeed.zero.GatheredParameters(list(model.atp_patch_heads.parameters())), which "
            "all processes enter; with FSDP2 load Accelerator.get_state_dict(model) into a patched "
            "model of one process and save that."
        )
    return Adapter(config, {name: tensor.detach() for name, tensor in learned.items()})


def load_adapter(source: str | Path, base: BaseModel) -> tuple[PruningConfig, dict[str, Tensor]]:
    """Read an adapter from a folder or the Hub and check that it is whole and made for ``base``.

    Raises:
        WeightsError: naming what is missing, foreign, or made for another model.
    """
    config_file = _fetch(source, CONFIG_FILE)
    config = PruningConfig.from_json(
        config_file.read_text(encoding="utf-8"), f"{source}/{CONFIG_FILE}"
    )
    if config.base != base:
        raise WeightsError(
            f"{source} was made for {_describe(config.base)}, but this model is "
            f"{_describe(base)}; load "
            "the model it was made for, or patch without weights."
        )
    expected = _module(config)
    if expected is None:
        return config, {}
    weights_file = _fetch(source, WEIGHTS_FILE)
    try:
        tensors = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{source}/{WEIGHTS_FILE} is not a safetensors file ({error})."
        ) from error
    _check_tensors(source, tensors, {k: v.shape for k, v in expected.state_dict().items()})
    return config, tensors


def _in_parts(tensor: Tensor) -> bool:
    """A shard of FSDP2's, or what ZeRO-3 leaves of a parameter between its uses."""
    shard = hasattr(tensor, "full_tensor")
    return shard or tensor.numel() != getattr(tensor, "ds_numel", tensor.numel())


def _module(config: PruningConfig) -> nn.Module | None:
    """A module like the one whose tensors the adapter of this configuration brings."""
    if config.method is not None:
        method = make_method(config.method, config.options)
        assert isinstance(method, Method)
        spec = ModuleSpec(config.layers, config.base.hidden_size, config.shares(None))
        return method.build(spec)
    before = None
    if config.before is not None:
        before = make_method(config.before.method, config.before.options)
    return before.build(config.base.hidden_size) if isinstance(before, Compressor) else None


def _check_tensors(
    source: str | Path, tensors: dict[str, Tensor], expected: dict[str, Any]
) -> None:
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    wrong = sorted(k for k in set(expected) & set(tensors) if tensors[k].shape != expected[k])
    if missing or unknown or wrong:
        raise WeightsError(
            f"{source}/{WEIGHTS_FILE} does not hold this adapter's tensors: {len(missing)} missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}, {len(wrong)} of wrong shape "
            f"{wrong[:3]}. Save the adapter anew with atp_patch.save_pretrained."
        )


def _fetch(source: str | Path, name: str) -> Path:
    """A file of an adapter: from a folder where there is one, else from the Hub."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / name
        if file.is_file():
            return file
        raise WeightsError(f"{folder} has no {name}; give a folder that save_pretrained wrote.")
    try:
        return Path(hf_hub_download(str(source), name))
    except (HFValidationError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise WeightsError(
            f"{source!s} is neither a folder nor an adapter on the Hub that can be reached "
            f"({type(error).__name__}); check the name, or give a folder that save_pretrained "
            "wrote."
        ) from error


def _describe(base: BaseModel) -> str:
    return f"a {base.family} model of {base.num_layers} layers, hidden size {base.hidden_size}"
