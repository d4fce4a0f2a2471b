"""Settings of all tests."""

from __future__ import annotations

import gc

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models gain nothing from threads, and one thread sums in one order.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "slow: takes many seconds")


def pytest_collection_finish() -> None:
    # What torch and transformers have loaded stays until the end: it is not searched again and
    # again for garbage among it.
    gc.collect()
    gc.freeze()
