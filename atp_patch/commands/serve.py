"""The server: one model, plain or patched, behind OpenAI's API.

    atp-patch serve --target-tokens 144

The exit status is 2 with one line on stderr if an argument is wrong, or 130 if it was stopped.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from typing import Any

import torch

from atp_patch.commands.pruning_options import patch_settings, trained
from atp_patch.commands.serve_options import PLAIN, PROG, check, parser
from atp_patch.contract.errors import ConfigError, first_line
from atp_patch.patching.api import patch_model, require_patch
from atp_patch.tools.command_line import execute, shows_progress
from atp_patch.tools.loading import (
    choose_device,
    choose_dtype,
    load_model,
    quiet_transformers,
)
from atp_patch.tools.trained import Trained, merged

_GRACE_SECONDS = 5


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line and return the exit status of :func:`execute`."""
    return execute(parser(prog), _command, argv)


def _command(args: argparse.Namespace) -> None:
    with quiet_transformers(progress=shows_progress(args)):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Load and patch the model, and serve it until the process is stopped.

    Raises:
        ATPError: if an argument is wrong.
    """
    check(args)
    try:
        import uvicorn

        from atp_patch.integrations.serving import build_app
        from atp_patch.tools.ending import EndingServer
    except ImportError as error:
        raise ConfigError(
            f"serving needs transformers 5.19 or newer and its server ({first_line(error)}): pip "
            "install 'atp-patch[serve]'."
        ) from error
    torch.manual_seed(args.seed)
    found = None if args.method == PLAIN else trained(args)
    with _listening(args.host, args.port) as listener:
        model, processor = load(args, found)
        with merged(model, None if found is None else found.lora):
            app = build_app(args.model, model, processor, max_image_pixels=args.max_image_pixels)
            _tell(args, listener, model)
            config = uvicorn.Config(
                app,
                log_level="error",
                access_log=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
            EndingServer(config).run(sockets=[listener])


def load(args: argparse.Namespace, found: Trained | None) -> tuple[Any, Any]:
    """Load the model and its processor, and patch it as the arguments say.

    Args:
        args: the arguments.
        found: the adapter that they name.
    """

    def prune(model: Any) -> None:
        if args.method != PLAIN:
            patch_model(model, **patch_settings(args, found))

    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, processor = load_model(args.model, device, dtype, check=prune)
    prune(model)
    return model, processor


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that takes connections, before time is spent on loading a model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened on ({first_line(error)}); give others."
        ) from error


def _tell(args: argparse.Namespace, listener: socket.socket, model: Any) -> None:
    """Say where the server is and what it serves."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
    methods: list[str] = []
    layers: list[int] = []
    if args.method != PLAIN:
        config = require_patch(model).config
        before = None if config.before is None else config.before.method
        methods = [name for name in (before, config.method) if name is not None]
        layers = list(config.layers)
    if args.json:
        told = {"url": url, "model": args.model, "methods": methods, "layers": layers}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        return
    how = "/".join(methods) or "not pruned"
    if layers:
        how += f" before layers {', '.join(map(str, layers))}"
    sys.stderr.write(f"{args.model} ({how}) is served at {url}; Ctrl-C stops it.\n")
