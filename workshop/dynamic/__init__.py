"""The training of the second built-in model, which starts from the first."""
