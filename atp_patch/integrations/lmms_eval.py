"""Patched models in lmms-eval, found by it through the entry point group ``lmms_eval.models``.

    python -m lmms_eval --model atp_patch \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=atp,target_tokens=144 \
        --tasks gqa --batch_size 8

The arguments of the model are those of ``patch_model``. A comma ends an argument there, so the
members of a list are joined by "+", as in ``layers=4+14+24`` and ``keep=0.7+0.6+0.5``, and two
methods by "/", as in ``method=visionzip/atp``. ``method=plain`` leaves the model unpatched.

The number of tokens that were really kept stands in the results: per sample beside the token
counts (``--log_samples``), and on average under "throughput".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import (
    GenerationResult,
    Instance,
    TokenCounts,
    unwrap_generation_output,
)
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from atp_patch.contract.errors import ConfigError
from atp_patch.integrations.chat import Answer, ChatModel, Generation, Score, Usage
from atp_patch.integrations.videos import Chat
from atp_patch.patching.api import patch_model
from atp_patch.tools.loading import choose_device, choose_dtype, load_model
from atp_patch.tools.method_spec import method_argument
from atp_patch.tools.trained import load_trained

PLAIN = "plain"
_LISTS = {"layers": int, "keep": float}
_HUB = ("revision", "token", "subfolder", "cache_dir", "local_files_only")
# Arguments that tasks write for models of the harness itself, which `generate` does not know.
_NOT_FOR_GENERATE = ("until", "image_aspect_ratio", "max_gen_toks")


def manifest() -> ModelManifest:
    """Return what lmms-eval registers: a model for chat tasks, and one for all other tasks."""
    here = __name__
    return ModelManifest(
        model_id="atp_patch",
        chat_class_path=f"{here}.ChatTasks",
        simple_class_path=f"{here}.SimpleTasks",
    )


@dataclass
class KeptTokenCounts(TokenCounts):
    """Token counts of a sample, with its visual tokens before and after pruning.

    Attributes:
        visual_tokens: the visual tokens of the prompt.
        average_visual_tokens: the same, averaged over the decoder layers.
    """

    visual_tokens: int | None = None
    average_visual_tokens: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The counts that are known, by name."""
        more = {
            "visual_tokens": self.visual_tokens,
            "average_visual_tokens": self.average_visual_tokens,
        }
        return {**super().to_dict(), **{k: v for k, v in more.items() if v is not None}}


class SimpleTasks(lmms):
    """A model, plain or patched, for tasks that give a text and a list of pictures."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        weights: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        system_prompt: str = "",
        max_batch_size: int | None = None,
        **patch: Any,
    ) -> None:
        """Load a model and patch it.

        Args:
            pretrained: a folder, a Hub id, or the name of a built-in model.
            method: a method, two joined by "/", or "plain" for the unpatched model.
            weights: a training's folder, or the folder or Hub id of an adapter. ``revision``,
                ``token``, ``subfolder``, ``cache_dir`` and ``local_files_only`` may stand beside
                it, as in ``load_trained``.
            batch_size: how many requests are answered at a time.
            device: where the model goes; by default each process takes its own GPU, or the CPU.
            dtype: float32, bfloat16 or float16.
            num_frames: how many frames of a video the model sees.
            fps: how many frames of a second of a video the model sees, instead.
            system_prompt: a text, or a file with one, that begins every chat.
            max_batch_size: the harness passes it; batches have ``batch_size`` requests.
            patch: the further arguments of ``patch_model``.

        Raises:
            ATPError: where an argument is wrong.
        """
        super().__init__()
        self.accelerator = Accelerator()
        several = self.accelerator.num_processes > 1
        self.device = self.accelerator.device if several else choose_device(device)
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.batch_size = _batch_size(batch_size)
        if num_frames is not None and fps is not None:
            raise ConfigError("--model_args: give one of num_frames and fps.")
        arguments = _patch_arguments(method, weights, patch)

        def prune(model: Any) -> None:
            if arguments is not None and weights is None:
                patch_model(model, **arguments)

        model, processor = _load(pretrained, self.device, dtype, prune)
        if weights is not None:
            load_trained(model, weights, **patch)
        else:
            prune(model)
        media = {"num_frames": num_frames, "fps": fps}
        self._chat = ChatModel(model, processor, {k: v for k, v in media.items() if v is not None})
        self._system_prompt = self._resolve_system_prompt(system_prompt)
        self._reported = False

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request; requests with equal generation arguments share batches."""
        results: list[GenerationResult | None] = [None] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(sorted(self._arguments(request).items()))].append(index)
        with self._progress(len(requests), "Answering") as bar:
            for members in groups.values():
                how = generation(self._arguments(requests[members[0]]))
                for some in _batches(members, self.batch_size):
                    answers = self._chat.answer([self._chat_of(requests[i]) for i in some], how)
                    for i, answer in zip(some, answers, strict=True):
                        results[i] = _result(answer)
                        self._cache(requests[i], answer.text)
                    bar.update(len(some))
        return [result for result in results if result is not None]

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """The loss of each given answer, and whether greedy decoding would give it.

        In lmms-eval this request asks for the mean negative log-probability of a token, in spite of
        its name: its tasks choose the answer with the smallest value.
        """
        results: list[Any] = []
        with self._progress(len(requests), "Scoring") as bar:
            for some in _batches(requests, self.batch_size):
                asked = [self._scored(request) for request in some]
                scores = self._chat.score(
                    [chat for chat, _ in asked], [answer for _, answer in asked]
                )
                results += map(_response, scores)
                bar.update(len(some))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks of several rounds.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "tasks of several rounds (generate_until_multi_round) are not supported by the model "
            "atp_patch; choose tasks whose output_type is generate_until or multiple_choice."
        )

    def clean(self) -> None:
        """Report what all processes kept, then free the model, as the harness asks at the end."""
        self._report()
        super().clean()
        del self._chat

    def _report(self) -> None:
        total = self.accelerator.reduce(self._chat.usage.as_tensor(self.device), "sum")
        usage = Usage.from_tensor(total.cpu())
        speed = usage.output_tokens / usage.seconds if usage.seconds else 0.0
        log_metrics(
            total_elapsed_time=usage.seconds,
            total_gen_tokens=int(usage.output_tokens),
            avg_speed=speed,
            additional_metrics={"total_requests": int(usage.requests), **usage.kept()},
        )

    def _progress(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=what, disable=self._rank != 0)

    def _cache(self, request: Instance, text: str) -> None:
        self.cache_hook.add_partial("generate_until", request.args[:2], text)

    def _arguments(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def _document(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _chat_of(self, request: Instance) -> Chat:
        text, _, visuals, doc_id, task, split = request.args
        return self._asked(text, visuals(self._document(doc_id, task, split)))

    def _scored(self, request: Instance) -> tuple[Chat, str]:
        """The chat and the given answer of a request; one without a document has no picture."""
        if len(request.args) == 2:
            return self._asked(request.args[0], []), request.args[1]
        text, target, visuals, doc_id, task, split = request.args
        document = self._document(doc_id, task, split)
        answer = target if isinstance(target, str) else target(document)
        return self._asked(text, visuals(document)), answer

    def _asked(self, text: str, visuals: Sequence[Any]) -> Chat:
        messages = ChatMessages(
            messages=[
                {
                    "role": "user",
                    "content": [*map(_medium, visuals or []), {"type": "text", "text": text}],
                }
            ]
        )
        return self._as_chat(messages)

    def _as_chat(self, messages: ChatMessages) -> Chat:
        chat: list[Any] = messages.to_hf_messages()
        return self._apply_system_prompt(chat, self._system_prompt)


class ChatTasks(SimpleTasks):
    """A model, plain or patched, for tasks that give whole chats."""

    is_simple = False

    def _cache(self, request: Instance, text: str) -> None:
        self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), text)

    def _arguments(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _chat_of(self, request: Instance) -> Chat:
        _, messages, _, doc_id, task, split = request.args
        return self._as_chat(ChatMessages(messages=messages(self._document(doc_id, task, split))))


def generation(arguments: Mapping[str, Any]) -> Generation:
    """Translate the generation arguments of a task.

    A temperature above 0 samples, as in the harness's own models; otherwise decoding is greedy.
    """
    given = dict(arguments)
    until = given.get("until") or ()
    most = int(given.pop("max_new_tokens", None) or given.pop("max_gen_toks", None) or 128)
    options = {k: v for k, v in given.items() if k not in _NOT_FOR_GENERATE and v is not None}
    sampling = options.get("do_sample", options.get("temperature", 0) > 0)
    if sampling and options.get("temperature", 1) > 0:
        options["do_sample"] = True
    else:
        options.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return Generation(most, (until,) if isinstance(until, str) else tuple(until), options)


def _batch_size(value: int | str) -> int:
    try:
        size = int(value)
    except ValueError as error:
        raise ConfigError(f"batch_size={value} must be a number, such as 8.") from error
    if size < 1:
        raise ConfigError(f"batch_size={value} must be at least 1.")
    return size


def _patch_arguments(
    method: str | None, weights: str | None, patch: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The arguments of ``patch_model``; None for the plain model."""
    if weights is not None:
        given = [name for name in patch if name not in _HUB] + ["method"] * (method is not None)
        if given:
            raise ConfigError(f"--model_args: leave out {given[0]}, because weights sets it.")
        return None
    if method == PLAIN:
        if patch:
            name = next(iter(patch))
            raise ConfigError(f"--model_args: leave out {name}: method={PLAIN} prunes nothing.")
        return None
    arguments = {name: _listed(name, value) for name, value in patch.items()}
    if method is not None:
        arguments["method"] = method_argument(method)
    return arguments


def _listed(name: str, value: Any) -> Any:
    """A list where "+" joins numbers, and whatever was given otherwise."""
    if name not in _LISTS:
        return value
    kind = _LISTS[name]
    try:
        if isinstance(value, str):
            return [kind(part) for part in value.split("+")]
        return [value] if name == "layers" else value
    except ValueError as error:
        raise ConfigError(f"--model_args: {name}={value}: join numbers by +.") from error


def _load(pretrained: str, device: torch.device, dtype: str | None, check: Any) -> tuple[Any, Any]:
    return load_model(pretrained, device, choose_dtype(dtype, device), check)


def _medium(visual: Any) -> dict[str, Any]:
    """A picture or a video as a part of a message."""
    if isinstance(visual, str):
        return {"type": "video", "url": visual}
    return {"type": "image", "url": visual}


def _batches(members: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [members[at : at + size] for at in range(0, len(members), size)]


def _result(answer: Answer) -> GenerationResult:
    counts = KeptTokenCounts(
        input_tokens=answer.input_tokens,
        output_tokens=answer.output_tokens,
        visual_tokens=answer.visual_tokens,
        average_visual_tokens=answer.average_visual_tokens,
    )
    return GenerationResult(text=answer.text, token_counts=counts)


def _response(score: Score) -> Any:
    """A score as the harness takes it.

    lmms-eval 0.7.3 turns tuples into text, which its own tasks then cannot read. What stands in
    the place of a result's text comes through as it is.
    """
    pair = (-score.log_probability / score.tokens, score.greedy)
    unchanged = unwrap_generation_output(pair)[0] == pair
    return pair if unchanged else GenerationResult(text=pair)
