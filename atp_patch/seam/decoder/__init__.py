"""A forward pass through the decoder whose visual tokens become fewer."""
