"""The only reader of the process environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where this process stands among its peers, as `torchrun` announces it."""

    rank: int
    world_size: int


def place() -> Place:
    return Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def cpu_count() -> int:
    """Cores this process may use (containers and affinity masks respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
