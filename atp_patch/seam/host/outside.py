"""Models of other packages, which feed a causal language model of transformers with embeddings.

The seam then hooks into that language model. Which positions are visual follows from what the model
around it was given: from the placeholders in ``input_ids``, or from the labels that its own
embedding method returns.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract.errors import InputError
from atp_patch.seam.host.locate import Parts
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.replaced import Replaced

IGNORED_LABEL = -100
_OWN_LABEL = -1  # replaces the caller's own -100 while the embedding method runs


class _Embedded(PerThread):
    """What the outer model's embedding method made in the running thread.

    Attributes:
        visual: (B, L) bool, the visual positions; None before the method has run, and after a pass
            has taken them.
    """

    def __init__(self) -> None:
        self.visual: Tensor | None = None


class Outside:
    """What the model around the language model tells; nothing for transformers' own models."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._embedded = _Embedded()
        self._embed: Replaced | None = None

    def install(self) -> None:
        """Put :meth:`embed` in place of the outer model's embedding method, where it has one."""
        outer = self.parts.outer
        if outer is not None and outer.embed is not None:
            self._embed = Replaced(self.parts.model, outer.embed, self.embed)

    def remove(self) -> None:
        """Put the outer model's own embedding method back."""
        if self._embed is not None:
            self._embed.restore()

    @property
    def generation_config(self) -> Any:
        """The generation config that ``generate`` uses where it is given none."""
        parts = self.parts
        return (parts.top if parts.outer is None else _language_model(parts)).generation_config

    def named(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call of a method of the top module, by name."""
        if not args:
            return kwargs
        names = list(inspect.signature(getattr(type(self.parts.top), method)).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def visual(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return (B, L) bool: the visual positions in what a method of the top module is given.

        The result is None for models of transformers, and where the call holds no images.

        Raises:
            InputError: where the outer model's placeholder is not set yet, or where it packed
                several samples into one row.
        """
        outer = self.parts.outer
        if outer is None:
            return None
        given = self.named(method, args, kwargs)
        if outer.image_token is not None:
            return self._placeholders(given.get("input_ids"), outer.image_token)
        embeds = given.get("inputs_embeds")
        if embeds is None or self._embedded.visual is None:
            return None
        visual, self._embedded.visual = self._embedded.visual, None
        if visual.shape != embeds.shape[:2]:
            raise InputError(
                f"{outer.embed} made {tuple(visual.shape)} embeddings, but the language model got "
                f"{tuple(embeds.shape[:2])}: samples were packed into one row. Call the model with "
                "packing=False."
            )
        return visual

    def _placeholders(self, ids: Tensor | None, attribute: str) -> Tensor | None:
        token_id = getattr(self.parts.model, attribute)
        if ids is None:
            return None
        if token_id is None:
            raise InputError(
                f"the model's {attribute} is not set, so its visual tokens are not known; set it "
                "to the id of the tokenizer's placeholder, as the model's chat() does."
            )
        return ids == token_id

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """Call the outer model's embedding method and note which positions are visual.

        The method is given labels without -100, so that every -100 in what it returns stands at a
        visual position. The caller gets back the labels that the method would have made.
        """
        assert self._embed is not None
        original = self._embed.original
        bound = inspect.signature(original).bind(*args, **kwargs)
        labels, ids = bound.arguments.get("labels"), bound.arguments["input_ids"]
        bound.arguments["labels"] = (
            torch.zeros_like(ids)
            if labels is None
            else labels.masked_fill(labels == IGNORED_LABEL, _OWN_LABEL)
        )
        embeds, marked, mask = original(*bound.args, **bound.kwargs)
        visual = marked == IGNORED_LABEL
        self._embedded.visual = visual if mask is None else visual & mask.bool()
        known = marked == _OWN_LABEL if labels is not None else torch.ones_like(visual)
        return embeds, marked.masked_fill(known, IGNORED_LABEL), mask


def _language_model(parts: Parts) -> Any:
    """Return the causal language model that a model of another package holds."""
    assert parts.outer is not None
    return getattr(parts.model, parts.outer.decoder)
