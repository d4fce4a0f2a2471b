"""The benchmark: time, memory and FLOPs of a pruned model beside those of the plain one."""
