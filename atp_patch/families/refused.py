"""Models that cannot be pruned: the reason, and the model to use in their place."""

from __future__ import annotations

_CROSS = "its images are read by cross-attention and never stand in the decoder's sequence"
_QUERIES = "its Q-Former already reduces an image to a few dozen query tokens"
_ENCODER = "it is an encoder-decoder"
_MIXERS = "its decoder layers are attention, Mamba or an MLP alone, and do not say which by name"
_INDEXED = "its attention chooses keys by an index, which caches keys of its own"
_CONVOLVED = "its attention runs short convolutions over neighbouring keys, and these would change"
_WORDS = "its images are words of its vocabulary, which it draws too, and no features"
_TALKS = "it is a thinker, which reads images, beside a talker, which speaks"
_NO_TEXT = "it answers with the actions of a robot and writes no text"

#: ``config.model_type`` -> (reason, alternative)
REFUSED: dict[str, tuple[str, str]] = {
    "mllama": (_CROSS, "llava_next has LLaMA decoders with images in the sequence"),
    "idefics": (_CROSS, "idefics3 is its successor"),
    "florence2": (_ENCODER, "paligemma answers the same kinds of prompts"),
    "pix2struct": (_ENCODER, "paligemma answers the same kinds of prompts"),
    "udop": (_ENCODER, "paligemma answers the same kinds of prompts"),
    "t5gemma2": (_ENCODER, "gemma3 has the same tower and can be pruned"),
    "vision-encoder-decoder": (_ENCODER, "paligemma answers the same kinds of prompts"),
    "blip-2": (_QUERIES, "llava keeps a grid of visual tokens"),
    "instructblip": (_QUERIES, "llava keeps a grid of visual tokens"),
    "instructblipvideo": (_QUERIES, "video_llava keeps a grid of visual tokens"),
    "blip": (_CROSS, "llava keeps a grid of visual tokens"),
    "evolla": (_CROSS, "llava takes pictures; its own are proteins"),
    "kosmos-2": (
        "its resampler already reduces an image to 64 query tokens",
        "paligemma finds places in pictures too",
    ),
    "kosmos-2.5": (
        "it is told by a mask of its own, and by no id, which tokens are visual",
        "got_ocr2 reads documents too",
    ),
    "git": ("its decoder is built of BERT's layers", "llava keeps a grid of visual tokens"),
    "pp_formulanet": (_ENCODER, "got_ocr2 reads formulas too"),
    "chameleon": (_WORDS, "janus reads features of a picture and draws words"),
    "apertus1p5": (_WORDS, "janus reads features of a picture and draws words"),
    "emu3": (_WORDS, "janus reads features of a picture and draws words"),
    "pi0": (_NO_TEXT, "paligemma is the model inside it"),
    "diffusion_gemma": (
        "its answers are blocks of diffusion, by a decoder that reads another model's keys",
        "gemma4 writes word by word",
    ),
    "qwen2_5_omni": (_TALKS, "qwen2_5_omni_thinker can be pruned: patch model.thinker"),
    "qwen3_omni_moe": (_TALKS, "qwen3_omni_moe_thinker can be pruned: patch model.thinker"),
    "mistral4": ("it is a language model without images", "mistral3 takes images"),
    "deepseek_ocr2": (
        "its encoder already reduces a page to a few hundred queries in reading order",
        "deepseek_vl keeps a grid of visual tokens",
    ),
    "unlimited_ocr": (
        "its layers attend within windows that spare the picture, by a cache of its own",
        "deepseek_vl keeps a grid of visual tokens",
    ),
    "mistral_large4": (_INDEXED, "mistral3 can be pruned"),
    "glm5_next": (_INDEXED, "glm4v_moe can be pruned"),
    "hy_v4_vl": (_INDEXED, "hunyuan_vl can be pruned"),
    "dots3_note": (_INDEXED, "glm4v_moe can be pruned"),
    "minimax_m3_vl": (_INDEXED, "glm4v_moe can be pruned"),
    "inkling_mm_model": (_CONVOLVED, "qwen3_vl_moe can be pruned"),
    "inkling2": (_CONVOLVED, "qwen3_vl_moe can be pruned"),
    "inkling2_loop": (_CONVOLVED, "qwen3_vl_moe can be pruned"),
    "nemotron_h_omni": (_MIXERS, "internvl has tiles of the same kind"),
    "qwen4_exp": (_INDEXED, "qwen3_5 can be pruned"),
}
