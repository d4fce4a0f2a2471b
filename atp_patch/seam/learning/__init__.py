"""Forward passes in which thresholds learn: pruned keys are weighed, not gathered."""
