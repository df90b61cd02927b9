"""One network is teacher, critic and student: a second branch of it learns the student's clips, and moves them away from itself.

Cheng et al., TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows, 2512.05150.

    F(x_t, t, r) is the mean velocity from t to r: x_r = x_t - (t - r) F.  F' is the twin branch.  [.] carries no gradient.
    1  x_t = noised clip;  F(x_t, t, t) -> eps - x0 + guidance * [F(x_t, t, t, c) - F(x_t, t, t, none)]
    2  t > r, half of them 1 and 0;  x_r = two steps of d along [F] from x_t, then [F] to r;  F(x_t, t, r) -> (x_t - x_r)/(t - r)
    3  y = z - F(z, 1, 0) from new noise z;  y_t = noised y;  F'(y_t, t, t) -> eps - y                       (no gradient in y)
    4  y as in line 3, y_s = noised y;  D = [clip(F'(y_s, s, s) - F(y_s, s, s))];  F(z, 1, 0) -> [F(z, 1, 0) - D]

In line 4 the clip y moves by v_fake - v_real = (x0_real - x0_fake) / s: distribution matching, without networks besides F. `->`
is the distance |a - b|^2 / sqrt([|a - b|^2] + c^2) of a sample's mean square.

Not from the paper: scalar inputs (`twin`; r is `until`), where it negates the time for F'; every line reads the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.compress import ScalarInput, Transform
from fewstep.core import Batch, Cond, Losses, Rng
from fewstep.core.bounds import Amount, Count, Fraction, Part, Positive, require_bounds
from fewstep.diffusion import Contract, RectifiedFlow, Renoise, uniform_grid
from fewstep.diffusion.path import broadcast
from fewstep.methods.base import Method, Nets, Update
from fewstep.methods.flow_matching import drop
from fewstep.methods.rollouts import student_contract
from fewstep.methods.work import Work

LEAST = 0.02  # smallest time of lines 3 and 4


@dataclass(frozen=True, kw_only=True)
class TwinFlow(Method):
    """TwinFlow: distribution matching within one network."""

    cite: ClassVar[str] = (
        "Cheng et al., TwinFlow: Realizing One-step Generation with Self-adversarial Flows, 2512.05150"
    )
    transforms: ClassVar[tuple[Transform, ...]] = tuple(ScalarInput(name=n, default=0.0) for n in ("until", "twin"))

    steps: tuple[Count, ...] = (1, 2)
    """Step counts that the student serves."""
    shift: Positive = 1.0
    """Shift of the time grid; 1: none."""
    strength: Part = 0.8
    """Guidance of line 1, which imitates the scale 1 / (1 - strength); 0: none."""
    cond_drop: Fraction = 0.1
    """Share of the prompts that are dropped in line 1, so that there is a guidance."""
    rectify: Amount = 0.5
    """Weight of line 4."""
    delta: Positive = 0.01
    """d: length of the two steps in line 2."""
    clamp: Positive = 1.0
    """Largest element of D in line 4, and of the error in line 2."""
    scale: Positive = 1e-3
    """c of the distance, in units of the latents."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if not self.steps or self.delta >= 0.5:
            raise ValueError(f"give at least one of steps, such as (1, 2), and delta < 0.5; got {self.delta}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts", "x0"})

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        if not isinstance(path := nets.student.path, RectifiedFlow):
            raise ValueError(f"TwinFlow learns mean velocities of straight paths; this model has {type(path).__name__}")
        yield self.flow(nets, batch, rng.fold("flow"))
        yield self.consistency(nets, batch, rng.fold("consistency"))
        yield self.twin(nets, batch, rng.fold("twin"))
        yield self.rectified(nets, batch, rng.fold("rectify"))

    def flow(self, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        x0 = batch.require("x0")
        eps, t = rng.randn(x0.shape, "eps"), rng.rand((len(x0),), "t").to(x0)
        x_t, goal = nets.student.path.add_noise(x0, eps, t), eps - x0
        cond = drop(batch.cond, batch.uncond, self.cond_drop, rng)
        made = velocity(nets, x_t, t, t, cond)
        if self.strength > 0:  # nothing is added where the prompt was dropped
            with torch.no_grad():
                goal = goal + self.strength * (made.detach() - velocity(nets, x_t, t, t, batch.uncond))
        return {"flow": self.distance(made, goal)}  # 1

    def consistency(self, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        x0, d = batch.require("x0"), self.delta
        ends = rng.rand((len(x0),), "ends").to(x0) < 0.5
        t = torch.where(ends, 1.0, 2 * d + (1 - 2 * d) * rng.rand((len(x0),), "t").to(x0))
        r = torch.where(ends, 0.0, (t - 2 * d) * rng.rand((len(x0),), "r").to(x0))
        x = x_t = nets.student.path.add_noise(x0, rng.randn(x0.shape, "eps"), t)
        made = velocity(nets, x_t, t, r, batch.cond)
        with torch.no_grad():
            for now in (t, t - d):
                x = x - d * velocity(nets, x, now, now, batch.cond)
            x_r = x - broadcast(t - 2 * d - r, x) * velocity(nets, x, t - 2 * d, r, batch.cond)
            mean = (x_t - x_r) / broadcast(t - r, x)
            goal = made - (made - mean).clamp(-self.clamp, self.clamp)
        return {"consistency": self.distance(made, goal)}  # 2

    def twin(self, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        with torch.no_grad():
            y, _ = self.clip(nets, batch, rng)
        y_t, t, eps = self.noised(nets, y, rng)
        return {"twin": self.distance(velocity(nets, y_t, t, t, batch.cond, twin=True), eps - y)}  # 3

    def rectified(self, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        y, made = self.clip(nets, batch, rng)
        with torch.no_grad():
            y_s, s, _ = self.noised(nets, y, rng)
            fake, real = (velocity(nets, y_s, s, s, batch.cond, twin=twin) for twin in (True, False))
            goal = made - (fake - real).clamp(-self.clamp, self.clamp)
        return {"rectify": self.rectify * self.distance(made, goal)}  # 4

    def clip(self, nets: Nets, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """The student's clips of one step, and the mean velocities that made them."""
        x0 = batch.require("x0")
        z, one = rng.randn(x0.shape, "noise").to(x0), x0.new_ones(len(x0))
        made = velocity(nets, z, one, one - one, batch.cond)
        return z - made, made

    def noised(self, nets: Nets, y: Tensor, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:  # and its times, and the noise
        eps, t = rng.randn(y.shape, "eps"), LEAST + (1 - LEAST) * rng.rand((len(y),), "t").to(y)
        return nets.student.path.add_noise(y, eps, t), t, eps

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        error = (a - b).square().flatten(1).mean(1)
        return (error / (error.detach() + self.scale**2).sqrt()).mean()

    def contract(self, teacher: Contract) -> Contract:
        return student_contract(teacher, tuple(uniform_grid(n)[:-1] for n in self.steps), self.shift, Renoise())

    def cost(self) -> tuple[Work, ...]:
        return (Work("student", 4 * 3 + (self.strength > 0) + 3 + 1 + 2),)


def velocity(nets: Nets, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond, *, twin: bool = False) -> Tensor:
    """F, or F' of the `twin`: the mean velocity from t to r `[B]`."""
    told = cond.with_extra({"until": r, "twin": torch.full_like(r, float(twin))})
    return nets.student(x_t, t, told).flow
