"""Whole timesteps: what diffusers' multistep schedulers tell a network of a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.core import Call, Noise
from fewstep.core.bounds import Count
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.samplers.base import Denoise, Here, Sampler, Step, Times
from fewstep.diffusion.samplers.euler import Euler


@dataclass(frozen=True, kw_only=True)
class WholeTimesteps(Sampler):
    """Tells the network each time rounded down to a whole timestep `k / num_train_timesteps`, and moves by the exact time.

    Diffusers' multistep schedulers keep flow timesteps as integers, but noise levels exactly. So the network's output is
    based on the exact time again: `sampler` gets a Prediction whose `t`, and so x0 and eps, are those of the time asked for.
    Guidance intervals and experts see what the network is told, as in diffusers' pipelines.
    """

    sampler: Sampler = Euler()
    """Sampler that moves the latents."""
    num_train_timesteps: Count = 1000

    @property
    def deterministic(self) -> bool:
        return self.sampler.deterministic

    @property
    def one_time(self) -> bool:
        return self.sampler.one_time

    @property
    def by_frame(self) -> bool:
        return self.sampler.by_frame

    def calls(self, steps: int) -> int:
        return self.sampler.calls(steps)

    def move(self, here: Here) -> Tensor:
        return self.sampler.move(here)

    def sampling(self, denoise: Denoise, x: Tensor, times: Times, *, rng: Noise) -> Iterator[Step]:
        every = {t for time in times for t in (time if isinstance(time, tuple) else (time,))}
        visited = torch.tensor(sorted(every), dtype=torch.float64, device=x.device)
        whole = (visited * self.num_train_timesteps).floor() / self.num_train_timesteps

        def told(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            nearest = (t.double()[..., None] - visited).abs().argmin(-1)  # float32 may be just below a whole timestep
            return replace(denoise(x_t, whole[nearest].to(t.dtype), call), t=t)

        yield from self.sampler.sampling(told, x, times, rng=rng)
