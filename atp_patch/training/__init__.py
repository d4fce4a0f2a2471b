"""Training: data in LLaVA's format, labels on answers alone, transformers' Trainer, a card.

Nothing here is needed to train with a loop of one's own: a patched model's loss holds the terms of
ATP-LLaVA already.
"""
