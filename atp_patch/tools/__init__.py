"""What stands on a patched model: calibration, trained adapters, visual caches, pictures."""
