"""Makes the built-in processor: word-level tokenizer, chat template, CLIP image processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from atp_patch.builtin.scenes import IMAGE_PX, PATCH_PX
from atp_patch.builtin.tokens import BOS, EOS, IMAGE, PAD, SPECIALS, UNK, word_ids
from atp_patch.builtin.vocabulary import OPENERS

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""It writes a question as `<s>USER: <image> How many red shapes are there? ASSISTANT:`."""


def build_tokenizer(
    more: tuple[str, ...] = (), named: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Make the tokenizer, which has one token for each word and `<unk>` for unknown words.

    It agrees with `tokens.encode`, which is tested.

    Args:
        more: special tokens after the words.
        named: special tokens that are attributes of the tokenizer, by the attribute's name.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = word_ids() | {token: len(word_ids()) + k for k, token in enumerate(more)}
    specials = (*SPECIALS, *more)
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    # Only words that begin a question become lower case; single capitals are characters of signs.
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(word, word.lower()) for word in OPENERS]
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens=dict(named or {"image_token": IMAGE}),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Make the processor of the built-in model, which does not need torchvision."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"height": IMAGE_PX, "width": IMAGE_PX},
        crop_size={"height": IMAGE_PX, "width": IMAGE_PX},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
