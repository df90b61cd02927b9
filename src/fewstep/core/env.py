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
    """Among the processes of this machine: the number of its device."""


def place() -> Place:
    rank, world_size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    return Place(rank, world_size, local_rank)


def cpu_count() -> int:
    """Cores this process may use (containers and affinity masks respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
