"""Accuracy for each visual token: tasks, methods, one runner, statistics, tables and plots.

`python -m atp_patch.evaluate` is the command; DESIGN of the numbers: every method answers the same
questions, tokens are read from the trace of each pass, and intervals come from resampling the
images of those questions, the same for every method.
"""
