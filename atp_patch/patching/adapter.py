"""Adapters: a configuration in JSON and, where something was learned, safetensors. Nothing else."""

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
_LARGEST = 1e6  # of learned weights: a sum over any heads' inputs stays within float32
# What the Hub's client raises: errors of its HTTP library, of files and sockets, and of uploads.
_HUB_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    EntryNotFoundError,
    HFValidationError,
    RuntimeError,
)
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
            ConfigError: where the folder holds something else or cannot be written to.
            WeightsError: where what was learned is NaN, infinite or absurdly large.
        """
        folder = Path(save_directory)
        own = {CARD_FILE} if (folder / CONFIG_FILE).exists() else set()
        foreign = [name for name in _MODELS_FILES if name not in own and (folder / name).exists()]
        if foreign:
            raise ConfigError(
                f"{folder} holds {foreign[0]} of something else; save the adapter to a folder of "
                "its own."
            )
        check_values(self.tensors, "what was learned")
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
        """As the mixin's.

        Raises:
            HubError: where the Hub refuses it or cannot be reached.
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


def load_adapter(
    source: str | Path, base: BaseModel
) -> tuple[PruningConfig, BeforeDecoder | VoCo | None, LayerMethod | None, dict[str, Tensor]]:
    """Read an adapter from a folder or the Hub and check that it is whole and made for ``base``.

    Nothing of the size that it names is allocated before its files are found to hold that much.

    Returns:
        The configuration, the method before the decoder, the one inside it, and what was learned,
        in the types that the method's module has.

    Raises:
        WeightsError: naming the file, and what is missing, foreign, or made for another model.
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
            f"{source}/{WEIGHTS_FILE} holds weights, but by {CONFIG_FILE} nothing was learned. "
            "Save the adapter anew with atp_patch.save_pretrained."
        )
    return config, before, inside, {}


def is_folder(source: str | Path) -> bool:
    """Whether there is a folder of this name, which may be one that no file system takes."""
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):
        return False


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that learned tensors hold numbers that can be computed with.

    Raises:
        WeightsError: for NaN, infinite and absurdly large ones.
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
    """The text of a configuration file; errors call it ``where``.

    Raises:
        WeightsError: where it cannot be read, is too large, or is no UTF-8.
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
    """The configuration in an adapter's JSON."""
    where, file = f"{source}/{CONFIG_FILE}", _fetch(source, CONFIG_FILE)
    return PruningConfig.from_json(read_text(file, where), where)


def _methods_of(
    config: PruningConfig,
) -> tuple[BeforeDecoder | VoCo | None, LayerMethod | None]:
    """The methods that a configuration names, each of the kind that its place is for.

    Raises:
        ConfigError: where they are not, or their options are wrong.
    """
    stages = [] if config.before is None else [(config.before.method, config.before.options)]
    stages += [] if config.method is None else [(config.method, config.options)]
    before, inside = make_methods([make_method(*stage) for stage in stages], {})
    if (before is None) != (config.before is None):
        raise ConfigError(
            f"{config.name} stands in the wrong place: before= is for what prunes before the "
            "decoder, method= for what prunes inside it."
        )
    if isinstance(before, VoCo):
        check_alone(config)
    return before, inside


def _expected(
    config: PruningConfig, before: BeforeDecoder | VoCo | None, inside: LayerMethod | None
) -> dict[str, Tensor]:
    """Names, shapes and types of what the adapter of this configuration brings, without memory."""
    module: nn.Module | None = None
    with torch.device("meta"):
        if inside is not None:
            spec = ModuleSpec(config.layers, config.base.hidden_size, config.shares(None))
            module = inside.build(spec)
        elif isinstance(before, VoCo):
            module = before.build(config.base.hidden_size)
    return {} if module is None else dict(module.state_dict())


def _read_tensors(source: str | Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was learned, read after the file's header was found to hold just that."""
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
    """A shard of FSDP2's, or what ZeRO-3 leaves of a parameter between its uses."""
    shard = hasattr(tensor, "full_tensor")
    return shard or tensor.numel() != getattr(tensor, "ds_numel", tensor.numel())


def _check_shapes(
    where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise WeightsError where a file holds other tensors than were expected."""
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
    """The folder in which an adapter's files lie, fetched from the Hub where it is there.

    Raises:
        WeightsError: where there is none.
    """
    file = _fetch(source, CONFIG_FILE)
    if not is_folder(source):
        config = _read_config(source)
        if _expected(config, *_methods_of(config)):
            _fetch(source, WEIGHTS_FILE)
    return file.parent


def _fetch(source: str | Path, name: str) -> Path:
    """A file of an adapter: from a folder where there is one, else from the Hub."""
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
