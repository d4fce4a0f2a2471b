"""One picture under every method that needs no training: what each leaves in the last layers.

Each title says how many visual tokens the decoder's layers hold on average.

    python examples/every_method.py --out every_method.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

import atp_patch
from atp_patch.builtin import load_builtin
from atp_patch.methods import method_class, untrained_methods
from atp_patch.tools.visualize import as_seen, overlay

PANEL, TITLE, ACROSS = 168, 24, 5


def panel_of(
    model: Any, processor: Any, image: Image.Image, name: str, share: float
) -> Image.Image:
    """The picture with the patches dimmed that a method drops, under the method's name.

    Args:
        share: the visual tokens to keep, averaged over all decoder layers. A method whose paper
            sets its own shares keeps these.
    """
    question = [{"type": "image"}, {"type": "text", "text": "How many red shapes are there?"}]
    chat = [{"role": "user", "content": question}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    own = getattr(method_class(name), "default_keep", None)
    atp_patch.patch_model(
        model, method=name, target_tokens=None if own is not None else share * tokens
    )
    try:
        with torch.no_grad():
            model(**inputs)
        trace = atp_patch.last_trace(model)
        row = overlay(as_seen(image, inputs, processor, trace), trace, panel=PANEL)
    finally:
        atp_patch.unpatch_model(model)
    last = row.crop((row.width - PANEL, row.height - PANEL, row.width, row.height))
    made = Image.new("RGB", (PANEL, PANEL + TITLE), "white")
    made.paste(last, (0, TITLE))
    title = f"{name}: {trace.average_tokens:.0f} of {tokens}"
    ImageDraw.Draw(made).text((2, 5), title, fill="black", font=ImageFont.load_default(14))
    return made


def main() -> None:
    """Write the sheet of all panels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    scene = Path(__file__).parent / "scenes" / "01.png"
    parser.add_argument("--image", type=Path, default=scene, help="a picture (default: a scene)")
    parser.add_argument("--model", default="llava", help="a built-in model (default: llava)")
    parser.add_argument("--share", type=float, default=0.25, help="tokens to keep (default: 0.25)")
    parser.add_argument("--methods", nargs="+", default=untrained_methods(), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("every_method.png"))
    given = parser.parse_args()
    model, processor = load_builtin(given.model)
    image = Image.open(given.image).convert("RGB")
    panels = [panel_of(model, processor, image, name, given.share) for name in given.methods]
    width, height = PANEL + 8, PANEL + TITLE + 8
    rows = -(-len(panels) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * width, rows * height), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % ACROSS * width + 4, number // ACROSS * height + 4))
    sheet.quantize(64).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
