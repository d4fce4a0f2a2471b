"""Training as a command: it reads data in LLaVA's format, labels the answers alone, trains with
transformers' Trainer, and writes an adapter with a card.

Whoever writes a training loop needs nothing from here: the loss of a patched model already holds
the terms of ATP-LLaVA.
"""
