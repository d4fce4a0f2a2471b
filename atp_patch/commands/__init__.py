"""The console script ``atp-patch`` and the demo."""
