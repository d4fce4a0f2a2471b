"""Ids of words, computed without any library, as the built-in tokenizer computes them."""

from __future__ import annotations

import re
from functools import cache

from atp_patch.builtin.vocabulary import OPENERS, words

PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "USER:",
    "ASSISTANT:",
)
SPECIALS: tuple[str, ...] = (PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT)
VOCABULARY_SIZE = 128
"""Number of rows of the embedding; those after the words are unused."""

_SPLIT = re.compile(r"\w+|[^\w\s]")


@cache
def word_ids() -> dict[str, int]:
    """Return the id of each token, special tokens first. The result must not be changed."""
    return {token: k for k, token in enumerate((*SPECIALS, *words()))}


def encode(text: str) -> list[int]:
    """Return the ids of the words of a question or an answer; unknown words become `<unk>`."""
    ids = word_ids()
    lowered = [w.lower() if w in OPENERS else w for w in _SPLIT.findall(text)]
    return [ids.get(w, ids[UNK]) for w in lowered]


def prompt(question: str) -> str:
    """Return the prompt of a question about one image, as the chat template writes it."""
    return f"{BOS}USER: {IMAGE} {question} {ASSISTANT}"
