"""Models that cannot be pruned: the reason, and the model to use in their place."""

from __future__ import annotations

_CROSS = "its images are read by cross-attention and never stand in the decoder's sequence"
_SHARED = "its later decoder layers reuse the keys of earlier ones, which have another length"
_QUERIES = "its Q-Former already reduces an image to a few dozen query tokens"
_ENCODER = "it is an encoder-decoder"
_HYBRID = "some of its decoder layers are no attention, but linear attention or convolution"

#: ``config.model_type`` -> (reason, alternative)
REFUSED: dict[str, tuple[str, str]] = {
    "mllama": (_CROSS, "llava_next has LLaMA decoders with images in the sequence"),
    "idefics": (_CROSS, "idefics3 is its successor"),
    "gemma3n": (_SHARED, "gemma4 is its successor"),
    "florence2": (_ENCODER, "paligemma answers the same kinds of prompts"),
    "pix2struct": (_ENCODER, "paligemma answers the same kinds of prompts"),
    "udop": (_ENCODER, "paligemma answers the same kinds of prompts"),
    "t5gemma2": (_ENCODER, "gemma3 has the same tower and can be pruned"),
    "vision-encoder-decoder": (_ENCODER, "paligemma answers the same kinds of prompts"),
    "blip-2": (_QUERIES, "llava keeps a grid of visual tokens"),
    "instructblip": (_QUERIES, "llava keeps a grid of visual tokens"),
    "instructblipvideo": (_QUERIES, "video_llava keeps a grid of visual tokens"),
    "qwen4_exp": (_HYBRID, "qwen3_vl can be pruned"),
    "minicpmv4_6": (_HYBRID, "internvl has tiles of the same kind"),
    "minicpmv4_7": (_HYBRID, "internvl has tiles of the same kind"),
    "minicpm_ocr": (_HYBRID, "internvl has tiles of the same kind"),
    "lfm2_vl": (_HYBRID, "smolvlm is of similar size"),
    "lfm3_vl": (_HYBRID, "smolvlm is of similar size"),
}
