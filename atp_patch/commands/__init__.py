"""The console script and the demo."""
