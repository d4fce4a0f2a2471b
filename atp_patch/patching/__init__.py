"""Patching a model: the functions that do it, the configuration, adapters and traces."""
