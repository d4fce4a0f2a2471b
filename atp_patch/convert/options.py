"""The command line of conversion."""

from __future__ import annotations

import argparse
from pathlib import Path

from atp_patch.tools.arguments import Parser, add_output

PROG = "python -m atp_patch.convert"
DESCRIPTION = """
Rewrite a checkpoint of another package as one that transformers loads by itself.

  llava     LLaVA and LLaVA-1.5: LlavaLlamaForCausalLM, LlavaMistralForCausalLM
  vila      VILA-7B, in one folder or in the folders llm, mm_projector and vision_tower
  internvl  InternVL-2 with a Qwen2 or LLaMA language model
"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Args:
        prog: what help and errors call the command.
    """
    made = Parser(prog, DESCRIPTION, "llava downloads/llava-v1.5-7b llava-1.5-7b")
    made.add_argument("layout", choices=["llava", "vila", "internvl"], help="what FOLDER holds")
    made.add_argument("folder", type=Path, metavar="FOLDER", help="the checkpoint")
    made.add_argument("out", type=Path, metavar="OUT", help="a new folder to write")
    made.add_argument(
        "--vision-tower",
        type=Path,
        metavar="FOLDER",
        help="the CLIP model, if the checkpoint does not hold it (llava, vila)",
    )
    add_output(made, "what was written")
    return made
