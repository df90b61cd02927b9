"""How many clips are made at once: as many as fit into the memory of the device, which the first clip shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

SHARE = 0.9
"""Share of the free memory that is used: the allocator leaves holes."""


@dataclass(frozen=True)
class Memory:
    """Memory of a device whose use is known (a GPU's)."""

    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> Memory | None:
        """None where nobody counts what clips take."""
        return cls(device) if device.type == "cuda" else None

    def begin(self) -> int:
        """Count anew; bytes in use."""
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Most bytes in use since then."""
        return torch.cuda.max_memory_allocated(self.device)

    def free(self) -> int:
        """Bytes that nobody uses, those that torch keeps included."""
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + kept


def fitting(count: int, batch: int | None, most: int, memory: Memory | None) -> Iterator[tuple[int, int]]:
    """Spans `(first, last)` of clips to make at once: `batch` each; None: as many as fit, `most` at most.

    Whoever asks for the next span has made the clips of the one before. Where memory is not known, `most` fit.
    """
    size = batch or (most if memory is None else 1)
    first = 0
    while first < count:
        measured = memory if batch is None and first == 0 else None
        before = measured.begin() if measured is not None else 0
        yield first, min(first + size, count)
        first += size
        if measured is not None:
            each = max(1, measured.peak() - before)
            size = max(1, min(most, int(SHARE * measured.free()) // each))
