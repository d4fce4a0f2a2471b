"""The only code that knows how transformers calls things."""

from atp_patch.seam.decoder.prefill import Prefill
from atp_patch.seam.hooks import Pruner, Seam
from atp_patch.seam.host.locate import Parts, check_uncompiled, decoder_shape, locate
from atp_patch.seam.host.passes import PerThread
from atp_patch.seam.host.recorder import Recorder, Recording
from atp_patch.seam.learning.learning_pass import LearningPass
from atp_patch.seam.tower.merging import MergeHooks, VisionHooks
from atp_patch.seam.tower.reading import ReadingHooks
from atp_patch.seam.tower.shrinking import ShrinkHooks
from atp_patch.seam.voco.held import Held, for_model
from atp_patch.seam.voco.voco_pass import VoCoPass
from atp_patch.seam.voco_seam import VoCoSeam

__all__ = ["LearningPass", "MergeHooks", "Parts", "Prefill", "Pruner", "Seam"]
__all__ += [
    "Held",
    "PerThread",
    "ReadingHooks",
    "Recorder",
    "Recording",
    "ShrinkHooks",
    "VisionHooks",
    "VoCoPass",
    "VoCoSeam",
]
__all__ += ["check_uncompiled", "decoder_shape", "for_model", "locate"]
