"""A model, plain or patched, behind the server of transformers (``transformers serve``).

The server speaks OpenAI's API. Two things differ from ``transformers serve``: it has one model,
which is loaded and patched before it starts, and it reads pictures itself, with limits, so that a
wrong picture is an error to the client that sent it and no file of the server can be asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from http.client import HTTPException as BrokenAnswer
from inspect import signature
from io import BytesIO
from typing import Any
from urllib.request import urlopen

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from PIL import Image
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState, Modality

from atp_patch.contract.errors import (
    ConfigError,
    InputError,
    UnsupportedModelError,
    first_line,
)
from atp_patch.tools.pictures import read_stream

# The others are for other kinds of models, read files of the server, or unload the model.
# `load_model` is what the command `transformers chat` asks first.
_SERVED = (
    *("/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/models"),
    *("/load_model", "/health"),
)
# Other formats may start programs (EPS), or hold many pictures of which one is read.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_ADDRESSES = ("http://", "https://", "data:")
_FETCH_SECONDS, _FETCH_BYTES = 20.0, 100_000_000
_PICTURES, _OTHERS = ("image_url", "input_image"), ("video_url", "audio_url")


class OneModel(ModelManager):
    """Gives the server's handlers one loaded model, and nothing else.

    Args:
        name: what clients call the model.
        model: a vision-language model of transformers, patched or not.
        processor: its processor, with a chat template.
        state: holds the thread in which the handlers have the model compute.
    """

    def __init__(self, name: str, model: Any, processor: Any, state: GenerationState) -> None:
        self._model, self._processor, self._state = model, processor, state
        super().__init__(device=str(model.device), force_model=name)

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Callable[[dict[str, Any]], object] | None = None,
        tqdm_class: type | None = None,
        gguf_file: str | None = None,
    ) -> tuple[Any, Any]:
        """Return the model and its processor; a server cannot be made to load others.

        Raises:
            ConfigError: for the name of another model.
        """
        if model_id_and_revision != self.process_model_name(self.force_model) or gguf_file:
            raise ConfigError(
                f"this server has one model, {self.force_model}, and not {model_id_and_revision}."
            )
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": self.force_model, "cached": True})
        return self._model, self._processor

    def shutdown(self) -> None:
        """End the answers that are being computed, and wait until the thread is idle.

        Python may abort the process where it ends while a thread computes inside torch.
        """
        hooks = [part.register_forward_pre_hook(_end) for part in self._model.modules()]
        thread = self._state.get_manager(self.process_model_name(self.force_model))
        thread.submit(lambda: None).result()  # it is the last of what waits for the thread
        for hook in hooks:
            hook.remove()
        super().shutdown()

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """Return the list of models that clients are shown."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


def _end(*_: Any) -> None:
    raise RuntimeError("the server has been stopped.")


class _OwnPictures:
    """Reads the pictures of a request before the handler of transformers behind it sees them."""

    max_image_pixels: int

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request; where its data is wrong, with status 400 and an error as OpenAI's."""
        try:  # in a thread, so that a large picture or a slow address holds up nobody else
            read = await asyncio.to_thread(with_pictures, body, self.max_image_pixels)
            return await super().handle_request(read, request_id)  # type: ignore[misc]
        except ValueError as error:
            told = {"message": first_line(error), "type": "invalid_request_error"}
            return JSONResponse({"error": told}, status_code=400)


class _Chats(_OwnPictures, ChatCompletionHandler):
    """Chat completions."""


class _Responses(_OwnPictures, ResponseHandler):
    """OpenAI's newer responses."""


def build_app(name: str, model: Any, processor: Any, *, max_image_pixels: int) -> FastAPI:
    """Make the application that serves one model, for any ASGI server.

    Args:
        name: what clients call the model.
        model: a vision-language model of transformers, in evaluation mode, patched or not.
        processor: its processor, with a chat template.
        max_image_pixels: the most pixels that a picture of a client may have.

    Raises:
        UnsupportedModelError: where the server of transformers cannot serve the model.
    """
    state = GenerationState()
    manager = OneModel(name, model, processor, state)
    if not getattr(processor.tokenizer, "is_fast", False):
        raise UnsupportedModelError(
            f"{name} cannot be served: its tokenizer is none of the library tokenizers, which the "
            "server of transformers needs to stream text."
        )
    try:
        modality = manager.get_model_modality(model, processor)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{name} cannot be served: the server of transformers does not know "
            f"{type(model).__name__}."
        ) from error
    if modality not in (Modality.VLM, Modality.MULTIMODAL):
        raise UnsupportedModelError(
            f"{name} cannot be served: the server of transformers takes {type(model).__name__} for "
            "a model of text alone, and would leave its pictures out."
        )
    chats, responses = _Chats(manager, state), _Responses(manager, state)
    chats.max_image_pixels = responses.max_image_pixels = max_image_pixels
    # Nothing handles what is not served; which handlers there are differs between versions.
    unused = {"transcription_handler", "systemone_handler"} & signature(
        build_server
    ).parameters.keys()
    app = build_server(
        manager,
        chats,
        completion_handler=CompletionHandler(manager, state),
        response_handler=responses,
        generation_state=state,
        **dict.fromkeys(unused),
    )
    app.router.routes = [route for route in app.router.routes if route.path in _SERVED]
    return app


def with_pictures(body: Mapping[str, Any], max_image_pixels: int) -> dict[str, Any]:
    """Return the body of a request with each picture in the place of its address.

    Raises:
        InputError: for a picture that is broken or too large, and for what would be read from a
            file of the server.
    """
    own = {key: body[key] for key in ("messages", "input") if key in body}
    return {**body, **{key: _read(part, max_image_pixels) for key, part in own.items()}}


def _read(part: Any, limit: int) -> Any:
    if isinstance(part, list):
        return [_read(member, limit) for member in part]
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in _PICTURES:
        source = part.get("image_url")
        url = source.get("url") if isinstance(source, dict) else source
        return {**part, "image_url": {"url": read_picture(url, limit)}}
    if kind in _OTHERS:
        source = part.get(kind)
        _check_address(source.get("url") if isinstance(source, dict) else source)
    if kind == "input_audio":
        source = part.get(kind)
        if not (isinstance(source, dict) and source.get("format")):
            raise InputError("a sound has no format; give {'data': ..., 'format': 'wav'}.")
    return {**part, "content": _read(part["content"], limit)} if "content" in part else part


def read_picture(address: Any, max_image_pixels: int) -> Image.Image:
    """Read the picture at an address: a data URL, or one that begins with http or https.

    Raises:
        InputError: where there is no picture, or it is broken or too large.
    """
    _check_address(address)
    try:
        with urlopen(address, timeout=_FETCH_SECONDS) as answer:
            data = answer.read(_FETCH_BYTES + 1)
    except (OSError, ValueError, BrokenAnswer) as error:
        raise InputError(
            f"a picture cannot be read ({first_line(error)}); give data:image/png;base64,... or an "
            "address that answers."
        ) from error
    if len(data) > _FETCH_BYTES:
        raise InputError(f"a picture has more than {_FETCH_BYTES} bytes; scale it down.")
    return read_stream(BytesIO(data), "the picture", max_image_pixels, _FORMATS)


def _check_address(address: Any) -> None:
    if not isinstance(address, str) or not address.lower().startswith(_ADDRESSES):
        raise InputError(
            "a picture, video or sound has no address; give a data URL "
            "(data:image/png;base64,...) or one that begins with http:// or https://. Files of the "
            "server are not read."
        )
