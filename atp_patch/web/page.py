"""The page itself, in gradio: what is where, and what happens when."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from uvicorn import Config

from atp_patch.contract.errors import ConfigError, first_line
from atp_patch.methods import untrained_methods
from atp_patch.tools.ending import EndingServer
from atp_patch.web.engine import Engine, Pruning
from atp_patch.web.requests import asks, explained, looks, scene
from atp_patch.web.uploads import MAX_MB, MAX_PIXELS, read_upload
from atp_patch.web.visit import SIDES, Visit

Changes: TypeAlias = dict[Any, Any]  # new values by component
HOST = "127.0.0.1"  # no other computer reaches the page
SCENES = (53, 0, 1, 2, 3, 6)
_WAITING = 16  # the most requests that wait for their turn
_HOUR_S = 3600
_GRACE_S = 3  # after Ctrl-C, for requests that have begun
_FONTS = ["system-ui", "sans-serif"]  # of this computer, so that none is fetched
SHARE = 0.25  # of the visual tokens, the budget that the page begins with
_WORKING = "<p>Working ...</p>"
_CSS = """
.chat button[title="Clear"] {display: none}
.alert {color: #b00020; font-weight: 600}
#kept img, #scores img, #costs img {background: white; border-radius: 4px}
"""
_INTRO = """# Fewer visual tokens, the same answers?
Pick a scene or upload a picture, and ask. The model **{name}** answers twice: with all visual
tokens, and with those that the method keeps. Below you see which ones they are, and what was saved.
"""
_SINGLE = "This small model knows generated scenes, and takes each question by itself."


def serve(engine: Engine, builtin: str | None, start: Pruning, port: int) -> None:
    """Show the page until Ctrl-C.

    Args:
        engine: the model.
        builtin: the name of the built-in model that it is, or None.
        start: the method and the layers that the page begins with.
        port: the port on this computer; 0: any that is free.

    Raises:
        ConfigError: if the port is taken.
    """
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((HOST, port))
        door.listen()
    except OSError as error:
        raise ConfigError(
            f"--port {port} cannot be used ({first_line(error)}); give another."
        ) from error
    with door, TemporaryDirectory(prefix="atp_patch-web-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads are gone when the page ends
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        # A page of another site that has its name point to this computer is sent away.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        served = gr.mount_gradio_app(
            app,
            build(engine, builtin, start),
            path="/",
            server_name=HOST,
            server_port=port,
            footer_links=[],
            run_history=False,
            max_file_size=f"{MAX_MB}mb",
            ssr_mode=False,
            theme=gr.themes.Default(font=_FONTS, font_mono=["monospace"]),
            css=_CSS,
        )
        address = f"http://{HOST}:{door.getsockname()[1]}"
        print(f"Open {address} in a browser on this computer. Ctrl-C ends it.", file=sys.stderr)
        settings = Config(served, log_level="warning", timeout_graceful_shutdown=_GRACE_S)
        EndingServer(settings).run(sockets=[door])


def build(engine: Engine, builtin: str | None, start: Pruning) -> Any:
    """Make the page; arguments as those of :func:`serve`."""
    scenes = [scene(index, builtin) for index in SCENES]
    methods = list(dict.fromkeys([*untrained_methods(), start.method]))
    layers = list(range(1, engine.num_layers))

    def way(label: str, pruning: Pruning) -> list[Any]:
        """Return the controls of one pruning."""
        return [
            gr.Dropdown(methods, value=pruning.method, label=f"{label} method"),
            gr.Slider(
                2,
                100,
                value=100 * pruning.share,
                step=1,
                label=f"{label} budget, % of all tokens",
                info="visual tokens, averaged over all decoder layers",
            ),
            gr.Dropdown(
                layers,
                value=list(pruning.layers),
                multiselect=True,
                label=f"{label} pruning layers",
                info="leave empty for those of the method",
            ),
        ]

    with gr.Blocks(
        title="atp_patch", analytics_enabled=False, delete_cache=(_HOUR_S, _HOUR_S)
    ) as page:
        visit = gr.State(Visit(), time_to_live=_HOUR_S)
        gr.Markdown(_INTRO.format(name=engine.name) + (_SINGLE if builtin else ""))
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                gr.Markdown("**Pick a scene**")
                gallery = gr.Gallery(
                    [each.image for each in scenes],
                    show_label=False,
                    columns=3,
                    height=240,
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    format="png",
                    buttons=[],
                    elem_id="scenes",
                )
                picture = gr.Image(
                    label="The picture", interactive=False, format="png", height=230, buttons=[]
                )
                upload = gr.File(
                    label=f"or upload one (up to {MAX_MB} MB, {MAX_PIXELS // 10**6} megapixels)",
                    height=150,
                    elem_id="upload",
                )
                first = way("First", start)
                twice = gr.Checkbox(label="Compare with a second method")
                with gr.Group(visible=False) as more:
                    second = way("Second", Pruning("divprune", start.share))
            with gr.Column(scale=3, min_width=600):
                with gr.Row():
                    question = gr.Textbox(label="Question", scale=3, elem_id="question")
                    ready = gr.Dropdown(
                        [], label="Questions about this scene", scale=2, interactive=True
                    )
                    send = gr.Button("Ask", variant="primary", scale=1, elem_id="ask")
                status = gr.HTML(elem_id="status")
                with gr.Row():
                    chats = {
                        side: gr.Chatbot(
                            label=label,
                            height=190,
                            visible=side != "second",
                            render_markdown=False,
                            elem_id=f"chat-{side}",
                            elem_classes="chat",
                            buttons=[],
                        )
                        for side, label in zip(
                            SIDES, ("plain", "pruned", "pruned by the second method"), strict=True
                        )
                    }
                with gr.Tab("Kept tokens"):
                    kept = gr.HTML(elem_id="kept")
                with gr.Tab("Scores"):
                    scores = gr.HTML(elem_id="scores")
                with gr.Tab("Costs"):
                    costs = gr.HTML(elem_id="costs")

        controls = [*first, twice, *second]
        shown = [visit, status, *chats.values(), kept, scores, costs]
        outputs = [*shown, picture, question, ready, upload]

        def told(found: Visit, line: str) -> Changes:
            """Return the values of the components for a visit, and the line above the answers."""
            values: Changes = {visit: found, status: line}
            values |= {chat: found.messages(side) for side, chat in chats.items()}
            if found.shown is not None:
                values |= {kept: found.shown.kept, scores: found.shown.scores}
                values[costs] = found.shown.costs
            return values

        def steps(found: Visit, work: Iterator[Visit]) -> Iterator[Changes]:
            """Show every visit that the work comes to, or why it fails."""
            yield {status: _WORKING}
            problem = ""
            try:
                for found in work:
                    yield told(found, _WORKING)
            except Exception as error:
                problem = explained(error)
            yield {visit: found, status: problem}

        def on_look(found: Visit, text: str, *given: Any) -> Iterator[Changes]:
            yield from steps(found, looks(engine, found, text, given))

        def on_ask(found: Visit, text: str, *given: Any) -> Iterator[Changes]:
            yield from steps(found, asks(engine, found, text, given, remembers=builtin is None))

        def on_scene(
            event: gr.SelectData, found: Visit, text: str, *given: Any
        ) -> Iterator[Changes]:
            picked = scenes[event.index]
            texts = [each.text for each in picked.questions]
            choice = gr.Dropdown(texts, value=None)
            yield {picture: picked.image, question: texts[0], ready: choice, upload: None}
            yield from on_look(Visit(picked.image), texts[0], *given)

        def on_upload(path: str, found: Visit, text: str, *given: Any) -> Iterator[Changes]:
            try:
                image = read_upload(path)
            except Exception as error:
                yield {status: explained(error)}
                return
            yield {picture: image, ready: gr.Dropdown([], value=None)}
            yield from on_look(Visit(image), text, *given)

        inputs = [visit, question, *controls]
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        gallery.select(on_scene, inputs, outputs, **model)
        upload.upload(on_upload, [upload, *inputs], outputs, **model)
        gr.on([send.click, question.submit], on_ask, inputs, shown, **model)
        ready.input(lambda text: text, ready, question).then(on_look, inputs, shown, **model)
        for control in controls:
            changed = control.release if isinstance(control, gr.Slider) else control.input
            changed(on_look, inputs, shown, trigger_mode="always_last", **model)
        twice.change(
            lambda on: (gr.Group(visible=on), gr.Chatbot(visible=on)),
            twice,
            [more, chats["second"]],
        )
    page.queue(max_size=_WAITING, api_open=False)
    return page
