"""The only code that knows how transformers calls things."""

from atp_patch.seam.compress import Held, VoCoSeam, for_model
from atp_patch.seam.hooks import Pruner, Seam
from atp_patch.seam.learning import LearningPass
from atp_patch.seam.locate import Parts, check_uncompiled, decoder_shape, locate
from atp_patch.seam.prefill import Prefill
from atp_patch.seam.recorder import Recording
from atp_patch.seam.shrink import ShrinkHooks
from atp_patch.seam.tower import MergeHooks, VisionHooks
from atp_patch.seam.voco import VoCoPass

__all__ = ["LearningPass", "MergeHooks", "Parts", "Prefill", "Pruner", "Seam"]
__all__ += ["Held", "Recording", "ShrinkHooks", "VisionHooks", "VoCoPass", "VoCoSeam"]
__all__ += ["check_uncompiled", "decoder_shape", "for_model", "locate"]
