"""The noise paths: rectified flow, trigonometric, variance preserving, exploding, and tables of betas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import mul
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.bounds import Count, Positive
from fewstep.diffusion.path import Coeffs, NoisePath


@dataclass(frozen=True)
class RectifiedFlow(NoisePath):
    """`a = 1 - t`, `s = t` (2209.03003): straight lines, velocity `eps - x0`."""

    def coeffs(self, t: Tensor) -> Coeffs:
        one = torch.ones_like(t)
        return Coeffs(1 - t, t, -one, one)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.double() / 2)


@dataclass(frozen=True)
class Trig(NoisePath):
    """`a = cos(pi t / 2)`, `s = sin(pi t / 2)` (TrigFlow, 2410.11081), angle rescaled to t in [0, 1]."""

    def coeffs(self, t: Tensor) -> Coeffs:
        half = math.pi / 2
        return Coeffs((half * t).cos(), (half * t).sin(), -half * (half * t).sin(), half * (half * t).cos())

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan((-log_snr.double() / 2).exp()) * (2 / math.pi)


@dataclass(frozen=True, kw_only=True)
class VP(NoisePath):
    """Variance preserving, `a^2 + s^2 = 1`, log-SNR linear in t between `high` and `low`.

    The public DDPM beta tables are `Betas`.
    """

    high: float = 10.0
    """log-SNR at t = 0."""
    low: float = -10.0
    """log-SNR at t = 1."""

    def __post_init__(self) -> None:
        if self.high <= self.low:
            raise ValueError(f"VP needs high > low log-SNR, got high={self.high}, low={self.low}")

    def coeffs(self, t: Tensor) -> Coeffs:
        log_snr = self.high + (self.low - self.high) * t
        a2, s2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        a, s, slope = a2.sqrt(), s2.sqrt(), self.low - self.high
        return Coeffs(a, s, 0.5 * a * s2 * slope, -0.5 * s * a2 * slope)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((log_snr.double() - self.high) / (self.low - self.high)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class EDM(NoisePath):
    """Variance exploding (2206.00364): `a = 1`, `s = sigma(t)` on the rho-curve from `sigma_min` to `sigma_max`."""

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0

    def coeffs(self, t: Tensor) -> Coeffs:
        lo, hi = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        root = lo + t * (hi - lo)
        return Coeffs(
            torch.ones_like(t), root**self.rho, torch.zeros_like(t), self.rho * root ** (self.rho - 1) * (hi - lo)
        )

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        lo, hi = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (((-log_snr.double() / 2).exp() ** (1 / self.rho) - lo) / (hi - lo)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Betas(NoisePath):
    """A DDPM (2006.11239) table of `num_train_timesteps` noise levels: timestep k is `t = (k + 1) / num_train_timesteps`.

    At t = 0 data are exactly clean. Between two points of the table the angle `atan(s / a)` is linear in t.
    """

    num_train_timesteps: Count = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    """Quantity that is linear in time: beta itself (`linear`, AnimateDiff) or its square root (`scaled_linear`, Stable
    Diffusion, CogVideoX)."""
    snr_shift: float = 1.0
    """Divisor of the whole table's signal-to-noise ratio (`snr_shift_scale` in CogVideoX)."""
    zero_snr: bool = False
    """Rescale the table so that t = 1 is pure noise (2305.08891, algorithm 1). Otherwise a little signal remains at t = 1."""

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 2 or not 0 < self.beta_start <= self.beta_end < 1 or self.snr_shift <= 0:
            raise ValueError(
                "Betas needs at least 2 timesteps, 0 < beta_start <= beta_end < 1 and snr_shift > 0, "
                f"got {self.num_train_timesteps}, {self.beta_start}, {self.beta_end}, {self.snr_shift}"
            )

    def coeffs(self, t: Tensor) -> Coeffs:
        angles, place = self._angles(t), t * self.num_train_timesteps
        below = place.detach().floor().long().clamp(0, self.num_train_timesteps - 1)
        slope = angles[below + 1] - angles[below]
        angle = angles[below] + (place - below) * slope
        a, s, speed = angle.cos(), angle.sin(), slope * self.num_train_timesteps
        return Coeffs(a, s, -s * speed, a * speed)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        angles = self._angles(log_snr)
        angle = torch.atan((-log_snr.double() / 2).exp())
        above = torch.searchsorted(angles, angle).clamp(1, self.num_train_timesteps)
        share = (angle - angles[above - 1]) / (angles[above] - angles[above - 1])
        return ((above - 1 + share) / self.num_train_timesteps).clamp(0, 1)

    def prior(self, eps: Tensor, t: float = 1.0) -> Tensor:
        """The noise itself at any `t`, as these models are sampled, though the table may end with a little signal left."""
        return eps

    def _angles(self, like: Tensor) -> Tensor:
        return torch.tensor(_table(self), dtype=torch.float64, device=like.device)


@cache
def _table(path: Betas) -> tuple[float, ...]:
    """`atan(s / a)` at t = 0, 1/T, ..., 1."""
    last, power = path.num_train_timesteps - 1, 1 if path.schedule == "linear" else 2
    low, high = path.beta_start ** (1 / power), path.beta_end ** (1 / power)
    betas = [(low + (high - low) * k / last) ** power for k in range(last + 1)]
    signal = [a2 / (path.snr_shift + (1 - path.snr_shift) * a2) for a2 in accumulate((1 - b for b in betas), mul)]
    roots = [math.sqrt(a2) for a2 in signal]
    if path.zero_snr:
        roots = [(a - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for a in roots]
    return (0.0, *(math.acos(a) for a in roots))


PATHS = (RectifiedFlow, Trig, VP, EDM, Betas)
