"""The training of the built-in models and of their adapters; it is not installed.

Run from the root of the repository:

    python -m workshop.train --work FOLDER           # the first model, from scratch
    python -m workshop.export CHECKPOINT             # writes atp_patch/builtin/weights
    python -m workshop.dynamic.train --work FOLDER   # the second model, from the first
    python -m workshop.dynamic.export CHECKPOINT
    python -m workshop.smol.train_tower --work FOLDER --base BASE   # the third model; see README.md
    python -m workshop.score --split test --questions 500
    python -m workshop.train_compressed --method voco --out FOLDER
"""
