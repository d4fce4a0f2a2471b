"""The command ``python -m atp_patch.convert {llava,vila,internvl} FOLDER OUT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from atp_patch.contract.errors import ATPError, ConfigError
from atp_patch.convert.internvl import internvl_plan
from atp_patch.convert.llava import llava_plan
from atp_patch.convert.plan import Plan
from atp_patch.convert.write import write
from atp_patch.tools.command_line import OneLineParser, execute
from atp_patch.tools.loading import first_line, quiet_transformers

PROG = "python -m atp_patch.convert"
DESCRIPTION = """
Rewrite a checkpoint of another package as one that transformers loads by itself.

  llava     LLaVA and LLaVA-1.5: LlavaLlamaForCausalLM, LlavaMistralForCausalLM
  vila      VILA-7B, in one folder or in the folders llm, mm_projector and vision_tower
  internvl  InternVL-2 with a Qwen2 or LLaMA language model
"""


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    made = OneLineParser(
        PROG, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("layout", choices=["llava", "vila", "internvl"], help="what FOLDER holds")
    made.add_argument("folder", type=Path, metavar="FOLDER", help="the checkpoint")
    made.add_argument("out", type=Path, metavar="OUT", help="a new folder to write")
    made.add_argument(
        "--vision-tower",
        type=Path,
        metavar="DIR",
        help="the CLIP model, if FOLDER does not hold it (llava, vila)",
    )
    return made


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, as :func:`execute` says."""
    return execute(
        parser(),
        _command,
        argv,
        memory="convert where there is more of it.",
    )


def _command(args: argparse.Namespace) -> None:
    with quiet_transformers(progress=False):
        plan = plan_for(args)
        size = write(plan, args.out)
    sys.stdout.write(f"{args.out}: {plan.architecture.__name__}, {size / 2**30:.2f} GiB\n")
    for note in plan.notes:
        sys.stderr.write(f"{PROG}: note: {note}\n")


if __name__ == "__main__":
    sys.exit(main())
