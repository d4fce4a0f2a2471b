"""Doors for other programs: what lets a benchmark harness or a server use patched models."""
