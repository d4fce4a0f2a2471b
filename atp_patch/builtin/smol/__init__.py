"""The third built-in model: a vision tower before SmolLM2-135M-Instruct, which learned language."""
