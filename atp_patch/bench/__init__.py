"""Time, memory and FLOPs of a pruned model against the plain one, side by side."""
