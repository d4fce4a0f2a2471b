"""A data set of encoded conversations for torch, and the batches made of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from atp_patch.contract.errors import ConfigError, InputError
from atp_patch.training.encode import IGNORED
from atp_patch.training.records import Conversation, Source

SKIPPED = "skipped"  # key of a sample or a batch: the numbers of the samples that were left out


class Samples(Dataset):
    """A data set of encoded conversations.

    Args:
        source: the conversations.
        encode: makes the model's inputs of one conversation.
        skip_bad: whether the next good sample takes the place of a bad one. Otherwise a bad one
            raises :class:`InputError`.
    """

    def __init__(
        self, source: Source, encode: Callable[[Conversation], dict[str, Tensor]], skip_bad: bool
    ) -> None:
        self.source, self.encode, self.skip_bad = source, encode, skip_bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        skipped: list[int] = []
        for place in range(index, index + len(self.source)):
            at = place % len(self.source)
            try:
                sample = self._encoded(at)
            except InputError:
                if not self.skip_bad:
                    raise
                skipped.append(at)
                continue
            return {**sample, SKIPPED: torch.tensor(skipped, dtype=torch.long)}
        raise InputError(f"{self.source.name} holds no sample that can be used.")

    def _encoded(self, index: int) -> dict[str, Tensor]:
        conversation = self.source[index]
        try:
            return self.encode(conversation)
        except InputError as error:
            raise InputError(f"sample {index} of {self.source.name}: {error}") from error


def collate(samples: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Make one batch of several samples.

    Tensors of the shape of ``input_ids`` are padded on the right to the longest of them; all others
    are concatenated along their first dimension.

    Args:
        samples: what :class:`Samples` gives.
        pad_id: the token id that fills ``input_ids`` up.

    Raises:
        ConfigError: where images of different samples do not fit into one batch.
    """
    length = max(sample["input_ids"].shape[1] for sample in samples)
    fill = {"input_ids": pad_id, "labels": IGNORED}
    columns: dict[str, list[Tensor]] = {}
    for sample in samples:
        shape = sample["input_ids"].shape
        for name, tensor in sample.items():
            padded = tensor
            if tensor.shape == shape:
                padded = pad(tensor, (0, length - shape[1]), value=fill.get(name, 0))
            columns.setdefault(name, []).append(padded)
    try:
        return {name: torch.cat(tensors) for name, tensors in columns.items()}
    except RuntimeError as error:
        raise ConfigError(
            "images of different samples do not fit into one batch of this model; give "
            "micro_batch_size: 1."
        ) from error
