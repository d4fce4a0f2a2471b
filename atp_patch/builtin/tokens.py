"""Words to ids, without any library: what training and the shipped tokenizer agree on."""

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
"""Rows of the embedding; the entries beyond the words are unused."""

_SPLIT = re.compile(r"\w+|[^\w\s]")


@cache
def word_ids() -> dict[str, int]:
    """Token -> id: specials first, then words. Treat it as read-only."""
    return {token: k for k, token in enumerate((*SPECIALS, *words()))}


def encode(text: str) -> list[int]:
    """Ids of a question's or an answer's words; unknown words become `<unk>`."""
    ids = word_ids()
    lowered = [w.lower() if w in OPENERS else w for w in _SPLIT.findall(text)]
    return [ids.get(w, ids[UNK]) for w in lowered]


def prompt(question: str) -> str:
    """The prompt of one question about one image, as the chat template writes it."""
    return f"{BOS}USER: {IMAGE} {question} {ASSISTANT}"
