"""How transformers is read: its modules, calls, caches, masks and attention functions."""
