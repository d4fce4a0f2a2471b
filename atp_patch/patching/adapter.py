"""Adapters: a configuration in JSON and, if a method has learned weights, a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from atp_patch.contract.errors import ATPError, ConfigError, HubError, WeightsError, first_line
from atp_patch.patching.adapter_card import Beside, model_card
from atp_patch.patching.adapter_files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from atp_patch.patching.adapter_loading import check_values
from atp_patch.patching.config import PruningConfig
from atp_patch.patching.hub_errors import HUB_ERRORS, explained
from atp_patch.patching.made_with import KEY, MadeWith

_MODELS_FILES = ("config.json", "adapter_config.json", CARD_FILE)


class Adapter(ModelHubMixin):
    """A pruning configuration and its learned weights, to save, load and push together.

    Attributes:
        pruning: the configuration.
        tensors: the learned weights by name; empty if the method learns nothing.
        made_with: the model, and the versions, that it was made with.
        beside: "lora" or "model", what was trained together with the adapter and is stored in the
            folder of that name next to the adapter's; None if nothing was.
        place: the folder or repository from which the card loads the adapter; None: the folder that
            it is saved to.
        section: the section of the card that says how it was trained, or nothing.
        license: the licence that the card names, by the Hub's name for it, or None.
    """

    def __init__(
        self,
        pruning: PruningConfig,
        tensors: dict[str, Tensor],
        made_with: MadeWith,
        beside: Beside | None = None,
        *,
        place: str | None = None,
        section: str = "",
        license: str | None = None,  # noqa: A002  (the Hub's name for it)
    ) -> None:
        self.pruning, self.tensors, self.made_with = pruning, tensors, made_with
        self.beside, self.place, self.section, self.license = beside, place, section, license
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

        An earlier adapter in the repository is replaced.

        Raises:
            HubError: if the Hub refuses it or cannot be reached.
        """
        kwargs.setdefault("delete_patterns", [CONFIG_FILE, WEIGHTS_FILE])
        kwargs.setdefault("commit_message", f"Adapter of atp_patch: {self.pruning.name}")
        place, self.place = self.place, str(repo_id)
        try:
            return super().push_to_hub(repo_id, **kwargs)
        except ATPError:
            raise
        except HUB_ERRORS as error:
            said = explained(error, str(repo_id), kwargs.get("branch"), writing=True)
            raise HubError(f"the adapter was not pushed: {said}") from error
        finally:
            self.place = place

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / CONFIG_FILE).write_text(self.to_json(), encoding="utf-8")
        weights = save_directory / WEIGHTS_FILE
        weights.unlink(missing_ok=True)
        if self.tensors:
            tensors = {
                name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()
            }
            save_file(tensors, weights, metadata={"format": "pt"})
        card = self.card(str(save_directory))
        (save_directory / CARD_FILE).write_text(card, encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """Return the card that :meth:`card` writes, instead of the mixin's template."""
        from huggingface_hub import ModelCard

        return ModelCard(self.card(), ignore_metadata_errors=True)

    def to_json(self) -> str:
        """Return the JSON of the configuration file, with what the adapter was made with."""
        data = json.loads(self.pruning.to_json())
        return json.dumps({**data, KEY: asdict(self.made_with)}, indent=2) + "\n"

    def card(self, folder: str = "my-adapter") -> str:
        """Return the model card, for an adapter that is loaded from ``place``, or else from a
        folder.

        Of an absolute path it names the last folder alone: the others say where its author works.
        """
        place = self.place or folder
        place = Path(place).name if Path(place).is_absolute() else place
        return model_card(
            self.pruning,
            self.made_with,
            self.beside,
            learned=bool(self.tensors),
            place=place,
            section=self.section,
            license=self.license,
        )


def adapter_of(
    config: PruningConfig,
    made_with: MadeWith,
    learned_module: nn.Module | None,
    state_dict: Mapping[str, Tensor] | None = None,
    beside: Beside | None = None,
) -> Adapter:
    """Make the adapter of a patched model.

    Args:
        config: the configuration of the patch.
        made_with: the model, and the versions, that it was made with.
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
    return Adapter(config, tensors, made_with, beside)


def _in_parts(tensor: Tensor) -> bool:
    """Return whether a tensor is only a part, as shards of FSDP2 and unused parameters of ZeRO-3
    are.
    """
    shard = hasattr(tensor, "full_tensor")
    return shard or tensor.numel() != getattr(tensor, "ds_numel", tensor.numel())
