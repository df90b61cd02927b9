"""What tests share: diffusion models whose every quantity has a closed form.

Data of class c are `N(mean_c, std^2)` in every latent element. The class travels as `cond.text[:, 0, 0]`; class 0 is
the null prompt. With `S_t^2 = a^2 std^2 + s^2` the posterior mean, the ODE flow map, guidance and any number of DDIM
steps are affine in x, so the exact student of every regression method is a table of `(scale, offset)`, one per time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core import Batch, Call, Cond, Pairs, Rng
from fewstep.diffusion import Kind, NoisePath, Prediction, RectifiedFlow, target, uniform_grid
from fewstep.diffusion.path import broadcast
from fewstep.methods import BackwardSimulation, Method, Nets, Sync, Update

RF = RectifiedFlow()
SCALAR = (1, 1, 1, 1)
ONE_STEP = BackwardSimulation(grids=((1.0,),))
"""Pure noise to clean latents in one call."""


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class GaussianTeacher(nn.Module):
    """The exact denoiser of `N(means[class], std^2)`."""

    def __init__(self, means: Tensor, std: float, path: NoisePath = RF, kind: Kind = "flow") -> None:
        super().__init__()
        self.means, self.std, self.path, self.kind = nn.Parameter(means.double()), std, path, kind

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        mean = broadcast(self.means[cond.text[:, 0, 0].long()], x_t)
        c = self.path.at(t, x_t)
        variance = c.a**2 * self.std**2 + c.s**2
        away = x_t - c.a * mean
        x0, eps = mean + c.a * self.std**2 / variance * away, c.s / variance * away
        return Prediction(target(self.kind, x0, eps, t, self.path), self.kind, x_t, t, self.path)

    def flow_map(self, x: Tensor, t: float, r: float, mean: float) -> Tensor:
        """The exact ODE solution at `r` of a trajectory through `x` at `t`."""
        here, there = (self.path.coeffs(f64(u)) for u in (t, r))
        spread = [(c.a**2 * self.std**2 + c.s**2).sqrt() for c in (here, there)]
        return there.a * mean + spread[1] / spread[0] * (x - here.a * mean)

    def guided_mean(self, scale: float) -> float:
        """The mean that guidance of class 1 against class 0 amounts to."""
        null, cond = self.means.tolist()
        return null + scale * (cond - null)

    def compose_affine(self, times: tuple[float, ...], mean: float) -> tuple[float, float]:
        """`(scale, offset)` of the DDIM steps over `times` (last 0): `x -> scale x + offset`. Not the ODE map."""
        scale, offset = 1.0, 0.0
        for t, s in zip(times, times[1:]):
            here, there = ([float(v) for v in self.path.coeffs(f64(u))] for u in (t, s))
            gain = here[0] * self.std**2 / (here[0] ** 2 * self.std**2 + here[1] ** 2)
            shift = mean * (1 - gain * here[0])  # x0 = gain x + shift
            ratio = there[1] / here[1] if s > 0 else 0.0
            signal = there[0] - ratio * here[0] if s > 0 else 1.0  # x_s = signal x0 + ratio x
            scale, offset = (signal * gain + ratio) * scale, (signal * gain + ratio) * offset + signal * shift
        return scale, offset


class AffineTableStudent(nn.Module):
    """`x0 = scale[i] x + offset[i]` at `times[i]`: free parameters, nothing shared between times."""

    def __init__(self, times: tuple[float, ...], path: NoisePath = RF) -> None:
        super().__init__()
        self.times, self.path = f64(*times), path
        self.scale = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        i = (t.double()[:, None] - self.times).abs().argmin(1)
        x0 = broadcast(self.scale[i], x_t) * x_t + broadcast(self.offset[i], x_t)
        return Prediction(x0, "x0", x_t, t, self.path)

    @torch.no_grad()
    def fill(self, rows: list[tuple[float, float]]) -> AffineTableStudent:
        self.scale.copy_(f64(*(a for a, _ in rows)))
        self.offset.copy_(f64(*(b for _, b in rows)))
        return self


class ExactCritic(nn.Module):
    """The best possible critic of a one-step `AffineTableStudent`: its samples are Gaussian."""

    def __init__(self, student: AffineTableStudent) -> None:
        super().__init__()
        self.student, self.path = [student], student.path  # in a list: the student is no part of the critic

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        student = self.student[0]
        means = student.offset.detach()[0].expand(2)
        return GaussianTeacher(means, float(student.scale.detach()[0]), student.path)(x_t, t, cond)


class Counting(nn.Module):
    """Records `(grad enabled, x_t, t)` of every call of another network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.path = net, net.path
        self.calls: list[tuple[bool, Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        self.calls.append((torch.is_grad_enabled(), x_t, t))
        return self.net(x_t, t, cond, call)


class FreeClips(nn.Module):
    """A student whose clips are its parameters: their gradient is what the losses put on its samples."""

    def __init__(self, shape: tuple[int, ...], path: NoisePath = RF) -> None:
        super().__init__()
        self.clips, self.path = nn.Parameter(Rng(1).randn(shape, "clips").double()), path

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *rest: Any) -> Prediction:
        return Prediction(self.clips, "x0", x_t, t, self.path)


@dataclass(frozen=True)
class Question:
    """One call of a network."""

    x_t: Tensor
    t: Tensor
    labels: list[int]
    grad: bool
    """Whether gradient was enabled."""
    call: Call


class Asked(nn.Module):
    """Another network, and everything that it was asked. Its `features` are its input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.path = net, net.path
        self.questions: list[Question] = []

    def note(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> None:
        labels = cond.text[:, 0, 0].long().tolist()
        self.questions.append(Question(x_t.detach(), t, labels, torch.is_grad_enabled(), call))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *rest: Any) -> Prediction:
        self.note(x_t, t, cond, *rest)
        return self.net(x_t, t, cond, *rest)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, *rest: Any) -> list[Tensor]:
        self.note(x_t, t, cond)
        return [x_t]


class MeanHead(nn.Module):
    """A discriminator whose logit is `weight` times the mean of the first feature."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(f64(weight))

    def forward(self, features: list[Tensor]) -> Tensor:
        return features[0].flatten(1).mean(1, keepdim=True) * self.weight


class Plain(nn.Module):
    """A codec whose latents are frames."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def cond_of(label: int, batch: int) -> Cond:
    return conds_of([label] * batch)


def conds_of(labels: list[int]) -> Cond:
    return Cond(torch.tensor(labels).float()[:, None, None], torch.ones(len(labels), 1, dtype=torch.bool))


def make_batch(size: int, *, x0: Tensor | None = None, pairs: Pairs | None = None) -> Batch:
    return Batch(cond_of(1, size), cond_of(0, size), SCALAR, x0=x0, pairs=pairs)


def normal(size: int, name: str = "bench") -> Tensor:
    return Rng(7).randn((size, *SCALAR), name).double()


def stored_pairs(teacher: GaussianTeacher, eps: Tensor, steps: int) -> Pairs:
    """DDIM states of class 1 over the uniform grid."""
    times, states = uniform_grid(steps), [eps]
    for t, s in zip(times, times[1:]):
        x, both = states[-1], [torch.full((len(eps),), u, dtype=torch.float64) for u in (t, s)]
        prediction = teacher(x, both[0], cond_of(1, len(eps)))
        states.append((prediction.step_to(both[1]) if s > 0 else prediction.x0).detach())
    return Pairs(torch.stack(states, 1), times)


def run(method: Method, nets: Nets, batch: Batch, steps: int, fit: Callable[..., None]) -> Nets:
    """A tiny engine: `fit(parameters, loss)` in place of one optimiser step."""
    for step in range(steps):
        for event in method.updates(step):
            if isinstance(event, Sync):
                nets = Nets({**nets, event.target: averaged(nets[event.target], nets[event.source], event.decay)})
            else:
                trained = [p for role in event.roles for p in nets[role].parameters()]
                fit(trained, total(event, nets, batch, Rng(0, step)))
    return nets


def clone(student: AffineTableStudent) -> AffineTableStudent:
    copy = AffineTableStudent(tuple(student.times.tolist()), student.path)
    copy.load_state_dict(student.state_dict())
    return copy.requires_grad_(False)


def averaged(target: nn.Module, source: AffineTableStudent, decay: float) -> AffineTableStudent:
    """What `Sync` says, as a new table; a target of another kind can only be replaced."""
    made = clone(source)
    if decay:
        with torch.no_grad():
            for mine, theirs in zip(made.parameters(), target.parameters(), strict=True):
                mine.lerp_(theirs, decay)
    return made


def total(update: Update, nets: Nets, batch: Batch, rng: Rng) -> Callable[[], Tensor]:
    """The sum of all terms of all graphs, as a function without arguments."""

    def loss() -> Tensor:
        return sum((term for terms in update.losses(nets, batch, rng) for term in terms.values()), torch.zeros(()))

    return loss


def minimise(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> None:
    """To the exact optimum of a smooth loss: L-BFGS in float64."""
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)


def terms(losses: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: term for graph in losses for name, term in graph.items()}
