"""Every token reads every token."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.attention.pattern import Grid3, Pattern


@dataclass(frozen=True)
class Dense(Pattern):
    """Bidirectional attention over all frames (and over all cached frames, if there are any)."""

    def mask(self, grid: Grid3, cached: int = 0) -> None:
        return None
