"""The arguments of command lines: the parser, its groups, and the options that several commands
have, each with the same words. Nothing here needs torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from atp_patch.builtin import NAMES
from atp_patch.contract.errors import ConfigError
from atp_patch.tools.files import parse_json

DTYPES = ("bfloat16", "float16", "float32")
MAX_IMAGE_PIXELS = 50_000_000  # of pictures that others send or collected, unless told otherwise
EXIT_STATUS = """\
exit status: 0 where the work is done; 2 where an argument or the data is wrong, memory does not
suffice, or a file or the Hub refuses, with one line on stderr; 130 after Ctrl-C; 1 for a bug, with
its traceback"""
HUB = ("revision", "token", "cache_dir", "local_files_only")
"""What :func:`add_hub` adds, as ``patch_model`` and ``load_trained`` call it."""
_ADAPTERS = Path(__file__).parents[1] / "builtin" / "adapters"
Value = TypeVar("Value")
Group = Any  # what add_argument_group returns has no public name


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, and whose help ends with an example.

    Args:
        prog: what the command is called.
        description: what it does.
        example: one command line.
        kwargs: other arguments of argparse's parser.
    """

    def __init__(self, prog: str, description: str = "", example: str = "", **kwargs: Any) -> None:
        end = f"example:\n  {prog} {example}\n\n{EXIT_STATUS}" if example else None
        super().__init__(
            prog,
            description=description,
            epilog=end,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, printable(f"{self.prog}: {message} (see {self.prog} --help)\n"))


def add_output(parse: argparse.ArgumentParser, told: str, *, json: bool = True) -> Group:
    """Add the group of options about what is printed.

    Args:
        parse: the parser.
        told: what ``--json`` prints.
        json: whether there is ``--json``.

    Returns:
        the group.
    """
    group = parse.add_argument_group("output")
    group.add_argument(
        "--quiet", action="store_true", help="say nothing on stderr but errors, show no progress"
    )
    if json:
        group.add_argument("--json", action="store_true", help=f"print {told} as JSON on stdout")
    return group


def add_model(parse: argparse.ArgumentParser, *, dtype: str | None = None) -> Group:
    """Add the group of options about the model, and return it.

    Args:
        parse: the parser.
        dtype: the default of ``--dtype``, where it is always the same.
    """
    group = parse.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        help=f"{' (default), '.join(NAMES)}, or the folder or Hub id of a checkpoint",
    )
    group.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
    )
    told = "float32 on a CPU, else bfloat16" if dtype is None else dtype
    group.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"default: {told}")
    return group


def add_layers(group: Group) -> None:
    """Add ``--layers``."""
    group.add_argument(
        "--layers",
        type=comma_separated(int),
        metavar="I[,J..]",
        help="prune before these decoder layers (default: 4,14,24 of 32, in proportion)",
    )


def add_target_tokens(group: Group) -> None:
    """Add ``--target-tokens``."""
    group.add_argument(
        "--target-tokens",
        type=float,
        metavar="N",
        help="visual tokens averaged over all decoder layers (default: a quarter of the image's)",
    )


def add_seed(group: Group, what: str) -> None:
    """Add ``--seed``.

    Args:
        what: what is drawn.
    """
    group.add_argument("--seed", type=seed, default=0, metavar="N", help=f"of {what} (default: 0)")


def add_weights(parse: argparse.ArgumentParser, *, required: bool = False) -> Group:
    """Add the group of options that name an adapter, as ``patch_model`` takes them."""
    group = parse.add_argument_group("adapter")
    ours = ", ".join(sorted(folder.parent.name for folder in _ADAPTERS.glob("*/adapter")))
    group.add_argument(
        "--weights",
        metavar="ADAPTER",
        required=required,
        help="folder of a saved adapter or of a training, Hub id of an adapter, or one that comes "
        f"with the package: {ours}",
    )
    group.add_argument(
        "--subfolder", default="", metavar="NAME", help="the adapter's folder in there"
    )
    add_hub(group)
    return group


def add_hub(group: Group) -> None:
    """Add the options for the Hub that reading has."""
    group.add_argument(
        "--revision", metavar="NAME", help="a branch, tag or commit of the Hub repository"
    )
    group.add_argument(
        "--cache-dir", type=Path, metavar="FOLDER", help="where downloads from the Hub are kept"
    )
    group.add_argument(
        "--local-files-only", action="store_true", help="use only what was downloaded before"
    )
    add_token(group)


def add_token(group: Group) -> None:
    """Add ``--token``."""
    group.add_argument(
        "--token",
        metavar="TOKEN",
        help="for the Hub (default: $HF_TOKEN, or what `hf auth login` stored)",
    )


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what ``patch_model`` and ``load_trained`` take by keyword for an adapter's source."""
    return {name: getattr(args, name) for name in (*HUB, "subfolder")}


def comma_separated(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Make the ``type`` of an argument that takes several values.

    Args:
        kind: the type of each value.
    """

    def parse(text: str) -> list[Value]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"comma-separated {kind.__name__} list"  # argparse shows it in errors
    return parse


def seed(text: str) -> int:
    """Return the ``type`` of an argument that seeds torch's generators."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an int from 0 to 2**32 - 1")
    return value


def named_values(given: list[str]) -> dict[str, Any]:
    """Read options such as "name=value" into a mapping, as :func:`named_value` reads each.

    Raises:
        ConfigError: where there is no "=".
    """
    try:
        return dict(map(named_value, given))
    except ValueError as error:
        raise ConfigError(f"--option {error}: give NAME=VALUE, for example slope=10.") from error


def named_value(text: str) -> tuple[str, Any]:
    """Read "name=value".

    Returns:
        The name, and the value: what it is in JSON, where a list becomes a tuple, a truth value as
        Python writes it, or else a word.

    Raises:
        ValueError: where there is no name or no "="; the message is the text.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals):
        raise ValueError(text)
    try:
        parsed = parse_json(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return name, value
    return name, tuple(parsed) if isinstance(parsed, list) else parsed


def check_text(text: str, name: str) -> None:
    """Refuse text that no path and no file in UTF-8 can hold.

    Args:
        text: the text.
        name: what the text is, for the error.

    Raises:
        ConfigError: where it holds NUL or a lone surrogate. Python also reads a byte of a file name
            as a lone surrogate where the name is not UTF-8.
    """
    wrong = re.search("[\\0\ud800-\udfff]", text)
    if wrong:
        raise ConfigError(
            f"{name} holds the character {wrong[0]!a}, which is no text: {text!a}; give another, "
            "or rename the file."
        )


def printable(text: str) -> str:
    """Return the text with escapes in place of what UTF-8 cannot encode, such as some names of
    files.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
