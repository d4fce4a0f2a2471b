"""The command ``python -m atp_patch.convert {llava,vila,internvl} FOLDER OUT``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError

from atp_patch.contract.errors import ATPError, ConfigError
from atp_patch.convert.internvl import internvl_plan
from atp_patch.convert.llava import llava_plan
from atp_patch.convert.options import PROG, parser
from atp_patch.convert.plan import Plan
from atp_patch.convert.write import write
from atp_patch.tools.command_line import execute
from atp_patch.tools.loading import first_line, quiet_transformers


def plan_for(args: argparse.Namespace) -> Plan:
    """Plan the conversion that the arguments ask for.

    Raises:
        ATPError: where the arguments or the checkpoint are wrong.
    """
    if args.layout == "internvl" and args.vision_tower is not None:
        raise ConfigError("--vision-tower is for llava and vila; InternVL brings its own.")
    try:
        if args.layout == "internvl":
            return internvl_plan(args.folder)
        return llava_plan(args.folder, args.vision_tower)
    except ATPError:
        raise
    except (
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"config.json in {args.folder} cannot be used ({type(error).__name__}: "
            f"{first_line(error)}); download it anew."
        ) from error


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line; returns the exit status, as :func:`execute` says."""
    return execute(
        parser(prog),
        _command,
        argv,
        memory="convert where there is more of it.",
    )


def _command(args: argparse.Namespace) -> None:
    with quiet_transformers(progress=False):
        plan = plan_for(args)
        size = write(plan, args.out)
    name = plan.architecture.__name__
    if args.json:
        told = {"out": str(args.out), "architecture": name, "bytes": size, "notes": plan.notes}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return
    sys.stdout.write(f"{args.out}: {name}, {size / 2**30:.2f} GiB\n")
    for note in plan.notes:
        sys.stderr.write(f"{PROG}: note: {note}\n")


if __name__ == "__main__":
    sys.exit(main())
