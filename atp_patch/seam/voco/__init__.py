"""VoCo tokens: images that are compressed into the keys and values of a few learned tokens."""
