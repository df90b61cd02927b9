"""One step of a student's renoising sampler as a Gaussian, for methods that ask which of its outcomes are better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from fewstep.core import Batch, Call, Rng
from fewstep.diffusion import NoisePath
from fewstep.diffusion.samplers import full
from fewstep.methods.base import Nets
from fewstep.methods.rewards import Reward
from fewstep.methods.rollouts import BackwardSimulation
from fewstep.methods.rollouts.grids import stops
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True)
class RandomStep:
    """From `x_t` at time t to `x_s ~ N(a_s x0, deviation^2 I)`, where x0 is the student's prediction.

    The sampler's own deviation is s_s. Its last step has none, and x0 is the clip; a temperature then stands for it.
    """

    x_t: Tensor
    t: Tensor
    """`[B]`; so is `s`."""
    s: Tensor
    signal: Tensor
    """a_s, shaped to multiply latents; 1 in the last step. `deviation` likewise."""
    deviation: Tensor
    call: Call
    """Which step of how many, and the noise that a student's own head may draw: the same for all who predict here."""

    @classmethod
    def at(
        cls, x_t: Tensor, grid: tuple[float, ...], index: int, path: NoisePath, temperature: float, rng: Rng
    ) -> RandomStep:
        """Step number `index` over the times `grid` (without the final 0), of a rollout with the randomness `rng`."""
        t, s = (full(u, x_t) for u in (*grid, 0.0)[index : index + 2])
        c, ends = path.at(s, x_t), index == len(grid) - 1
        signal, deviation = (torch.ones_like(c.a), torch.full_like(c.s, temperature)) if ends else (c.a, c.s)
        return cls(x_t, t, s, signal, deviation, Call(step=index, steps=len(grid), rng=rng))

    @property
    def ends(self) -> bool:
        """Whether it is the sampler's last step."""
        return self.call.step == self.call.steps - 1

    def x0(self, network: Predictor, batch: Batch) -> Tensor:
        """The clean latents that a network predicts here."""
        return network(self.x_t, self.t, batch.cond, self.call).x0

    def outcome(self, x0: Tensor, eps: Tensor) -> Tensor:
        """x_s, given a prediction and noise."""
        return self.signal * x0 + self.deviation * eps

    @torch.no_grad()
    def candidates(
        self, count: int, x0: Tensor, reward: Reward, nets: Nets, batch: Batch, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """So many outcomes `[K, B, C, F, H, W]` of a prediction, and their rewards `[K, B]`: those of the clips that the student
        predicts next, or of the outcomes themselves in the last step."""
        outcomes = [self.outcome(x0, rng.randn(x0.shape, f"candidate/{i}")) for i in range(count)]
        after = replace(self.call, step=self.call.step + 1)
        clips = outcomes if self.ends else (nets.student(x_s, self.s, batch.cond, after).x0 for x_s in outcomes)
        return torch.stack(outcomes), torch.stack([reward.of(clip, batch, nets) for clip in clips])


def predicted(rollout: BackwardSimulation, count: int) -> float:
    """Expected calls of the student for so many candidates: in a sampler's last step they are clips, which nobody predicts."""
    found = zip(rollout.grids, stops(rollout.grids, rollout.exit, rollout.span), strict=True)
    return count * fmean(fmean(stop < len(grid) - 1 for stop in each) for grid, each in found)


def require_random(rollout: BackwardSimulation) -> None:
    """Refuse (ValueError) a student whose steps are not random, or of which more than one would be trained at once."""
    if rollout.mode != "sde":
        raise ValueError(
            f"rollout.mode is {rollout.mode}: its steps have one outcome, and there is nothing to choose from; write sde, and "
            "train the student so"
        )
    if rollout.grad_calls != 1:
        raise ValueError(f"one step is trained at a time; write rollout.grad_calls: 1, not {rollout.grad_calls}")
