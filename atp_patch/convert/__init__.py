"""Conversion of other packages' checkpoints to transformers' own: ``python -m atp_patch.convert``.

A checkpoint is read one tensor at a time and written in shards. Before anything is written, it is
checked that every tensor of the new model comes from exactly one of the old model, in the right
shape.
"""
