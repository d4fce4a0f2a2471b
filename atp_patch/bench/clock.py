"""Clocks and memory gauges of CPUs and GPUs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Times:
    """Times of the same work.

    Attributes:
        values_ms: milliseconds of each run.
    """

    values_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """The median of the runs."""
        return statistics.median(self.values_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The lower and the upper quartile of the runs."""
        if len(self.values_ms) < 2:
            return self.values_ms[0], self.values_ms[0]
        low, _, high = statistics.quantiles(self.values_ms, n=4, method="inclusive")
        return low, high

    def spread(self) -> dict[str, Any] | None:
        """Median, quartiles and all values as plain data; None where nothing was timed."""
        if not self.values_ms:
            return None
        low, high = self.quartiles_ms
        return {"median": self.median_ms, "q1": low, "q3": high, "values": self.values_ms}


def mark(device: torch.device) -> Any:
    """A point in the device's work: a recorded CUDA event, or seconds on the host's clock."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    return time.perf_counter()


def between_ms(start: Any, end: Any) -> float:
    """Milliseconds from one mark to a later one; on a GPU this waits for the later one."""
    if isinstance(end, float):
        return 1000 * (end - float(start))
    end.synchronize()
    return float(start.elapsed_time(end))


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the machine allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """The most memory in use since :func:`reset_peak`, weights included: what was allocated on a
    GPU, or resident on a Linux host. None where the machine does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _CLEAR.exists():
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return None
