"""What the tests share: tiny models with real grids, inputs, and independent oracles."""
