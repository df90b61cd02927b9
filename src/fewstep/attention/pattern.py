"""What a query may read. A pattern is a frozen dataclass; its `mask` is the whole truth about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor


class Grid3(NamedTuple):
    """How many tokens a call has along each axis. Tokens are ordered frame by frame, row by row."""

    frames: int
    height: int
    width: int

    @property
    def per_frame(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.per_frame


class Pattern(ABC):
    """Which keys each query reads."""

    @abstractmethod
    def mask(self, grid: Grid3, cached: int = 0) -> Tensor | None:
        """`[N, M]` bool, True = may look; None = every query reads every key.

        Queries are the N tokens of `grid`. Keys are those of `cached` earlier frames of the same size, followed by the N.
        """

    def tree(self) -> dict[str, Any]:
        """Plain values from which `core.build` makes an equal pattern."""
        return {"type": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]
