"""Adapters: a configuration in JSON and, if a method has learned weights, a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from atp_patch.contract.arguments import shown
from atp_patch.contract.errors import ATPError, ConfigError, HubError, WeightsError, first_line
from atp_patch.patching.adapter_card import Beside, model_card
from atp_patch.patching.adapter_files import CARD_FILE, CONFIG_FILE, HUB_ERRORS, WEIGHTS_FILE
from atp_patch.patching.adapter_loading import check_values
from atp_patch.patching.config import PruningConfig

_MODELS_FILES = ("config.json", "adapter_config.json", CARD_FILE)


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
        except HUB_ERRORS as error:
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
        return model_card(self.pruning, self.beside, learned=bool(self.tensors))


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


def _in_parts(tensor: Tensor) -> bool:
    """Whether a tensor is only a part, as shards of FSDP2 and unused parameters of ZeRO-3 are."""
    shard = hasattr(tensor, "full_tensor")
    return shard or tensor.numel() != getattr(tensor, "ds_numel", tensor.numel())
