"""Conversations as tensors: the processor's chat template writes the text, and the answers alone
get labels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from atp_patch.contract.errors import InputError, UnsupportedModelError
from atp_patch.tools.loading import first_line
from atp_patch.training.records import Conversation

IGNORED = -100  # label of a token that is not learned


class Encoder:
    """Encodes conversations for one model.

    Each answer is found in the text that the chat template writes. It is learned together with the
    end token behind it; where the template writes no end token, one is put after each answer.

    Args:
        processor: the model's own, with a chat template and a fast tokenizer.
        placeholders: ids of the tokens that stand for visual tokens.
        max_length: the most tokens of a sample, after which it is cut; None: there is no limit.

    Raises:
        UnsupportedModelError: where the processor lacks what is needed.
    """

    def __init__(
        self, processor: Any, placeholders: Collection[int], max_length: int | None
    ) -> None:
        self.processor, self.placeholders = processor, frozenset(placeholders)
        self.max_length = max_length
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} does not tell where its tokens stand in the text; "
                "training needs a fast tokenizer."
            )
        if getattr(processor, "chat_template", None) is None or tokenizer.eos_token is None:
            raise UnsupportedModelError(
                "the processor needs a chat template, and its tokenizer an end token."
            )

    def __call__(self, conversation: Conversation) -> dict[str, Tensor]:
        """Encode one conversation.

        Returns:
            the model's inputs as its processor makes them, and ``labels`` (1, L).

        Raises:
            InputError: where the processor refuses the sample, or nothing of an answer is left.
        """
        text, spans = self._rendered(conversation)
        tokenizer = self.processor.tokenizer
        bos = tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        images = [list(conversation.images)] if conversation.images else None
        try:
            batch = self.processor(
                text=[text], images=images, add_special_tokens=special, return_tensors="pt"
            )
        except (ValueError, IndexError, StopIteration) as error:
            raise InputError(f"the model's processor refuses it: {first_line(error)}") from error
        plain = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        learned = [
            any(start < stop and a < stop and start < b for a, b in spans)
            for start, stop in plain["offset_mapping"]
        ]
        ids = batch["input_ids"]
        answer = torch.tensor(
            [align(plain["input_ids"], learned, ids[0].tolist(), self.placeholders)]
        )
        inputs = {**batch, "labels": ids.masked_fill(~answer, IGNORED)}
        return inputs if self.max_length is None else self._cut(inputs, self.max_length)

    @property
    def pad_id(self) -> int:
        """The id that fills up the shorter rows of a batch."""
        tokenizer = self.processor.tokenizer
        found = tokenizer.pad_token_id
        return int(tokenizer.eos_token_id if found is None else found)

    def _rendered(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the whole text, and the range of characters in which each answer stands."""
        eos = self.processor.tokenizer.eos_token
        for end in ("", eos):
            found = self._spans(conversation.messages(end), eos)
            if found is not None:
                return found
        raise UnsupportedModelError("the chat template drops the end token after an answer.")

    def _spans(
        self, messages: list[dict[str, Any]], eos: str
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """Return what :meth:`_rendered` gives, or None where no end token follows an answer."""
        text, spans = self._render(messages), []
        for turn in range(1, len(messages), 2):
            before = self._render(messages[:turn], add_generation_prompt=True)
            after = self._render(messages[: turn + 1])
            answer = messages[turn]["content"][0]["text"].removesuffix(eos)
            at = text.find(answer, len(before))
            inside = at >= 0 and at + len(answer) <= len(after)
            if not text.startswith(before) or not text.startswith(after) or not inside:
                raise UnsupportedModelError(
                    "the chat template writes a turn differently once others follow, so answers "
                    "cannot be told from prompts; give the processor a template that does not."
                )
            stop = text.find(eos, at + len(answer), len(after))
            if stop < 0:
                return None
            spans.append((len(before), stop + len(eos)))
        return text, spans

    def _render(self, messages: list[dict[str, Any]], **kwargs: bool) -> str:
        return str(self.processor.apply_chat_template(messages, tokenize=False, **kwargs))

    def _cut(self, inputs: dict[str, Any], length: int) -> dict[str, Any]:
        shape = inputs["input_ids"].shape
        if shape[1] <= length:
            return inputs
        if any(int(token) in self.placeholders for token in inputs["input_ids"][0, length:]):
            raise InputError(f"its images alone are longer than max_length={length} tokens.")
        short = {k: v[:, :length] if v.shape == shape else v for k, v in inputs.items()}
        if not bool((short["labels"] != IGNORED).any()):
            raise InputError(f"no answer begins within max_length={length} tokens.")
        return short


def align(
    plain: Sequence[int],
    learned: Sequence[bool],
    full: Sequence[int],
    placeholders: Collection[int],
) -> list[bool]:
    """Find which of a processor's ids are learned.

    The tokenizer reads one placeholder for each image, and the processor makes a run of them from
    it; everything else is the same in both.

    Args:
        plain: the ids that the tokenizer reads from the text.
        learned: for each of them, whether it is learned.
        full: the ids that the processor makes of the same text.
        placeholders: ids of the tokens that stand for visual tokens.

    Returns:
        for each id of ``full``, whether it is learned.

    Raises:
        UnsupportedModelError: where the ids differ in more than the lengths of the runs.
    """
    marked: list[bool] = []
    at = 0
    while at < len(plain) and len(marked) < len(full) and plain[at] == full[len(marked)]:
        token = plain[at]
        if token not in placeholders:
            marked.append(learned[at])
            at += 1
            continue
        while at < len(plain) and plain[at] == token:
            at += 1
        while len(marked) < len(full) and full[len(marked)] == token:
            marked.append(False)
    if at < len(plain) or len(marked) < len(full):
        raise UnsupportedModelError(
            "the processor writes more than placeholders in an image's place, so answers cannot be "
            "found in its ids; llava and qwen2_vl processors do not."
        )
    return marked
