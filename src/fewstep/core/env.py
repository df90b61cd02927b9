"""The only reader of the process environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where this process stands among its peers, as `torchrun` announces it."""

    rank: int
    world_size: int
    local_rank: int = 0
    """Rank among the processes of this machine: the number of its device."""
    attempt: int = 0
    """Number of restarts of all processes."""


def place() -> Place:
    """ValueError names a variable that torchrun would not have set so."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}
    given = {name: os.environ.get(name, default) for name, default in defaults.items()}
    odd = [name for name, text in given.items() if not text.isdecimal()]
    if not odd and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        odd = ["RANK", "WORLD_SIZE"]
    if odd:
        said = " and ".join(f"{name}={given[name]!r}" for name in odd)
        raise ValueError(f"the environment has {said}, which torchrun would not set; unset it, or start with torchrun")
    return Place(*map(int, given.values()))


def cpu_count() -> int:
    """Cores this process may use (containers and affinity masks respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def allocator_is_set() -> bool:
    """Whether whoever started this process told glibc how to allocate."""
    return any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"))
