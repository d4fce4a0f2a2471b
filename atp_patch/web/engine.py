"""One model that several visitors ask in turn, and its answers as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from atp_patch.contract.errors import InputError
from atp_patch.patching.api import is_patched, last_trace, patch_model, unpatch_model
from atp_patch.patching.trace import PruningTrace
from atp_patch.tools.generation import GREEDY
from atp_patch.tools.loading import encode
from atp_patch.tools.method_spec import method_argument
from atp_patch.visualize import with_pictures

Turn = tuple[str, str]  # a question and its answer


@dataclass(frozen=True)
class Pruning:
    """How visual tokens are pruned.

    Attributes:
        method: the name of the method; "first/second" names two, one before the decoder and one
            inside it.
        share: the share of the visual tokens that is left, on average over all decoder layers.
        layers: the pruning layers; none: the method's own.
    """

    method: str
    share: float
    layers: tuple[int, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of ``patch_model``."""
        return {
            "method": method_argument(self.method),
            "layers": self.layers or None,
            "target_share": self.share,
        }


@dataclass(frozen=True)
class Reply:
    """An answer so far.

    Attributes:
        text: the answer.
        done: whether it is complete; all that follows is known only then.
        trace: what was pruned, with the picture that the model saw; None without pruning.
        prefill_ms: milliseconds up to the first token, vision tower included.
        token_ms: milliseconds for each token after the first; None where there is only one.
    """

    text: str
    done: bool = False
    trace: PruningTrace | None = None
    prefill_ms: float | None = None
    token_ms: float | None = None


class Engine:
    """A model that answers one request at a time, each with a pruning of its own.

    Attributes:
        name: what the page calls the model.
        num_layers: the number of its decoder layers.
    """

    def __init__(self, model: Any, processor: Any, name: str, max_new_tokens: int = 32) -> None:
        self._model, self._processor = model, processor
        self._max_new_tokens = max_new_tokens
        self._lock = Lock()
        self.name = name
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)

    def ask(
        self,
        image: Image.Image,
        question: str,
        pruning: Pruning | None,
        earlier: Sequence[Turn] = (),
    ) -> Iterator[Reply]:
        """Answer a question, token by token.

        Args:
            image: the picture.
            question: the question.
            pruning: how the model is pruned; None: the plain model.
            earlier: earlier questions about the picture and their answers.

        Raises:
            ATPError: if the question is empty, or if the model cannot be pruned like this.
        """
        if not question.strip():
            raise InputError("The question is empty; ask something about the picture.")
        replies: SimpleQueue[Reply | Exception] = SimpleQueue()

        def work() -> None:
            try:
                with self._lock:
                    replies.put(self._generate(image, question, pruning, earlier, replies.put))
            except Exception as error:  # raised again for the caller, in the caller's thread
                replies.put(error)

        # The page may resume this generator in any thread; the trace belongs to the one that ran.
        Thread(target=work, daemon=True).start()
        while True:
            reply = replies.get()
            if isinstance(reply, Exception):
                raise reply
            yield reply
            if reply.done:
                return

    def look(self, image: Image.Image, question: str, pruning: Pruning) -> PruningTrace:
        """Return what one pass over a picture and a question prunes, without an answer.

        Raises:
            ATPError: if the model cannot be pruned like this.
        """
        with self._lock, torch.inference_mode():
            self._patch(pruning)
            inputs = encode(self._processor, image, question, self._model)
            self._model(**inputs)
            return self._shown(image, inputs, question)

    def _generate(
        self,
        image: Image.Image,
        question: str,
        pruning: Pruning | None,
        earlier: Sequence[Turn],
        tell: Callable[[Reply], object],
    ) -> Reply:
        self._patch(pruning)
        inputs = encode(self._processor, image, question, self._model, earlier)
        stream = _Stream(self._processor, tell)
        with torch.inference_mode():
            self._model.generate(
                **inputs, **GREEDY, max_new_tokens=self._max_new_tokens, streamer=stream
            )
        first, *rest = stream.times
        trace = self._shown(image, inputs, question, stream.text) if pruning else None
        return Reply(
            stream.text,
            done=True,
            trace=trace,
            prefill_ms=1000 * (first - stream.start),
            token_ms=1000 * (rest[-1] - first) / len(rest) if rest else None,
        )

    def _patch(self, pruning: Pruning | None) -> None:
        if pruning is None:
            if is_patched(self._model):
                unpatch_model(self._model)
            return
        patch_model(self._model, **pruning.settings)

    def _shown(
        self, image: Image.Image, inputs: Any, question: str, answer: str | None = None
    ) -> PruningTrace:
        trace = last_trace(self._model)
        return with_pictures(
            trace, image, inputs, self._processor, question=question, answer=answer
        )


class _Stream(BaseStreamer):
    """Tells the answer so far at every token, and keeps the time of each."""

    def __init__(self, processor: Any, tell: Callable[[Reply], object]) -> None:
        self._processor, self._tell = processor, tell
        self._tokens: list[int] | None = None  # None until the prompt, which comes first, is past
        self.times: list[float] = []
        self.text = ""
        self.start = time.perf_counter()

    def put(self, value: Any) -> None:
        if self._tokens is None:
            self._tokens = []
            return
        self.times.append(time.perf_counter())
        self._tokens += value.flatten().tolist()
        self.text = str(self._processor.decode(self._tokens, skip_special_tokens=True)).strip()
        self._tell(Reply(self.text))

    def end(self) -> None:
        """Nothing is left to tell: the complete answer is made from the times."""
