"""Patching a model: its configuration, adapters and traces, and the one line that joins them."""
