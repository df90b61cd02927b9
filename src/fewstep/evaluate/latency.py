"""Time and memory of one call."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.metrics.statistics import percentile


@dataclass(frozen=True)
class Latency:
    """Wall-clock seconds of repeated calls, without the warm-up."""

    runs: tuple[float, ...]

    @property
    def p50(self) -> float:
        return percentile(self.runs, 50)

    @property
    def p95(self) -> float:
        """95th percentile; with few runs (see `runs`) it is close to the slowest run."""
        return percentile(self.runs, 95)


def measure_latency(
    fn: Callable[[], Any], *, runs: int = 20, budget: float = 20.0, warmup: int = 1, device: torch.device | str = "cpu"
) -> Latency:
    """Time `fn` up to `runs` times. After 3 runs, stop when `budget` seconds are over. Waits for the device."""
    device = torch.device(device)
    for _ in range(warmup):
        fn()
    spent: list[float] = []
    while len(spent) < runs and (len(spent) < 3 or sum(spent) < budget):
        synchronize(device)
        start = time.perf_counter()
        fn()
        synchronize(device)
        spent.append(time.perf_counter() - start)
    return Latency(tuple(spent))


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(fn: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[int, str]:
    """Highest memory use while `fn` runs, in bytes, and what was measured.

    CUDA: the allocator's peak on the device. Linux: the peak resident set of the process, with weights and libraries. On other
    systems the peak cannot be reset, so it covers the whole life of the process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        return torch.cuda.max_memory_allocated(device), "CUDA allocator peak"
    if _reset_resident_peak():
        fn()
        return _resident_peak(), "resident set peak of the process"
    fn()
    return _peak_since_start(), "resident set peak of the process since its start"


def memory_in_use(device: torch.device | str = "cpu") -> int:
    """Bytes in use now: by tensors on a CUDA device, elsewhere by the process. On systems that do not tell, its peak."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_since_start()


def _peak_since_start() -> int:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
