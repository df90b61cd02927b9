"""Samplers, one function each: `(denoise, x, times, ...) -> x0`.

`denoise(x_t, t, call)` returns a Prediction; `call` says which step of how many it is. `x` is noise
`[B, C, F, H, W]` at `times[0]`; `times` decrease to 0. The cost is
one call per step unless stated. `watch(i, prediction)` sees every call and returns nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fewstep.core import Call, Noise
from fewstep.diffusion.prediction import Prediction

Denoise = Callable[[Tensor, Tensor, Call], Prediction]
Watch = Callable[[int, Prediction], None]
Solver = Literal["euler", "heun", "ddim", "dpmpp_2m", "renoise"]


def full(t: float, like: Tensor) -> Tensor:
    """The time `t` for every sample of `like`: `[B]` float32 (float64 for float64 latents)."""
    return torch.full((len(like),), t, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _call(step: int, times: tuple[float, ...]) -> Call:
    return Call(step=step, steps=len(times) - 1)


def ddim(denoise: Denoise, x: Tensor, times: tuple[float, ...], *, watch: Watch | None = None) -> Tensor:
    """First-order step `a_s x0 + s_s eps` (DDIM, 2010.02502). Order 1; exact when x0 and eps are constant."""
    for i, (t, s) in enumerate(pairwise(times)):
        prediction = denoise(x, full(t, x), _call(i, times))
        if watch is not None:
            watch(i, prediction)
        x = prediction.step_to(full(s, x)) if s > 0 else prediction.x0
    return x


def euler(denoise: Denoise, x: Tensor, times: tuple[float, ...], *, watch: Watch | None = None) -> Tensor:
    """Euler on `dx/dt`. On rectified flow identical to DDIM; order 1 on every path."""
    for i, (t, s) in enumerate(pairwise(times)):
        prediction = denoise(x, full(t, x), _call(i, times))
        if watch is not None:
            watch(i, prediction)
        x = x + (s - t) * prediction.flow
    return x


def heun(denoise: Denoise, x: Tensor, times: tuple[float, ...], *, watch: Watch | None = None) -> Tensor:
    """Trapezoidal corrector on `dx/dt` (2206.00364, algorithm 1). Order 2; two calls per step, one in the last."""
    for i, (t, s) in enumerate(pairwise(times)):
        prediction = denoise(x, full(t, x), _call(i, times))
        if watch is not None:
            watch(i, prediction)
        ahead = x + (s - t) * prediction.flow
        if s > 0:
            slope = (prediction.flow + denoise(ahead, full(s, x), _call(i, times)).flow) / 2
            ahead = x + (s - t) * slope
        x = ahead
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, times: tuple[float, ...], *, watch: Watch | None = None) -> Tensor:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): order 2 with one call per step, in `lambda = log(a/s)`.

    The first step is of first order, and so is the last, where lambda is infinite: from pure noise to data, on a grid
    uniform in t, the order is therefore between 1.5 and 2.
    """
    previous: tuple[Tensor, Tensor] | None = None  # (x0, lambda) of the step before
    for i, (t, s) in enumerate(pairwise(times)):
        prediction = denoise(x, full(t, x), _call(i, times))
        if watch is not None:
            watch(i, prediction)
        x0 = prediction.x0
        if s == 0:
            return x0
        here, there = (prediction.path.at(full(u, x), x.double()) for u in (t, s))
        lam, lam_next = (here.a / here.s).log(), (there.a / there.s).log()
        blend = x0
        if previous is not None and bool(previous[1].isfinite().all()):
            ratio = (lam - previous[1]) / (lam_next - lam)
            blend = x0 + ((x0 - previous[0]) / (2 * ratio)).to(x0.dtype)
        x = ((there.s / here.s) * x - there.a * torch.expm1(-(lam_next - lam)) * blend).to(x0.dtype)
        previous = (x0, lam)
    return x


def renoise(denoise: Denoise, x: Tensor, times: tuple[float, ...], *, rng: Noise, watch: Watch | None = None) -> Tensor:
    """Predict x0, add fresh noise of the next time, repeat (LCM, DMD2). The noise of step i is `rng`'s `renoise/i`."""
    for i, (t, s) in enumerate(pairwise(times)):
        prediction = denoise(x, full(t, x), _call(i, times))
        if watch is not None:
            watch(i, prediction)
        x = prediction.x0
        if s > 0:
            x = prediction.path.add_noise(x, rng.randn(x.shape, f"renoise/{i}"), full(s, x))
    return x


def solve(
    solver: Solver, denoise: Denoise, x: Tensor, times: tuple[float, ...], *, rng: Noise, watch: Watch | None = None
) -> Tensor:
    """Run the named solver; only `renoise` uses `rng`."""
    match solver:
        case "ddim":
            return ddim(denoise, x, times, watch=watch)
        case "euler":
            return euler(denoise, x, times, watch=watch)
        case "heun":
            return heun(denoise, x, times, watch=watch)
        case "dpmpp_2m":
            return dpmpp_2m(denoise, x, times, watch=watch)
        case "renoise":
            return renoise(denoise, x, times, rng=rng, watch=watch)
    raise ValueError(f"solver {solver!r} is unknown; choose euler, heun, ddim, dpmpp_2m or renoise")


def calls(solver: Solver, steps: int) -> int:
    """Network evaluations of one sample without guidance."""
    return 2 * steps - 1 if solver == "heun" else steps
