"""DDIM as diffusers makes it: every step goes down by the same number of levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.bounds import Count
from fewstep.diffusion.samplers.base import Here, Sampler


@dataclass(frozen=True, kw_only=True)
class FixedStride(Sampler):
    """Diffusers' DDIM (2010.02502): each step goes `T // steps` levels down from its timestep, wherever the next one begins.

    With evenly spaced timesteps it equals DDIM. With others (`linspace`; `trailing` if the number of steps does not divide T)
    the next call takes the latents for those of its own timestep, which they are not. All frames must have one time.
    """

    num_train_timesteps: Count = 1000
    """T: number of levels in the model's table."""
    ends_clean: bool = True
    """Whether a step below the table ends at t = 0; if not, at the table's first level (`set_alpha_to_one: false`)."""

    @property
    def by_frame(self) -> bool:
        return False

    def move(self, here: Here) -> Tensor:
        if isinstance(here.t, tuple):
            raise ValueError("FixedStride knows one time for all frames; take DDIM for a time per frame")
        total = self.num_train_timesteps
        level = round(here.t * total) - total // here.call.steps
        target = max(level, 0 if self.ends_clean else 1) / total
        return here.prediction.step_to(torch.full_like(here.at_s(), target)) if target else here.prediction.x0
