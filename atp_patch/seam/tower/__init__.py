"""Hooks on the vision tower, for methods that prune before the decoder."""
