"""Guidance whose scale changes from step to step, as in CogVideoX."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core import Call
from fewstep.core.bounds import Count, Positive
from fewstep.diffusion.guidance import CFG


@dataclass(frozen=True, kw_only=True)
class DynamicCFG(CFG):
    """Guidance of strength `1 + scale (1 - cos(pi u^power)) / 2` (CogVideoX, 2408.06072).

    github.com/THUDM/CogVideo: DynamicCFG in sat/sgm/modules/diffusionmodules/guiders.py; `use_dynamic_cfg` of diffusers'
    CogVideoXPipeline. `scale: 1` is off, as in diffusers.
    """

    power: Positive = 5.0
    counts: Literal["steps", "timesteps"] = "steps"
    """What u counts. steps: `step / steps`, so that guidance grows from 1 to nearly 1 + scale. timesteps: `(steps - timestep) /
    steps`, as CogVideoX's authors and diffusers compute it. Timesteps go up to 999, so |u| is much larger than 1 in most steps,
    and their scales jump between 1 and 1 + scale."""
    num_train_timesteps: Count = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.counts == "timesteps" and self.power != round(self.power):
            raise ValueError(
                f"power {self.power} of a negative number is none; with counts: timesteps give a whole power"
            )

    def scales(self, t: Tensor, call: Call) -> float | Tensor:
        if self.counts == "steps":
            return 1 + self.scale * (1 - math.cos(math.pi * (call.step / call.steps) ** self.power)) / 2
        timestep = (t.double() * self.num_train_timesteps).round() - 1
        u = (call.steps - timestep) / call.steps
        return (1 + self.scale * (1 - torch.cos(math.pi * u**self.power)) / 2).to(t.dtype)
