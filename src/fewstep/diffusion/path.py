"""The noise path `x_t = a(t) x0 + s(t) eps`, with t = 0 data and t = 1 noise on every path.

A path is four functions of t. Everything else (noising, conversions, solver steps) is derived from them once,
here and in `prediction.py`. Coefficients are computed in float64 and cast to the latents' dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Coeffs(NamedTuple):
    """`a` (signal), `s` (noise) and their time derivatives `da`, `ds`."""

    a: Tensor
    s: Tensor
    da: Tensor
    ds: Tensor


class NoisePath(ABC):
    """How data turns into noise. Subclasses are frozen dataclasses: two equal paths compare equal."""

    @abstractmethod
    def coeffs(self, t: Tensor) -> Coeffs:
        """`a, s, da/dt, ds/dt` for float64 `t` of any shape."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t at which `log(a^2 / s^2)` equals `log_snr` (float64); 0 or 1 where the path ends before it."""

    def at(self, t: Tensor, like: Tensor) -> Coeffs:
        """Coefficients in the dtype of `like` `[B, C, F, ...]`, shaped to multiply it; `t` is `[B]` or `[B, F]`."""
        return Coeffs(*(broadcast(c, like).to(like.dtype) for c in self.coeffs(t.double())))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`x_t = a x0 + s eps`; shapes as in `at`."""
        c = self.at(t, x0)
        return c.a * x0 + c.s * eps

    def between(self, s: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`a`, `b` from time s to a later t, `x_t = a x_s + b eps`: `a_t / a_s` and `sqrt(s_t^2 - a^2 s_s^2)`; shapes as in `at`.

        From s = 0 they are those of `add_noise`.
        """
        first, last = self.coeffs(s.double()), self.coeffs(t.double())
        a = last.a / first.a
        b = (last.s.square() - a.square() * first.s.square()).clamp_min(0).sqrt()
        return broadcast(a, like).to(like.dtype), broadcast(b, like).to(like.dtype)

    def prior(self, eps: Tensor, t: float = 1.0) -> Tensor:
        """Where sampling starts, `x_t = s(t) eps`: at t = 1 the noise itself unless the path explodes (EDM)."""
        return self.at(torch.full((len(eps),), t, dtype=torch.float64, device=eps.device), eps).s * eps

    def log_snr(self, t: Tensor) -> Tensor:
        c = self.coeffs(t.double())
        return 2 * (c.a.log() - c.s.log())


def broadcast(t: Tensor, like: Tensor) -> Tensor:
    """`[B]` to `[B, 1, 1, ...]`, `[B, F]` to `[B, 1, F, 1, ...]`, so that it multiplies `[B, C, F, ...]`."""
    if t.ndim == 0:
        return t
    if t.ndim == 1:
        return t.reshape(-1, *[1] * (like.ndim - 1))
    if t.ndim == 2 and like.ndim >= 3:
        return t.reshape(t.shape[0], 1, t.shape[1], *[1] * (like.ndim - 3))
    raise ValueError(f"time must be [B] or [B, F], got shape {tuple(t.shape)} for latents {tuple(like.shape)}")
