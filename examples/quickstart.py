"""One line prunes a model: the built-in one here, any supported checkpoint elsewhere."""

from pathlib import Path

from PIL import Image

import atp_patch
from atp_patch.builtin import load_builtin

model, processor = load_builtin()
atp_patch.patch_model(model, layers=[4, 14, 24])  # the one line

image = Image.open(Path(__file__).parent / "scenes" / "01.png")
content = [{"type": "image"}, {"type": "text", "text": "How many red shapes are there?"}]
chat = [{"role": "user", "content": content}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=image, text=text, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

trace = atp_patch.last_trace(model)
print(f"{trace.visual_tokens:.0f} visual tokens, {trace.average_tokens:.0f} a layer on average")
