"""Rewards: clips that are better by some measure count more in distribution matching (Re-DMD of Reward Forcing, 2512.04678).

The student that maximises E[r] - beta KL(student | teacher) follows the gradient of distribution matching with each clip weighted
by exp(r / beta). The weights have mean 1 in a batch, so they say which clips count and not how much all of them do, and r has no
gradient: it need not be differentiable. With r the same for all clips it is distribution matching, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.bounds import Bounds, Positive, require_bounds
from fewstep.methods.rollouts import Rolled
from fewstep.metrics import motion


@dataclass(frozen=True, kw_only=True)
class Reward(ABC):
    """How good a clip is, from its frames, and how much that counts. A frozen dataclass."""

    beta: Positive = 1.0
    """Temperature, in units of the reward: a clip that is better by beta counts e times as much."""
    limit: float = 4.0
    """Largest weight; the smallest is 1 / limit. Large weights invite clips that please the reward and nobody else."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if wrong := Bounds(above=1).problem(self.limit):
            raise ValueError(f"limit {wrong}; at 1 the reward does not count")

    @abstractmethod
    def score(self, frames: Tensor) -> Tensor:
        """r of clips `[B, 3, F, H, W]` in [-1, 1]: `[B]`."""

    def weights(self, score: Tensor) -> Tensor:
        """`exp(r / beta)` over its mean in the batch, then limited: `[B]`. ValueError for a single clip, whose weight is always
        1."""
        if len(score) < 2:
            raise ValueError(
                "a reward compares the clips of a batch, and this one has a single clip; raise settings.batch"
            )
        raw = ((score - score.max()) / self.beta).exp()  # the largest is 1: no overflow, the same mean
        return (raw / raw.mean()).clamp(1 / self.limit, self.limit)

    @torch.no_grad()
    def keep(self, codec: Any, rolled: Rolled) -> Tensor:
        """How much each clip counts, `[B, 1]`, or each of its frames, `[B, F]` (`Rolled.keep`). `codec` decodes latents."""
        frames = codec.decode(rolled.clip.float()).clamp(-1, 1)
        weights = self.weights(self.score(frames)).to(rolled.clip)[:, None]
        return weights if rolled.keep is None else weights * rolled.keep


@dataclass(frozen=True, kw_only=True)
class MotionReward(Reward):
    """The motion of a clip, `metrics.motion`: mean absolute difference of neighbouring frames.

    Not as published: the paper asks a vision-language model how good the motion is. This measure takes flicker and noise for
    motion, so hold out another one (`metrics.flicker`, `metrics.flow`) and look at the clips. beta is ours: motion of the
    built-in world is about 0.05.
    """

    beta: Positive = 0.02

    def score(self, frames: Tensor) -> Tensor:
        return motion(frames)


REWARDS: tuple[type[Reward], ...] = (MotionReward,)
