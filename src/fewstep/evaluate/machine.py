"""The machine that a figure was measured on."""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from fewstep.core.env import cpu_count


@dataclass(frozen=True)
class Machine:
    """The hardware a measurement ran on."""

    cpu: str
    cores: int
    """CPU cores that this process may use."""
    threads: int
    """Threads that torch uses."""
    memory_gb: float | None
    accelerator: str | None
    """Name of the GPU; None on the CPU."""
    system: str


def describe_machine(device: torch.device | str = "cpu") -> Machine:
    """Describe this machine; `device` is the device on which the models ran."""
    device = torch.device(device)
    if device.type == "cpu":
        accelerator = None
    else:
        accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Machine(
        cpu=_cpu_name(),
        cores=cpu_count(),
        threads=torch.get_num_threads(),
        memory_gb=_memory_gb(),
        accelerator=accelerator,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def versions() -> dict[str, str]:
    """Versions of the packages that decide a figure. A package that runs from a checkout, not installed, says so."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in ("fewstep", "numpy", "safetensors", "pillow", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def speed(dtype: torch.dtype, size: int = 384) -> float:
    """Operations per CPU-second of one core in a matrix product: the best of five runs."""
    a, threads, seconds = torch.ones(size, size, dtype=dtype), torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            began = time.process_time()
            a @ a
            seconds.append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / min(seconds)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    kib = next(int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("MemTotal"))
    return round(kib / 2**20, 1)
