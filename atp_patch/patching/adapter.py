"""Adapters: a configuration in JSON and, where something was learned, safetensors. Nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atp_patch.contract.errors import ConfigError, WeightsError
from atp_patch.methods import LayerMethod, ModuleSpec, VoCo, make_method
from atp_patch.patching.config import BaseModel, PruningConfig

CONFIG_FILE = "atp_config.json"
WEIGHTS_FILE = "atp_model.safetensors"
CARD_FILE = "README.md"
_MODELS_FILES = ("config.json", "adapter_config.json", CARD_FILE)
Beside = Literal["lora", "model"]  # what learned with an adapter, and a folder's name


class Adapter(ModelHubMixin):
    """A pruning configuration and what was learned for it, as one thing to save, load and push.

    Attributes:
        pruning: the configuration; ``tensors``: name -> what was learned.
        beside: what learned with it and lies in the folder of that name beside its own.
    """

    def __init__(
        self,
        pruning: PruningConfig,
        tensors: dict[str, Tensor],
        beside: Beside | None = None,
    ) -> None:
        self.pruning, self.tensors, self.beside = pruning, tensors, beside
        # The mixin would write the arguments above into a config.json of its own.
        self._hub_mixin_config = None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """As the mixin's, which takes a folder for its own: it removes any config.json there.

        Raises:
            ConfigError: where the folder holds something else.
        """
        folder = Path(save_directory)
        own = {CARD_FILE} if (folder / CONFIG_FILE).exists() else set()
        foreign = [name for name in _MODELS_FILES if name not in own and (folder / name).exists()]
        if foreign:
            raise ConfigError(
                f"{folder} holds {foreign[0]} of something else; save the adapter to a folder of "
                "its own."
            )
        return super().save_pretrained(folder, **kwargs)

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
        pruning, base = self.pruning, self.pruning.base
        return (
            "---\nlibrary_name: atp_patch\ntags:\n- atp_patch\n- visual-token-pruning\n---\n\n"
            f"# Visual token pruning: {pruning.name}\n\n"
            f"Made for a `{base.family}` model with {base.num_layers} decoder layers of hidden "
            f"size {base.hidden_size}. {self._what_it_does()}\n\n"
            f"```python\n{_LOADED[self.beside]}\n```\n"
        )

    def _what_it_does(self) -> str:
        pruning, before = self.pruning, self.pruning.before
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
        elif before is not None and pruning.method is None:
            budget = "the image decides"
        elif not self.tensors:
            budget = "a quarter of the visual tokens on average over all decoder layers"
        where = f"layers {list(pruning.layers)}"
        if before is not None:
            where = "the decoder" + (f" and {where}" if pruning.layers else "")
        return f"It prunes before {where}; budget: {budget}."


# How an adapter is loaded, by what learned beside it.
_LOADED = {
    None: 'import atp_patch\n\natp_patch.patch_model(model, weights="THIS_REPOSITORY_OR_FOLDER")',
    "lora": "from atp_patch import load_trained\n\n"
    "# This adapter is in FOLDER/adapter; FOLDER/lora is the LoRA that learned with it.\n"
    'load_trained(model, "FOLDER")',
    "model": "import atp_patch\n\n# The model in FOLDER/model learned with this adapter.\n"
    'atp_patch.patch_model(model, weights="FOLDER/adapter")',
}


def adapter_of(
    config: PruningConfig,
    heads: nn.Module | None,
    state_dict: Mapping[str, Tensor] | None = None,
    beside: Beside | None = None,
) -> Adapter:
    """The adapter of a patched model.

    Args:
        state_dict: of the heads, where this process holds them in parts.
        beside: as :class:`Adapter` takes it.

    Raises:
        WeightsError: where this process holds a part of what was learned and no ``state_dict``
            was given, or one that lacks something.
    """
    learned: Mapping[str, Tensor] = {} if heads is None else heads.state_dict(keep_vars=True)
    if state_dict is not None:
        lacking = sorted(set(learned) - set(state_dict))
        if lacking:
            raise WeightsError(
                f"state_dict lacks {lacking[0]} of the threshold heads; give that of the whole "
                "model: Accelerator.get_state_dict(model)."
            )
        learned = {name: state_dict[name] for name in learned}
    if any(map(_in_parts, learned.values())):
        raise WeightsError(
            "what was learned is spread over processes; give it whole: in all processes "
            "state = accelerator.get_state_dict(model), and in the first "
            "save_pretrained(..., state_dict=state)."
        )
    tensors = {name: tensor.detach() for name, tensor in learned.items()}
    return Adapter(config, tensors, beside)


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
        assert isinstance(method, LayerMethod)
        spec = ModuleSpec(config.layers, config.base.hidden_size, config.shares(None))
        return method.build(spec)
    before = None
    if config.before is not None:
        before = make_method(config.before.method, config.before.options)
    return before.build(config.base.hidden_size) if isinstance(before, VoCo) else None


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


def adapter_files(source: str | Path) -> Path:
    """The folder in which an adapter's files lie, fetched from the Hub where it is there.

    Raises:
        WeightsError: where there is none.
    """
    file = _fetch(source, CONFIG_FILE)
    if not Path(source).is_dir():
        text = file.read_text(encoding="utf-8")
        if _module(PruningConfig.from_json(text, f"{source}/{CONFIG_FILE}")) is not None:
            _fetch(source, WEIGHTS_FILE)
    return file.parent


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
