"""Relevance of visual tokens to a question by a CLIP model, for door methods that name one.

A LLaVA checkpoint holds CLIP's vision tower without the last normalisation and the projection into
the space that pictures and texts share, and nothing of CLIP's text encoder. These parts come from
the CLIP checkpoint that the method names.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from atp_patch.contract import DoorView, TextEncoder, Tower
from atp_patch.contract.errors import InputError, UnsupportedModelError, WeightsError
from atp_patch.seam import Parts


class ClipRelevance:
    """Compares the vision tower's tokens with the question in CLIP's shared space.

    Args:
        clip: a ``transformers.CLIPModel``, of which the vision encoder's blocks are not used.
        tokens_of: CLIP's own tokenizer.
        words_of: the tokenizer of the patched model.
    """

    def __init__(self, clip: Any, tokens_of: Any, words_of: Any) -> None:
        self.text_model, self.text_projection = clip.text_model, clip.text_projection
        self.norm = clip.vision_model.post_layernorm
        self.projection = clip.visual_projection
        self.tokens_of, self.words_of = tokens_of, words_of

    @classmethod
    def load(cls, asked: TextEncoder, parts: Parts, tower: Tower | None) -> ClipRelevance:
        """Load what a method names.

        Args:
            asked: paths or ids of the CLIP model and of the patched model's tokenizer.
            parts: the modules of the patched model.
            tower: its vision tower, or None if its tokens cannot be followed to their places.

        Raises:
            UnsupportedModelError: if the patched model's vision tower is not CLIP's.
            WeightsError: if something cannot be loaded, or the CLIP model has another vision tower.
        """
        vision: Any = getattr(parts.model.config, "vision_config", None)
        kind = getattr(vision, "model_type", "none")
        if tower is None or not tower.tokenwise or kind != "clip_vision_model":
            raise UnsupportedModelError(
                f"clip={asked.clip!r} compares tokens of CLIP's vision tower with the question, "
                f"and the tower of this model is {kind}; leave clip out (then the language model's "
                "own embeddings tell what is relevant), or use a LLaVA model with a CLIP tower."
            )
        words = parts.model.config.name_or_path if asked.tokenizer is None else asked.tokenizer
        if not words:
            raise WeightsError(
                "clip= needs the words of the prompt, and this model was not loaded from a "
                "checkpoint; give tokenizer= a path or id of its tokenizer."
            )
        clip = _loaded(transformers.CLIPModel, "clip", asked.clip, dtype=torch.float32).eval()
        size = clip.visual_projection.in_features
        if size != vision.hidden_size:
            raise WeightsError(
                f"clip={asked.clip!r} has a vision tower of hidden size {size}, this model one of "
                f"{vision.hidden_size}; name the CLIP model whose tower this model has."
            )
        return cls(
            clip.requires_grad_(False),
            _loaded(transformers.AutoTokenizer, "clip", asked.clip),
            _loaded(transformers.AutoTokenizer, "tokenizer", words),
        )

    def of(self, view: DoorView) -> Tensor:
        """Return (B, V) float32: the cosine of each visual token with the question.

        The question is the text behind the first visual token, cut to CLIP's longest text.

        Raises:
            InputError: if the prompt was given as embeddings alone.
        """
        states = view.tower[-1].states
        assert states is not None
        if view.text_ids is None:
            raise InputError(
                "the words of the question are read from input_ids, and the call brought "
                "embeddings alone; pass input_ids, or patch without clip=."
            )
        texts = [
            self.words_of.decode(ids[asked], skip_special_tokens=True)
            for ids, asked in zip(view.text_ids.cpu(), view.question.cpu(), strict=True)
        ]
        device = states.device
        for part in (self.text_model, self.text_projection, self.norm, self.projection):
            part.to(device)
        tokens = self.tokens_of(
            texts,
            padding=True,
            truncation=True,
            max_length=self.text_model.config.max_position_embeddings,
            return_tensors="pt",
        ).to(device)
        pooled = self.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        question = normalize(self.text_projection(pooled), dim=-1)
        picture = normalize(self.projection(self.norm(states)), dim=-1)
        return (picture @ question[..., None])[..., 0]


def _loaded(cls: Any, option: str, name: str, **how: Any) -> Any:
    """Return what ``from_pretrained`` makes of a path or id that an option gave."""
    try:
        return cls.from_pretrained(name, trust_remote_code=False, **how)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{option}={name!r} cannot be loaded as a {cls.__name__} ({type(error).__name__}: "
            f"{error}); give {option}= a folder, or an id on the Hub."
        ) from error
