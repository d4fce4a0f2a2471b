"""The processor of the third built-in model: a line of placeholders for each row of an image."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from atp_patch.builtin.smol.tokens import IMAGE_END, IMAGE_PAD, NEWLINE
from atp_patch.contract.errors import InputError

TOKEN_PX, MOST_PX = 16, 448
"""Side of the square that a visual token shows, and longest side of an image; larger ones are
made smaller."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_PAD + "\n' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class RowsProcessor(ProcessorMixin):
    """Pixtral's processor with other tokens, which does not need torchvision.

    An image becomes rows of placeholders, one for each visual token. A line break stands between
    two rows, and the end of the image behind the last one.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = IMAGE_PAD
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make the model's inputs.

        Args:
            images: an image, a list of images in the order of their placeholders, or such a list
                for each text.
            text: one or several texts, with one placeholder for each image.
            return_tensors: "pt", or None for lists.
            kwargs: arguments of the tokenizer.

        Raises:
            InputError: if the number of images is not that of placeholders.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        pictures = _flat(images)
        named = sum(one.count(IMAGE_PAD) for one in texts)
        if named != len(pictures):
            raise InputError(
                f"the text has {named} placeholders {IMAGE_PAD} and there are {len(pictures)} "
                "images; give as many of each."
            )
        data: dict[str, Any] = {}
        if pictures:
            seen = self.image_processor(pictures, return_tensors="pt")
            data = {name: seen[name] for name in ("pixel_values", "image_sizes")}
            sizes = iter(torch.as_tensor(seen["image_sizes"]).tolist())
            texts = [_with_rows(one, sizes) for one in texts]
        read = self.tokenizer(texts, return_tensors=return_tensors, **kwargs)
        return BatchFeature({**read, **data})

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]


def image_rows(rows: int, columns: int) -> str:
    """Return the text of an image of so many rows and columns of visual tokens."""
    return NEWLINE.join([IMAGE_PAD * columns] * rows) + IMAGE_END


def image_processor() -> PixtralImageProcessorPil:
    """Make the part of the processor that reads images."""
    return PixtralImageProcessorPil(
        size={"longest_edge": MOST_PX},
        patch_size={"height": TOKEN_PX, "width": TOKEN_PX},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def build_processor(tokenizer: Any) -> RowsProcessor:
    """Make the processor with the decoder's tokenizer."""
    tokenizer.padding_side = "left"
    return RowsProcessor(image_processor(), tokenizer, chat_template=CHAT_TEMPLATE)


def _with_rows(text: str, sizes: Any) -> str:
    before, *after = text.split(IMAGE_PAD)
    for part in after:
        height, width = next(sizes)
        before += image_rows(height // TOKEN_PX, width // TOKEN_PX) + part
    return before


def _flat(images: Any) -> list[Image.Image]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for part in images for picture in _flat(part)]
    return [images]
