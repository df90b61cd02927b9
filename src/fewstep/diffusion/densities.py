"""Densities of time for training, drawn per sample or per frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.bounds import Fraction, Positive
from fewstep.core.rng import Rng
from fewstep.diffusion.times import shifted


class TimeDensity(ABC):
    """A distribution over t in (0, 1), drawn per sample."""

    @abstractmethod
    def at_quantile(self, u: Tensor) -> Tensor:
        """The time at quantile `u` in (0, 1), float64 in, float64 out."""

    def sample(self, batch: int, rng: Rng, name: str = "time", *, frames: int | None = None) -> Tensor:
        """`[batch]` float32 times, or `[batch, frames]`: one for each frame. They are stratified: each falls in a slice of
        its own, of as many equal slices as there are times.

        Strata cut the variance of the loss at no cost and leave the marginal density of each time unchanged, because the
        slices are dealt in random order.
        """
        shape = (batch,) if frames is None else (batch, frames)
        count = batch * (frames or 1)
        order = torch.randperm(count, generator=rng.local(f"{name}/order")).to(rng.device).reshape(shape)
        u = (order.double() + rng.rand(shape, name).double()) / count
        return self.at_quantile(u.clamp(1e-6, 1 - 1e-6)).float()


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeDensity):
    """Uniform on [low, high], then shifted."""

    low: Fraction = 0.0
    high: Fraction = 1.0
    shift: Positive = 1.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got low={self.low}, high={self.high}")

    def at_quantile(self, u: Tensor) -> Tensor:
        return shifted(self.low + (self.high - self.low) * u, self.shift)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeDensity):
    """`sigmoid(N(mean, std))` (2403.03206), then shifted."""

    mean: float = 0.0
    std: Positive = 1.0
    shift: Positive = 1.0

    def at_quantile(self, u: Tensor) -> Tensor:
        return shifted(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)), self.shift)


@dataclass(frozen=True, kw_only=True)
class Grid(TimeDensity):
    """One of the listed times, each with the same probability."""

    times: tuple[Fraction, ...]

    def __post_init__(self) -> None:
        if not self.times:
            raise ValueError("times is empty; give at least one")

    def at_quantile(self, u: Tensor) -> Tensor:
        table = torch.tensor(self.times, dtype=torch.float64, device=u.device)
        return table[(u * len(self.times)).long().clamp_max(len(self.times) - 1)]


DENSITIES = (Uniform, LogitNormal, Grid)
