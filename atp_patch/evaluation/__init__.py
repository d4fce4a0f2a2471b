"""Accuracy against visual tokens: tasks, one runner for all methods, statistics, tables and plots.

The command is ``python -m atp_patch.evaluate``. Every method answers the same questions, visual
tokens are counted by the trace of each forward pass, and intervals come from resampling the images
of the questions, with the same draws for every method.
"""
