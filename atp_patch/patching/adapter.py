"""Adapters: a configuration in JSON and, if a method has learned weights, a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from atp_patch.contract.arguments import shown
from atp_patch.contract.errors import ATPError, ConfigError, HubError, WeightsError, first_line
from atp_patch.methods import (
    BeforeDecoder,
    LayerMethod,
    ModuleSpec,
    VoCo,
    make_method,
    make_methods,
)
from atp_patch.patching.config import BaseModel, PruningConfig
from atp_patch.patching.voco import check_alone

CONFIG_FILE = "atp_config.json"
WEIGHTS_FILE = "atp_model.safetensors"
CARD_FILE = "README.md"
_MODELS_FILES = ("config.json", "adapter_config.json", CARD_FILE)
_MOST_CONFIG_BYTES = 2**20
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = 1e6  # the largest learned weight, so that sums of heads' inputs stay within float32
# What the Hub's client raises: errors of its HTTP library, of files and sockets, and of uploads.
_HUB_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    EntryNotFoundError,
    HFValidationError,
    RuntimeError,
)
Beside = Literal["lora", "model"]  # what was trained with an adapter, and the name of its folder


class Adapter(ModelHubMixin):
    """A pruning configuration and its learned weights, to save, load and push together.

    Attributes:
        pruning: the configuration.
        tensors: the learned weights by name; empty if the method learns nothing.
        beside: "lora" or "model", what was trained together with the adapter and is stored in the
            folder of that name next to the adapter's; None if nothing was.
    """

    def __init__(
        self,
        pruning: PruningConfig,
        tensors: dict[str, Tensor],
        beside: Beside | None = None,
    ) -> None:
        self.pruning, self.tensors, self.beside = pruning, tensors, beside
        # Otherwise the mixin writes the arguments above into a config.json.
        self._hub_mixin_config = None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Save the adapter to a folder, as ``ModelHubMixin.save_pretrained`` does.

        A folder that holds a model is refused, because the mixin would remove its config.json.

        Raises:
            ConfigError: if the folder holds something else or cannot be written to.
            WeightsError: if a learned weight is NaN, infinite or absurdly large.
        """
        folder = Path(save_directory)
        own = {CARD_FILE} if (folder / CONFIG_FILE).exists() else set()
        foreign = [name for name in _MODELS_FILES if name not in own and (folder / name).exists()]
        if foreign:
            raise ConfigError(
                f"{folder} holds the {foreign[0]} of something else; save the adapter to another "
                "folder."
            )
        check_values(self.tensors, "the learned weights")
        try:
            return super().save_pretrained(folder, **kwargs)
        except ATPError:
            raise
        except OSError as error:
            raise ConfigError(
                f"the adapter cannot be written to {folder} ({first_line(error)}); give another "
                "folder."
            ) from error

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the adapter to the Hub, as ``ModelHubMixin.push_to_hub`` does.

        Raises:
            HubError: if the Hub refuses it or cannot be reached.
        """
        try:
            return super().push_to_hub(repo_id, **kwargs)
        except ATPError:
            raise
        except _HUB_ERRORS as error:
            raise HubError(
                f"the adapter was not pushed to {shown(repo_id)} ({first_line(error)}). Give a "
                "name like USER/REPOSITORY that you may write to, log in with `hf auth login` or "
                "give token=, check the network, and push again."
            ) from error

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
        """Return the card that :meth:`card` writes, instead of the mixin's template."""
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
        elif before is not None and pruning.method is None and before.options.get("share"):
            budget = f"a share of {before.options['share']:g} of the visual tokens"
        elif (
            before is not None
            and pruning.method is None
            and not make_method(before.method, before.options).needs_budget
        ):
            budget = "the image decides"
        elif not self.tensors:
            budget = "a quarter of the visual tokens on average over all decoder layers"
        where = f"layers {list(pruning.layers)}"
        if before is not None:
            where = "the decoder" + (f" and {where}" if pruning.layers else "")
        return f"It prunes before {where}; budget: {budget}."


# How an adapter is loaded, for each value of ``beside``.
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
    learned_module: nn.Module | None,
    state_dict: Mapping[str, Tensor] | None = None,
    beside: Beside | None = None,
) -> Adapter:
    """Make the adapter of a patched model.

    Args:
        config: the configuration of the patch.
        learned_module: the module that the method learns, or None.
        state_dict: the whole weights of that module, if this process holds only a part of them.
        beside: as in :class:`Adapter`.

    Raises:
        WeightsError: if this process holds only a part of the weights and ``state_dict`` is not
            given or not complete.
    """
    learned: Mapping[str, Tensor] = (
        {} if learned_module is None else learned_module.state_dict(keep_vars=True)
    )
    if state_dict is not None:
        lacking = sorted(set(learned) - set(state_dict))
        if lacking:
            raise WeightsError(
                f"state_dict lacks the learned weight {lacking[0]}; give that of the whole "
                "model: Accelerator.get_state_dict(model)."
            )
        learned = {name: state_dict[name] for name in learned}
    if any(map(_in_parts, learned.values())):
        raise WeightsError(
            "the learned weights are spread over processes; give all of them: in all processes "
            "state = accelerator.get_state_dict(model), and in the first "
            "save_pretrained(..., state_dict=state)."
        )
    tensors = {name: tensor.detach() for name, tensor in learned.items()}
    return Adapter(config, tensors, beside)


def load_adapter(
    source: str | Path, base: BaseModel
) -> tuple[PruningConfig, BeforeDecoder | VoCo | None, LayerMethod | None, dict[str, Tensor]]:
    """Read an adapter from a folder or the Hub and check that it is complete and fits ``base``.

    No memory of a size that the configuration names is allocated before the weights file is found
    to hold tensors of that size.

    Returns:
        The configuration, the method before the decoder, the method inside it, and the learned
        weights in the dtypes of the method's module.

    Raises:
        WeightsError: if a file is missing, damaged, of another program, or made for another model.
    """
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"weights={shown(source)}: give a folder or the name of a Hub repository."
        )
    config = _read_config(source)
    if config.base != base:
        raise WeightsError(
            f"{source} was made for {_describe(config.base)}, but this model is "
            f"{_describe(base)}; load the model it was made for, or patch without weights."
        )
    try:
        before, inside = _methods_of(config)
        expected = _expected(config, before, inside)
    except ConfigError as error:
        raise WeightsError(f"{source}/{CONFIG_FILE}: {error}") from error
    if expected:
        return config, before, inside, _read_tensors(source, expected)
    if is_folder(source) and (Path(source) / WEIGHTS_FILE).exists():
        raise WeightsError(
            f"{source}/{WEIGHTS_FILE} holds weights, but nothing was learned according to "
            f"{CONFIG_FILE}. "
            "Save the adapter anew with atp_patch.save_pretrained."
        )
    return config, before, inside, {}


def is_folder(source: str | Path) -> bool:
    """Whether a folder of this name exists; False for names that are not valid paths."""
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):
        return False


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that learned tensors hold usable numbers.

    Args:
        tensors: the tensors by name.
        where: where they come from, for the error message.

    Raises:
        WeightsError: if a number is NaN, infinite or absurdly large.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        wrong = None
        if not tensor.isfinite().all():
            wrong = "NaN or infinite values"
        elif tensor.is_floating_point() and (tensor.abs() > _LARGEST).any():
            wrong = f"values beyond {_LARGEST:g}"
        if wrong is not None:
            raise WeightsError(
                f"{where}: {name} holds {wrong}. The training that made it has diverged or the "
                "file is damaged; take an earlier adapter."
            )


def read_text(file: Path, where: str) -> str:
    """Read the text of a configuration file, which error messages call ``where``.

    Raises:
        WeightsError: if the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        if file.stat().st_size > _MOST_CONFIG_BYTES:
            raise WeightsError(f"{where} is too large for a configuration.")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{where} is no text in UTF-8 ({error}).") from error
    except OSError as error:
        raise WeightsError(f"{where} cannot be read ({first_line(error)}).") from error


def _read_config(source: str | Path) -> PruningConfig:
    """Read the configuration from an adapter's JSON."""
    where, file = f"{source}/{CONFIG_FILE}", _fetch(source, CONFIG_FILE)
    return PruningConfig.from_json(read_text(file, where), where)


def _methods_of(
    config: PruningConfig,
) -> tuple[BeforeDecoder | VoCo | None, LayerMethod | None]:
    """Make the methods that a configuration names, before the decoder and inside it.

    Raises:
        ConfigError: if a method prunes at another place than it is named for, or its options are
            wrong.
    """
    stages = [] if config.before is None else [(config.before.method, config.before.options)]
    stages += [] if config.method is None else [(config.method, config.options)]
    before, inside = make_methods([make_method(*stage) for stage in stages], {})
    if (before is None) != (config.before is None):
        raise ConfigError(
            f"{config.name} is in the wrong place: before= is for a method that prunes before the "
            "decoder, method= for one that prunes inside it."
        )
    if isinstance(before, VoCo):
        check_alone(config)
    return before, inside


def _expected(
    config: PruningConfig, before: BeforeDecoder | VoCo | None, inside: LayerMethod | None
) -> dict[str, Tensor]:
    """The tensors that an adapter of this configuration must hold, by name, on the meta device."""
    module: nn.Module | None = None
    with torch.device("meta"):
        if inside is not None:
            spec = ModuleSpec(config.layers, config.base.hidden_size, config.shares(None))
            module = inside.build(spec)
        elif isinstance(before, VoCo):
            module = before.build(config.base.hidden_size)
    return {} if module is None else dict(module.state_dict())


def _read_tensors(source: str | Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the learned weights, after checking that the file's header lists exactly these."""
    where, file = f"{source}/{WEIGHTS_FILE}", _fetch(source, WEIGHTS_FILE)
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            _check_shapes(where, shapes, {name: tuple(one.shape) for name, one in expected.items()})
            read = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{where} is not a safetensors file ({first_line(error)}).") from error
    for name, tensor in read.items():
        wanted = expected[name].dtype
        if tensor.dtype not in (_FLOATS if wanted in _FLOATS else (wanted,)):
            raise WeightsError(
                f"{where}: {name} is of {tensor.dtype}, not of {wanted}. Save the adapter anew "
                "with atp_patch.save_pretrained."
            )
    tensors = {name: tensor.to(expected[name].dtype) for name, tensor in read.items()}
    check_values(tensors, where)
    return tensors


def _in_parts(tensor: Tensor) -> bool:
    """Whether a tensor is only a part, as shards of FSDP2 and unused parameters of ZeRO-3 are."""
    shard = hasattr(tensor, "full_tensor")
    return shard or tensor.numel() != getattr(tensor, "ds_numel", tensor.numel())


def _check_shapes(
    where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise WeightsError if a file does not hold exactly the expected tensors."""
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    wrong = sorted(k for k in set(expected) & set(found) if found[k] != expected[k])
    if missing or unknown or wrong:
        raise WeightsError(
            f"{where} does not hold this adapter's tensors: {len(missing)} missing "
            f"{missing[:3]}, {len(unknown)} unknown {shown(unknown[:3])}, {len(wrong)} of wrong "
            f"shape {wrong[:3]}. Save the adapter anew with atp_patch.save_pretrained."
        )


def adapter_files(source: str | Path) -> Path:
    """Return the folder of an adapter's files, which are fetched from the Hub if needed.

    Raises:
        WeightsError: if there is no such adapter.
    """
    file = _fetch(source, CONFIG_FILE)
    if not is_folder(source):
        config = _read_config(source)
        if _expected(config, *_methods_of(config)):
            _fetch(source, WEIGHTS_FILE)
    return file.parent


def _fetch(source: str | Path, name: str) -> Path:
    """Return the path of an adapter's file, from a folder if there is one, else from the Hub."""
    if is_folder(source):
        folder, file = Path(source), Path(source, name)
        if file.is_file():
            return file
        raise WeightsError(f"{folder} has no {name}; give a folder that save_pretrained wrote.")
    try:
        return Path(hf_hub_download(str(source), name))
    except _HUB_ERRORS as error:
        raise WeightsError(
            f"{shown(str(source))} is neither a folder nor an adapter on the Hub that can be "
            f"reached ({type(error).__name__}); check the name, or give a folder that "
            "save_pretrained wrote."
        ) from error


def _describe(base: BaseModel) -> str:
    return f"a {base.family} model of {base.num_layers} layers, hidden size {base.hidden_size}"
