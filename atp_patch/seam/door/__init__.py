"""The decoder's door: what a forward pass brings, and which visual tokens enter."""
