"""The training of the third built-in model, whose decoder is SmolLM2-135M-Instruct."""
