"""Every token reads every token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.attention.pattern import Operation, Pattern, Site


@dataclass(frozen=True)
class Dense(Pattern):
    """Bidirectional attention over all frames (and over all remembered frames, if there are any)."""

    def operation(self, layer: int, heads: int, width: int) -> Operation:
        return _Everything()


class _Everything(Operation):
    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> None:
        return None
