"""The seam: the only code that knows the calling conventions of transformers."""

from atp_patch.seam.decoder.prefill import Prefill
from atp_patch.seam.decoder.visual_tokens import Learned, VisualTokens
from atp_patch.seam.host.cache import CACHE_ARGUMENT, cache_in
from atp_patch.seam.host.locate import Parts, check_uncompiled, decoder_shape, locate
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.recorder import Recorder, Recording
from atp_patch.seam.policy import Policy
from atp_patch.seam.seam import Seam
from atp_patch.seam.tower.merging import MergeHooks, VisionHooks
from atp_patch.seam.tower.reading import ReadingHooks
from atp_patch.seam.tower.shrinking import ShrinkHooks
from atp_patch.seam.voco.cached_prompt import CachedPrompt, for_model, read_ahead
from atp_patch.seam.voco.voco_pass import VoCoPass, VoCoPolicy

__all__ = [
    "CACHE_ARGUMENT",
    "CachedPrompt",
    "Learned",
    "MergeHooks",
    "Parts",
    "PerThread",
    "Policy",
    "Prefill",
    "ReadingHooks",
    "Recorder",
    "Recording",
    "Seam",
    "ShrinkHooks",
    "VisionHooks",
    "VisualTokens",
    "VoCoPass",
    "VoCoPolicy",
    "cache_in",
    "check_uncompiled",
    "decoder_shape",
    "for_model",
    "locate",
    "read_ahead",
]
