"""SDE-DPM-Solver++(2M): second order with one call per step, and fresh noise in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.bounds import Count
from fewstep.diffusion.samplers.base import Here, Sampler

_NOTHING = 1e-12
"""Signal by noise that is pure noise, up to rounding: the cosine of a right angle in float64."""


@dataclass(frozen=True, kw_only=True)
class SDEDPMpp2M(Sampler):
    """SDE-DPM-Solver++(2M) (2211.01095, appendix), in `lambda = log(a/s)` with `h = lambda_s - lambda_t`:

        D   = x0 + (x0 - x0 of the step before) h / (2 h of the step before)
        x_s = (s_s / s_t) e^-h x_t + a_s (1 - e^-2h) D + s_s sqrt(1 - e^-2h) z

    The noise z of step i is named `sde/i`. From pure noise, where lambda is infinite, a step is of first order and renoises x0;
    the step to t = 0 gives x0. With `stride` it is CogVideoXDPMScheduler of diffusers: the sampler of CogVideoX 5B.
    """

    stride: Count | None = None
    """T, the number of levels in the model's table, if each step goes `T // steps` levels down from its own time, wherever the
    next one begins; all frames must then have one time. None: to the next time of the grid."""

    @property
    def deterministic(self) -> bool:
        return False

    @property
    def by_frame(self) -> bool:
        return self.stride is None

    def move(self, here: Here) -> Tensor:
        x0, path, x, end = here.prediction.x0, here.prediction.path, here.x.double(), self._end(here)
        if not bool((end > 0).any()):
            return x0
        now, there = path.at(here.prediction.t, x), path.at(end, x)
        lam, lam_next = (now.a / now.s).log(), (there.a / there.s).log()
        blend, h = x0.double(), lam_next - lam
        if here.before is not None:
            past = path.at(here.before.t, x)
            lam_past = (past.a / past.s).log()
            known = (past.a > _NOTHING * past.s) & (lam_past != lam)  # a frame that has not moved yet has no past
            share = torch.where(known, h / (2 * (lam - lam_past)), 0.0)
            blend = blend + share * (blend - here.before.x0.double())
        fresh = -torch.expm1(-2 * h)
        noise = here.rng.randn(x0.shape, f"sde/{here.call.step}").to(x)
        moved = (there.s / now.s) * torch.exp(-h) * x + there.a * fresh * blend + there.s * fresh.sqrt() * noise
        moved = moved.to(x0.dtype)
        return moved if self.stride is not None else here.finished(moved, clean=x0)

    def _end(self, here: Here) -> Tensor:
        """Time at which the step ends, `[B]` or `[B, F]`."""
        if self.stride is None:
            return here.at_s()
        if isinstance(here.t, tuple):
            raise ValueError("a sampler with a stride knows one time for all frames; leave stride out")
        level = round(here.t * self.stride) - self.stride // here.call.steps
        return torch.full_like(here.at_s(), max(level, 0) / self.stride)
