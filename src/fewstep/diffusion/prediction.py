"""A network's prediction, converted to the form that a formula needs.

Every parameterisation is one row of the same 2x2 system. With `x_t = a x0 + s eps`, a network of kind k outputs
`raw = p x0 + q eps`; x0 and eps follow by inverting [[a, s], [p, q]]. No other file converts anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.types import KV
from fewstep.diffusion.path import Coeffs, NoisePath

Kind = Literal["x0", "eps", "v", "flow"]
KINDS: tuple[Kind, ...] = ("x0", "eps", "v", "flow")


def row(kind: Kind, c: Coeffs) -> tuple[Tensor | float, Tensor | float]:
    """`(p, q)` with `raw = p x0 + q eps`: x0 -> (1, 0), eps -> (0, 1), v -> (-s, a), flow dx/dt -> (da, ds)."""
    match kind:
        case "x0":
            return 1.0, 0.0
        case "eps":
            return 0.0, 1.0
        case "v":
            return -c.s, c.a
        case "flow":
            return c.da, c.ds
    raise ValueError(f"prediction kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")


def determinant(kind: Kind, c: Coeffs) -> Tensor | float:
    """`a q - s p`, which x0 and eps are divided by: 0 where a prediction says nothing that `x_t` does not."""
    p, q = row(kind, c)
    return c.a * q - c.s * p


@dataclass(frozen=True)
class Prediction:
    """What every Denoiser returns. `x0`, `eps`, `flow` and `score` are views, computed on demand.

    `raw`, `x_t`: `[B, C, F, H, W]`; `t`: `[B]` or `[B, F]`. `kv` holds the keys and values of this call's tokens, one
    entry per layer, for the caller to commit to a cache; it is None unless a cache view was given.
    """

    raw: Tensor
    kind: Kind
    x_t: Tensor
    t: Tensor
    path: NoisePath
    kv: tuple[KV, ...] | None = None

    @cached_property
    def coeffs(self) -> Coeffs:
        return self.path.at(self.t, self.raw)

    @property
    def x0(self) -> Tensor:
        """The clean latents this prediction stands for. Undefined (infinite) where `x_t` carries no signal for it."""
        c = self.coeffs
        _, q = row(self.kind, c)
        return (q * self.x_t - c.s * self.raw) / determinant(self.kind, c)

    @property
    def eps(self) -> Tensor:
        c = self.coeffs
        p, _ = row(self.kind, c)
        return (c.a * self.raw - p * self.x_t) / determinant(self.kind, c)

    @property
    def flow(self) -> Tensor:
        """`dx/dt` of the probability-flow ODE, `da x0 + ds eps` (for rectified flow: `eps - x0`)."""
        return self.as_kind("flow")

    @property
    def score(self) -> Tensor:
        """`grad log p_t(x_t) = -eps / s`."""
        return -self.eps / self.coeffs.s

    def as_kind(self, kind: Kind) -> Tensor:
        """The same prediction expressed as `kind`."""
        if kind == self.kind:
            return self.raw
        p, q = row(kind, self.coeffs)
        return p * self.x0 + q * self.eps

    def step_to(self, s: Tensor) -> Tensor:
        """First-order ODE step from `t` to `s`: `a_s x0 + s_s eps` (DDIM; Euler on rectified flow)."""
        c = self.path.at(s, self.raw)
        return c.a * self.x0 + c.s * self.eps

    def with_raw(self, raw: Tensor) -> Prediction:
        """A prediction at the same point with another network output (guidance combines outputs this way)."""
        return replace(self, raw=raw)


@dataclass(frozen=True)
class Tangent:
    """How a prediction changes as its point moves: at `(x_t + e dx, t + e dt)`, the derivative in e at e = 0.

    `raw` is the derivative of the network's output; the other views are those of `Prediction`, differentiated with the
    path's coefficients. Nothing here carries gradient.
    """

    raw: Tensor
    dx: Tensor
    dt: Tensor
    at: Prediction

    @property
    def x0(self) -> Tensor:
        return self.of(lambda moved: moved.x0)

    @property
    def eps(self) -> Tensor:
        return self.of(lambda moved: moved.eps)

    @property
    def flow(self) -> Tensor:
        return self.of(lambda moved: moved.flow)

    @torch.no_grad()
    def of(self, view: Callable[[Prediction], Tensor]) -> Tensor:
        """The derivative of anything that a prediction says: `tangent.of(lambda moved: moved.score)`."""

        def moved(raw: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            return view(Prediction(raw, self.at.kind, x_t, t, self.at.path))

        slope: Tensor = torch.func.jvp(moved, (self.at.raw, self.at.x_t, self.at.t), (self.raw, self.dx, self.dt))[1]
        return slope


def target(kind: Kind, x0: Tensor, eps: Tensor, t: Tensor, path: NoisePath) -> Tensor:
    """What a network of `kind` should output for `x_t = a x0 + s eps`: `p x0 + q eps`."""
    p, q = row(kind, path.at(t, x0))
    return p * x0 + q * eps


def from_x0(x0: Tensor, x_t: Tensor, t: Tensor, path: NoisePath) -> Prediction:
    """Wrap a known x0 as a Prediction."""
    return Prediction(raw=x0, kind="x0", x_t=x_t, t=t, path=path)
