"""The only code that knows how transformers calls things."""

from atp_patch.seam.hooks import Pruner, Seam
from atp_patch.seam.locate import DecoderShape, Parts, locate
from atp_patch.seam.prefill import Prefill

__all__ = ["DecoderShape", "Parts", "Prefill", "Pruner", "Seam", "locate"]
