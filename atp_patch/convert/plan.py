"""Plans of conversions, and the check that each tensor is written exactly once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract.errors import ConfigError, WeightsError
from atp_patch.convert.source import Source
from atp_patch.tools.loading import first_line

Change = Callable[[Tensor], Tensor]
SHOWN = 4  # a message lists so many names


@dataclass(frozen=True)
class Rule:
    r"""What becomes of the tensors whose names fit a pattern.

    Attributes:
        pattern: a regular expression for the whole old name.
        targets: the new names, in which ``\1`` stands for the pattern's first group. Where there
            are several, the tensor is cut into equal parts along its first dimension; where there
            are none, it is left out.
    """

    pattern: str
    targets: tuple[str, ...] = ()

    def apply(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]] | None:
        """Return the new names and tensors, or None where the rule does not fit the name."""
        match = re.fullmatch(self.pattern, name)
        if match is None:
            return None
        if not self.targets:
            return []
        names = [match.expand(target) for target in self.targets]
        if tensor.ndim == 0 or tensor.shape[0] % len(names):
            raise WeightsError(
                f"{name} of shape {tuple(tensor.shape)} cannot be cut into {len(names)} parts; the "
                "checkpoint is of another layout."
            )
        return list(zip(names, tensor.chunk(len(names)), strict=True))


@dataclass
class Plan:
    """The plan of one conversion.

    Attributes:
        architecture: the class of transformers that the new checkpoint is for.
        config: configuration of the new model.
        sources: the folders in which tensors are read.
        rules: the first rule that fits a tensor's name says what becomes of it. The new names are
            those that files on the Hub have.
        changes: by new name, a function that is applied to the tensor.
        made: by new name, a function that makes a tensor that no source holds, of the given dtype.
        save_more: writes everything but configuration and weights to a folder.
        notes: what the user still has to do.
    """

    architecture: Any
    config: Any
    sources: Sequence[Source]
    rules: Sequence[Rule]
    save_more: Callable[[Path], None]
    changes: Mapping[str, Change] = field(default_factory=dict)
    made: Mapping[str, Callable[[torch.dtype], Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def renamed(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]] | None:
        """Return the names and tensors that an old tensor becomes; None where no rule fits its
        name.
        """
        for rule in self.rules:
            found = rule.apply(name, tensor)
            if found is not None:
                return [(new, self.changes.get(new, _same)(part)) for new, part in found]
        return None

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Return all new names and tensors, each read when it is asked for.

        Args:
            dtype: the dtype of the tensors that no source holds.
        """
        for source in self.sources:
            for name, tensor in source.tensors():
                yield from self.renamed(name, tensor) or ()
        for name, make in self.made.items():
            yield name, make(dtype)

    def check(self) -> dict[str, Tensor]:
        """Check that the new tensors are exactly those of the new model.

        Returns:
            the new tensors by name, without their data, in the order of :meth:`tensors`.

        Raises:
            WeightsError: naming tensors that are missing, unexpected, of another shape or there
                twice.
            ConfigError: where the config describes no model.
        """
        found: dict[str, Tensor] = {}
        unexpected: list[str] = []
        for source in self.sources:
            for old, tensor in source.meta():
                new = self.renamed(old, tensor)
                if new is None:
                    unexpected.append(old)
                twice = [name for name, _ in new or () if name in found]
                if twice:
                    raise WeightsError(f"{twice[0]} would be written twice, from {old} too.")
                found.update(new or ())
        if unexpected:
            raise WeightsError(
                f"{len(unexpected)} unexpected tensors: {_some(unexpected)}. The checkpoint is of "
                "another layout, or of a changed architecture that cannot be converted."
            )
        dtype = self.dtype(found)
        found.update({name: make(dtype).to("meta") for name, make in self.made.items()})
        self._compare(found)
        return found

    def _compare(self, found: Mapping[str, Tensor]) -> None:
        """Compare the tensors with those of the new model, by name and by shape."""
        try:
            with torch.device("meta"):
                model = self.architecture(self.config)
        except Exception as error:  # numbers that fit no model raise errors of every kind
            raise ConfigError(
                f"config.json describes no model that can be built ({type(error).__name__}: "
                f"{first_line(error)}); give the one that belongs to the weights."
            ) from error
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if self.config.tie_word_embeddings:
            wanted.pop("lm_head.weight")  # it is the table of embeddings
        given = {_in_memory(name, wanted): tensor.shape for name, tensor in found.items()}
        missing, beyond = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
        if missing or beyond:
            raise WeightsError(
                f"{len(missing)} tensors are missing ({_some(missing)}), {len(beyond)} have no "
                f"place ({_some(beyond)}) in the model that the config describes: the checkpoint "
                "is not whole, or its config.json is another one's."
            )
        wrong = [name for name in wanted if wanted[name] != given[name]]
        if wrong:
            name = wrong[0]
            raise WeightsError(
                f"{len(wrong)} tensors have another shape than the config says, {name} "
                f"{tuple(given[name])} instead of {tuple(wanted[name])}; give the config.json that "
                "belongs to the weights."
            )

    @staticmethod
    def dtype(found: Mapping[str, Tensor]) -> torch.dtype:
        """Return the dtype of the language model's embeddings."""
        embeddings = (x.dtype for name, x in found.items() if name.endswith("embed_tokens.weight"))
        return next(embeddings, torch.float32)


def _in_memory(name: str, wanted: Mapping[str, Any]) -> str:
    """Return the name that a tensor has in the model in memory, by its name in files on the Hub."""
    name = name.replace("language_model.lm_head.", "lm_head.")
    name = name.replace("language_model.model.", "language_model.")
    name = name if name.startswith("lm_head.") else f"model.{name}"
    # Newer versions of transformers leave this part out of the names in CLIP towers.
    plain = name.replace("vision_tower.vision_model.", "vision_tower.")
    return plain if plain in wanted else name


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _some(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "") or "none"
