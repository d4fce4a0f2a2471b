"""One picture under every method that needs no training: what each leaves in the last layers.

Each title says how many visual tokens the last layers hold; the line below a picture gives the
average over all layers.

    python examples/every_method.py --out every_method.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from PIL import Image

import atp_patch
from atp_patch import visualize
from atp_patch.builtin import load_builtin
from atp_patch.methods import method_class, untrained_methods
from atp_patch.tools.pictures import read_image


def trace_of(
    model: Any, processor: Any, image: Image.Image, name: str, share: float
) -> atp_patch.PruningTrace:
    """What one method keeps of the picture.

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
        return visualize.with_pictures(atp_patch.last_trace(model), image, inputs, processor)
    finally:
        atp_patch.unpatch_model(model)


def main() -> None:
    """Write the sheet of all panels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    scene = Path(__file__).parent / "scenes" / "01.png"
    parser.add_argument("--image", type=Path, default=scene, help="a picture (default: a scene)")
    parser.add_argument("--model", default="llava", help="a built-in model (default: llava)")
    parser.add_argument("--share", type=float, default=0.25, help="tokens to keep (default: 0.25)")
    parser.add_argument("--methods", nargs="+", default=untrained_methods(), help="default: all")
    parser.add_argument("--dark", action="store_true", help="white letters on a dark ground")
    parser.add_argument("--out", type=Path, default=Path("every_method.png"))
    given = parser.parse_args()
    model, processor = load_builtin(given.model)
    image = read_image(given.image)
    traces = {name: trace_of(model, processor, image, name, given.share) for name in given.methods}
    colours = {"text.color": "#e8e8e8", "figure.facecolor": "#16191f"} if given.dark else {}
    with rc_context(colours):
        sheet = visualize.compare(traces).image(dpi=120)
    sheet.quantize(64, Image.Quantize.FASTOCTREE).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
