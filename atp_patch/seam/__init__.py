"""The only code that knows how transformers calls things."""

from atp_patch.seam.hooks import Pruner, Seam
from atp_patch.seam.learning import LearningPass
from atp_patch.seam.locate import Parts, decoder_shape, locate
from atp_patch.seam.prefill import Prefill

__all__ = ["LearningPass", "Parts", "Prefill", "Pruner", "Seam", "decoder_shape", "locate"]
