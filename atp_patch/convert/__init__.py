"""Checkpoints of other packages as transformers' own: ``python -m atp_patch.convert``.

A checkpoint is read one tensor at a time and written in shards. Before anything is written, every
tensor of the new model is known to come from exactly one of the old one, in the right shape.
"""
