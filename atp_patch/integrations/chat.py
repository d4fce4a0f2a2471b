"""A loaded vision-language model that answers batches of chats and scores continuations.

A chat is a list of messages as ``apply_chat_template`` of transformers takes them: each message has
a ``role`` and a ``content``, which is a list of texts, images and videos.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import Tensor

from atp_patch.contract.errors import ConfigError, NotPatchedError
from atp_patch.integrations.videos import Chat, with_frames
from atp_patch.patching.api import last_trace
from atp_patch.patching.trace import PruningTrace
from atp_patch.tools.generation import end_ids


@dataclass(frozen=True)
class Generation:
    """How answers are generated.

    Attributes:
        max_new_tokens: the most tokens that an answer has.
        stop: an answer ends before the first of these texts.
        options: further arguments of ``model.generate``.
    """

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: the answer, without special tokens.
        input_tokens: the number of tokens of the prompt, visual tokens included.
        output_tokens: the number of generated tokens.
        visual_tokens: the number of visual tokens of the prompt; None where the model is not
            patched or the prompt has no image.
        average_visual_tokens: the number of visual tokens averaged over the decoder layers; None
            likewise.
    """

    text: str
    input_tokens: int
    output_tokens: int
    visual_tokens: int | None = None
    average_visual_tokens: float | None = None


@dataclass(frozen=True)
class Score:
    """How probable a given answer is.

    Attributes:
        log_probability: the sum of the log-probabilities of its tokens.
        tokens: the number of its tokens.
        greedy: whether greedy decoding would have given the same tokens.
    """

    log_probability: float
    tokens: int
    greedy: bool


@dataclass
class Usage:
    """Sums over everything that a model was asked, to compute averages from.

    Attributes:
        requests: the number of answers and of scored continuations.
        output_tokens: the number of generated tokens.
        seconds: the time that the model ran.
        samples_with_images: the number of requests with at least one image, if the model is
            patched.
        visual_tokens: their visual tokens before pruning.
        average_visual_tokens: their visual tokens, averaged over decoder layers.
        samples_counted: the number of requests in whose batch there was an image, if the model is
            patched.
        prefill_flops: FLOPs of the decoder's prefill for these.
        prefill_flops_plain: the same without pruning.
        kv_bytes: bytes of keys and values in the cache after the prefill.
        kv_bytes_plain: the same without pruning.
    """

    requests: float = 0
    output_tokens: float = 0
    seconds: float = 0
    samples_with_images: float = 0
    visual_tokens: float = 0
    average_visual_tokens: float = 0
    samples_counted: float = 0
    prefill_flops: float = 0
    prefill_flops_plain: float = 0
    kv_bytes: float = 0
    kv_bytes_plain: float = 0

    def add(self, trace: PruningTrace) -> None:
        """Add what a forward pass with images did."""
        with_images = sum(total > 0 for total in trace.layout.totals)
        self.samples_with_images += with_images
        self.samples_counted += len(trace.layout.totals)
        self.visual_tokens += sum(trace.layout.totals)
        self.average_visual_tokens += trace.average_tokens * with_images
        self.prefill_flops += trace.flops
        self.prefill_flops_plain += trace.flops_plain
        self.kv_bytes += trace.kv_bytes
        self.kv_bytes_plain += trace.kv_bytes_plain

    def as_tensor(self, device: torch.device) -> Tensor:
        """(fields,) float64, to be summed over processes."""
        values = [getattr(self, field.name) for field in fields(self)]
        return torch.tensor(values, dtype=torch.float64, device=device)

    @classmethod
    def from_tensor(cls, values: Tensor) -> Usage:
        """The sums that :meth:`as_tensor` has put into a tensor."""
        return cls(*values.tolist())

    def kept(self) -> dict[str, float]:
        """What was kept on average over requests with images; empty where there were none."""
        count, counted = self.samples_with_images, self.samples_counted
        if not count:
            return {}
        return {
            "visual_tokens": self.visual_tokens / count,
            "visual_tokens_over_layers": self.average_visual_tokens / count,
            "prefill_gflops": self.prefill_flops / counted / 1e9,
            "prefill_gflops_plain": self.prefill_flops_plain / counted / 1e9,
            "kv_megabytes": self.kv_bytes / counted / 1e6,
            "kv_megabytes_plain": self.kv_bytes_plain / counted / 1e6,
        }


class ChatModel:
    """A model and its processor, plain or patched.

    Attributes:
        usage: the sums over all calls so far.
    """

    def __init__(self, model: Any, processor: Any, media: Mapping[str, Any] | None = None) -> None:
        """Take a loaded model.

        Args:
            model: a vision-language model of transformers, patched or not.
            processor: its processor, with a chat template. Its tokenizer will pad on the left.
            media: ``num_frames`` or ``fps``, the arguments of :func:`with_frames`. Without them the
                processor decodes videos and samples them as it does by itself.
        """
        self.model, self.processor = model, processor
        self.usage = Usage()
        self._media = dict(media or {})
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def answer(self, chats: Sequence[Chat], how: Generation) -> list[Answer]:
        """Generate one answer to each chat."""
        tokenizer = self.processor.tokenizer
        inputs = self._encode(chats)
        length = inputs["input_ids"].shape[1]
        options = dict(how.options or {})
        if how.stop:
            options["stopping_criteria"] = [_Stop(tokenizer, how.stop, length)]
        before, start = _last_trace(self.model), time.perf_counter()
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=how.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
        trace = self._took(start, len(chats), before)
        prompts = inputs["attention_mask"].sum(1).tolist()
        ends = end_ids(self.model)
        found = []
        for b, new in enumerate(ids[:, length:].tolist()):
            text = str(tokenizer.decode(new, skip_special_tokens=True))
            count = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
            self.usage.output_tokens += count
            visual = average = None
            if trace is not None and trace.layout.totals[b]:
                visual = trace.layout.totals[b]
                average = float(trace.tokens_per_layer[b].double().mean())
            found.append(Answer(_before(text, how.stop), prompts[b], count, visual, average))
        return found

    def score(self, chats: Sequence[Chat], continuations: Sequence[str]) -> list[Score]:
        """Score a given answer to each chat.

        The model decodes the given answers token by token, exactly as it would generate them, so
        a method cannot see the answer when it chooses visual tokens.

        Raises:
            ConfigError: for a continuation without tokens.
        """
        tokenizer = self.processor.tokenizer
        wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in continuations]
        if not all(wanted):
            raise ConfigError("a continuation to be scored is empty; give at least one token.")
        inputs = self._encode(chats)
        length = inputs["input_ids"].shape[1]
        before, start = _last_trace(self.model), time.perf_counter()
        with torch.inference_mode():
            found = self.model.generate(
                **inputs,
                generation_config=transformers.GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(map(len, wanted)),
                    pad_token_id=tokenizer.pad_token_id,
                    output_logits=True,
                    return_dict_in_generate=True,
                ),
                logits_processor=[_Forced(wanted, length, tokenizer.pad_token_id)],
            )
        self._took(start, len(chats), before)
        result = []
        for b, tokens in enumerate(wanted):
            logits = torch.stack([found.logits[i][b] for i in range(len(tokens))]).float()
            target = torch.tensor(tokens, device=logits.device)
            chosen = logits.log_softmax(-1).gather(1, target[:, None])
            greedy = bool((logits.argmax(-1) == target).all())
            result.append(Score(float(chosen.sum()), len(tokens), greedy))
        return result

    def _encode(self, chats: Sequence[Chat]) -> Any:
        options: dict[str, Any] = {"padding": True}
        if self._media:
            chats, found = with_frames(chats, **self._media)
            if found:
                options.update(do_sample_frames=False, video_metadata=found)
        inputs = self.processor.apply_chat_template(
            [list(chat) for chat in chats],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        return inputs.to(self.model.device, self.model.dtype)

    def _took(
        self, start: float, requests: int, before: PruningTrace | None
    ) -> PruningTrace | None:
        """Add a call to the sums; return what it pruned, if it had images.

        Args:
            start: when the call began, by ``time.perf_counter``.
            requests: how many requests it answered.
            before: the trace of the call before it.
        """
        self.usage.seconds += time.perf_counter() - start
        self.usage.requests += requests
        trace = _last_trace(self.model)
        if trace is None or trace is before:  # a call without images leaves the earlier trace
            return None
        self.usage.add(trace)
        return trace


class _Stop(transformers.StoppingCriteria):
    """Ends an answer when it holds one of some texts.

    It reads what the tokenizer decodes, so that it works with every tokenizer; the
    ``stop_strings`` of transformers need a vocabulary of a known kind.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], length: int) -> None:
        self._tokenizer, self._stop, self._length = tokenizer, stop, length
        # A token has a byte at least, so the texts lie within this many tokens.
        self._tail = max(len(text.encode()) for text in stop) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tail = input_ids[:, max(self._length, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(tail, skip_special_tokens=True)
        found = [any(end in text for end in self._stop) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class _Forced(transformers.LogitsProcessor):
    """Makes ``generate`` follow given tokens, and pad where a row has no more of them."""

    def __init__(self, tokens: Sequence[Sequence[int]], length: int, pad: int) -> None:
        self._tokens, self._length, self._pad = tokens, length, pad

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._length
        forced = torch.full_like(scores, -torch.inf)
        for b, row in enumerate(self._tokens):
            forced[b, row[step] if step < len(row) else self._pad] = 0
        return forced


def _before(text: str, stop: Sequence[str]) -> str:
    """The text before the first of some others."""
    found = [at for at in (text.find(end) for end in stop if end) if at >= 0]
    return text[: min(found)] if found else text


def _last_trace(model: Any) -> PruningTrace | None:
    try:
        return last_trace(model)
    except NotPatchedError:
        return None
