"""Options that say how a model is pruned, of commands that prune it in one way."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from atp_patch.contract.errors import ConfigError
from atp_patch.tools.arguments import (
    Group,
    add_layers,
    add_seed,
    add_target_tokens,
    comma_separated,
    hub_options,
)

if TYPE_CHECKING:
    from atp_patch.tools.trained import Trained


def add_pruning(parse: argparse.ArgumentParser) -> Group:
    """Add the group of options about method, layers and budget, and return it."""
    group = parse.add_argument_group("pruning")
    group.add_argument(
        "--method",
        metavar="NAME",
        help="how to choose tokens (default: atp); docs/methods.md lists the names; FIRST/SECOND "
        "prunes before the decoder and inside it",
    )
    add_layers(group)
    add_target_tokens(group)
    group.add_argument(
        "--keep",
        type=comma_separated(float),
        metavar="P[,Q..]",
        help="instead: the share that a pruning layer keeps, one number or one for each layer",
    )
    add_seed(group, "what is random, such as --method random")
    return group


def check_pruning(args: argparse.Namespace) -> None:
    """Check the options of :func:`add_pruning` before a model is loaded.

    Raises:
        ConfigError: if one is wrong; the message names it and the mend.
    """
    from atp_patch.methods import untrained_methods
    from atp_patch.tools.method_spec import stages

    if args.method is not None and not set(stages(args.method)) <= set(untrained_methods()):
        raise ConfigError(
            f"--method {args.method!r}: give one of {', '.join(untrained_methods())}; one that has "
            "to be trained comes with --weights."
        )
    if args.keep is not None and args.target_tokens is not None:
        raise ConfigError("--keep and --target-tokens both set the budget; give one of them.")


def trained(args: argparse.Namespace) -> Trained | None:
    """Find the adapter that ``--weights`` names, which is downloaded if it is on the Hub.

    Raises:
        ATPError: if there is none.
    """
    from atp_patch.tools.trained import find_trained

    hub = hub_options(args)
    if args.weights is None and (given := next((n for n, value in hub.items() if value), None)):
        raise ConfigError(f"--{given.replace('_', '-')} goes with --weights.")
    return None if args.weights is None else find_trained(args.weights, **hub)


def patch_settings(args: argparse.Namespace, found: Trained | None) -> dict[str, Any]:
    """Return the keyword arguments of ``patch_model``.

    Args:
        args: the arguments.
        found: what :func:`trained` has found.
    """
    from atp_patch.tools.method_spec import method_argument

    method = args.method
    settings = {
        "layers": args.layers,
        "method": None if method is None else method_argument(method),
        "keep": args.keep[0] if args.keep is not None and len(args.keep) == 1 else args.keep,
        "target_tokens": args.target_tokens,
        "weights": None if found is None else found.adapter,
    }
    return settings | ({"seed": args.seed} if method == "random" else {})
