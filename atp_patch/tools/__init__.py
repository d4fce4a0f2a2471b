"""Tools for patched models and for the commands: calibration, adapters, caches, pictures, files."""
