"""The second built-in model, a Qwen3-VL for pictures of any size, with 2D rotary positions."""
