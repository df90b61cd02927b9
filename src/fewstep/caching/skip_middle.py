"""Run the middle blocks only every few steps; the steps between add the stored change again.

Block caching (Wimbauer et al., 2312.03209) in its plainest form: a fixed schedule, and one residual for all middle blocks.

    1  at a full step      r = x after the middle blocks - x before them
    2  at any other step   x after = x before + r

Not from the paper: one stretch of blocks with one residual, as wide as every stream of the network, and no tuned
scale-and-shift.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from fewstep.caching.base import CachePolicy
from fewstep.core.bounds import Count, Natural
from fewstep.core.call import Flow, Place, Runner

S = TypeVar("S", bound=Flow)


@dataclass(frozen=True, kw_only=True)
class SkipMiddle(CachePolicy):
    """Run the middle blocks at every `every`-th step only."""

    every: Count = 2
    """Steps between two full steps; the first step of a clip is full. 1: every step is full."""
    first: Natural = 1
    """Number of first blocks that always run."""
    last: Natural = 1
    """Number of last blocks that always run."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.first < 0 or self.last < 0:
            raise ValueError(
                f"every must be at least 1, first and last at least 0; got every={self.every}, first={self.first}, "
                f"last={self.last}"
            )

    @property
    def exact(self) -> bool:
        return self.every == 1

    def middle(self, layers: int) -> range:
        """The blocks that may be skipped."""
        return range(self.first, max(self.first, layers - self.last))

    def runs(self, step: int, steps: int, layers: int) -> tuple[int, ...]:
        skipped = self.middle(layers) if step % self.every else ()
        return tuple(layer for layer in range(layers) if layer not in skipped)

    def begin(self) -> Runner:
        return _Replay(self)


@dataclass(eq=False)
class _Replay:
    """One run of sampling. What is remembered is replaced when the last middle block has been run, not before."""

    policy: SkipMiddle
    before: tuple[Tensor, ...] = ()
    """Streams before the middle blocks in the full step that is running."""
    added: dict[Hashable, tuple[Tensor, ...]] = field(default_factory=dict)
    """What the middle blocks added at the last full step, by branch and route."""

    def __call__(self, block: Callable[[S], S], state: S, place: Place) -> S:
        middle, of = self.policy.middle(place.layers), (place.call.branch, state.route)
        if place.layer not in middle:
            return block(state)
        if place.call.step % self.policy.every and of in self.added:
            if place.layer > middle.start:
                return state
            return state.with_streams([x + r for x, r in zip(state.streams, self.added[of], strict=True)])
        if place.layer == middle.start:
            self.before = state.streams
        after = block(state)
        if place.layer == middle.stop - 1:
            self.added[of] = tuple(self._residual(x, y) for x, y in zip(self.before, after.streams, strict=True))
        return after

    @staticmethod
    def _residual(before: Tensor, after: Tensor) -> Tensor:
        if before.shape != after.shape:
            raise ValueError(
                f"SkipMiddle needs blocks that keep the shape of what flows; this network's change {tuple(before.shape)} to "
                f"{tuple(after.shape)}; choose another policy, or none"
            )
        return (after - before).detach()
