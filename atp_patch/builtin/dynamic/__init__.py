"""The second built-in model: pictures of any size, places in rotary positions (Qwen3-VL)."""
