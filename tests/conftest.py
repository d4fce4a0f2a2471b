"""Settings of all tests."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models gain nothing from threads, and one thread sums in one order.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "slow: takes many seconds")
