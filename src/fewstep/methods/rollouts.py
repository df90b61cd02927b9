"""Rollouts: how the student's training inputs are made, and which of its calls carry gradient.

A rollout returns the student's clean prediction and the calls that led to it. It also knows how such a student must be
sampled, because training and sampling must agree: the training simulation *is* the sampler, stopped early.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core import Batch, Pairs, Rng
from fewstep.core.bounds import Positive
from fewstep.diffusion import CFG, DDIM, Contract, Exact, Renoise, Sampler, Shifted, shifted
from fewstep.diffusion.samplers import full
from fewstep.diffusion.times import check_grid
from fewstep.models.denoiser import Predictor

Grids = tuple[tuple[float, ...], ...]
"""One tuple of decreasing times per step count, before the shift and without the final 0."""
NESTED: Grids = ((1.0,), (1.0, 0.5), (1.0, 0.75, 0.5, 0.25))
"""Grids for 1, 2 and 4 steps. Each grid contains the coarser ones."""


@dataclass(frozen=True)
class Visit:
    """One call of the student: `x0 = student(x_t, t)`, latents `[B, C, F, H, W]`, `t` `[B]` or `[B, F]`."""

    x0: Tensor
    x_t: Tensor
    t: Tensor


@dataclass(frozen=True)
class Rolled(Visit):
    """The last call, whose x0 the method's losses use, and the calls that led to it."""

    before: tuple[Visit, ...] = ()
    """Earlier calls, in order. The last `Rollout.grad_calls` calls carry gradient."""
    noise: Tensor | None = None
    """Noise of the first input, before scaling to its path; None if the input is a stored state."""
    exit: int = 0
    """Steps of the sampler that were done before the last call."""
    grid: tuple[float, ...] = ()
    """Times of that sampler, without the final 0; empty if each sample has its own step."""


@dataclass(frozen=True, kw_only=True)
class Rollout(ABC):
    """The student's sampler (`grids`, `shift`, `mode`), and how its training samples are made."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of Batch that it reads, other than the condition."""

    grids: Grids = ((1.0, 0.75, 0.5, 0.25),)
    """Time grids without the final 0, one tuple per step count."""
    shift: Positive = 1.0
    """Shift applied to every time of `grids`; 1: none."""
    mode: Literal["sde", "ode"] = "sde"
    """Between steps: `sde` adds new noise to x0; `ode` takes the deterministic first-order step."""

    def __post_init__(self) -> None:
        exact(self.grids, self.shift)

    @property
    def calls(self) -> float:
        """Expected number of student calls, including those with gradient."""
        return 1.0

    @property
    def grad_calls(self) -> int:
        """Number of last calls that carry gradient; all calls if there are fewer."""
        return 1

    @property
    def work(self) -> float:
        """Expected forward-equivalents with gradient: 1 per call, and 2 more for the backward pass of a call with gradient."""
        return self.calls + 2

    @property
    def fullest(self) -> Mapping[str, int]:
        """Random integers (`Rng.integer`, by name) for which it needs most memory. Other integers do not matter."""
        return {}

    @abstractmethod
    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        """One sample per condition. With `grad`, the last `grad_calls` student calls carry gradient; without, none does."""

    def contract(self, teacher: Contract) -> Contract:
        """How a student trained on this rollout must be sampled."""
        return student_contract(teacher, self.grids, self.shift, Renoise() if self.mode == "sde" else DDIM())


def exact(grids: Grids, shift: float) -> Grids:
    """The shifted times of every grid, without the final 0. ValueError unless each grid decreases strictly from 1.

    A grid may be listed twice, so that it is drawn twice as often.
    """
    if not grids or not all(grids) or len({len(grid) for grid in grids}) != len(set(grids)):
        raise ValueError(
            f"grids needs one list of times for each number of steps, such as [[1.0], [1.0, 0.5]], got {grids}"
        )
    moved = [tuple(float(t) for t in shifted(torch.tensor(g, dtype=torch.float64), shift)) for g in grids]
    return tuple(check_grid((*g, 0.0))[:-1] for g in moved)


def student_contract(
    teacher: Contract, grids: Grids, shift: float, sampler: Sampler, guidance: CFG = CFG()
) -> Contract:
    """The teacher's contract with the student's sampler and exact times (`grids` before the shift).

    `guidance` is the guidance that sampling still needs: none if guidance was distilled into the student at all times. A method
    that distils it at some times leaves the rest, for example `CFG(low=0.9, outside=3.0)` after one of two experts.
    """
    listed = tuple(dict.fromkeys((*grid, 0.0) for grid in exact(grids, shift)))
    grid = Exact(grids=listed, otherwise=Shifted(shift=shift))
    return replace(teacher, grid=grid, sampler=sampler, steps=grid.counts[-1], guidance=guidance)


def pick(times: Sequence[float], index: Tensor, like: Tensor) -> Tensor:
    """`times[index]` with the shape of `index` (`[B]` or `[B, F]`) and the dtype of `like`."""
    return torch.tensor(times, dtype=torch.float64, device=index.device)[index].to(like.dtype)


def predict(student: Predictor, x_t: Tensor, t: Tensor, batch: Batch, grad: bool, **facts: Any) -> Rolled:
    """Make the last call; `facts` are the other fields of `Rolled`."""
    with torch.set_grad_enabled(grad):
        return Rolled(student(x_t, t, batch.cond).x0, x_t, t, **facts)


@dataclass(frozen=True, kw_only=True)
class BackwardSimulation(Rollout):
    """The student's own sampler up to an exit step (2405.14867, section 4.5); the call at the exit has gradient.

    With several grids, each rollout first draws a grid and then the exit. So a student that serves several step counts sees, at
    each time, the inputs that all its samplers give it. `grids=((1.0,),)` is one step, from pure noise to clean latents.
    """

    exit: Literal["random", "last"] = "random"
    """Step to stop at: a random one or the last. All processes draw the same step, because they must agree on the number of
    calls."""

    grad_calls: int = 1
    """Number of last calls that carry gradient; the gradient flows from one call to the next."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grad_calls < 1:
            raise ValueError(f"grad_calls must be at least 1, got {self.grad_calls}")

    @property
    def calls(self) -> float:
        return fmean(fmean(stops) + 1 for stops in self._stops)

    @property
    def work(self) -> float:
        return self.calls + 2 * fmean(fmean(min(stop + 1, self.grad_calls) for stop in stops) for stops in self._stops)

    @property
    def fullest(self) -> Mapping[str, int]:
        """The longest grid with the last exit: it has most calls, and most of them with gradient."""
        lengths = [len(grid) for grid in self.grids]
        return {"grid": lengths.index(max(lengths)), "exit": max(lengths) - 1}

    @property
    def _stops(self) -> list[range]:
        """The exits of each grid."""
        return [range(0 if self.exit == "random" else len(g) - 1, len(g)) for g in self.grids]

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        grid = exact(self.grids, self.shift)[rng.integer("grid", len(self.grids))]
        stop = rng.integer("exit", len(grid)) if self.exit == "random" else len(grid) - 1
        noise, before = rng.randn(batch.noise_shape, "noise"), list[Visit]()
        x = student.path.prior(noise)
        for i in range(stop):
            t, s = full(grid[i], x), full(grid[i + 1], x)
            with torch.set_grad_enabled(grad and i > stop - self.grad_calls):
                prediction = student(x, t, batch.cond)
                before.append(Visit(prediction.x0, x, t))
                if self.mode == "ode":
                    x = prediction.step_to(s)
                else:
                    x = student.path.add_noise(before[-1].x0, rng.randn(x.shape, f"renoise/{i}"), s)
        facts = {"before": tuple(before), "noise": noise, "exit": stop, "grid": grid}
        return predict(student, x, full(grid[stop], x), batch, grad, **facts)


@dataclass(frozen=True, kw_only=True)
class FromData(Rollout):
    """Data with added noise as input, at one time of the grids per sample. Cheap, but sampling gives the student inputs that
    it has not seen in training."""

    needs: ClassVar[frozenset[str]] = frozenset({"x0"})

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        x0, times = batch.require("x0"), [t for grid in exact(self.grids, self.shift) for t in grid]
        t = pick(times, rng.integers((len(batch),), "index", len(times)), x0)
        noise = rng.randn(x0.shape, "noise")
        return predict(student, student.path.add_noise(x0, noise, t), t, batch, grad, noise=noise)


@dataclass(frozen=True, kw_only=True)
class FromPairs(Rollout):
    """Stored states of the teacher's ODE as input, at one time of the grids per sample. All these times must be stored.

    Both sampling modes may be used.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    grids: Grids = NESTED

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        pairs: Pairs = batch.require("pairs")
        stored = [stored_index(pairs, t) for grid in exact(self.grids, self.shift) for t in grid]
        drawn = rng.integers((len(batch),), "index", len(stored))
        index = torch.tensor(stored, device=drawn.device)[drawn]
        x_t = pairs.states[torch.arange(len(batch), device=index.device), index]
        return predict(student, x_t, pick(pairs.times, index, x_t), batch, grad)


def stored_index(pairs: Pairs, t: float) -> int:
    for i, stored in enumerate(pairs.times):
        if math.isclose(stored, t, abs_tol=1e-6):
            return i
    raise ValueError(f"time {t:.6g} was not stored; the pairs hold {list(pairs.times)}. Store a grid that contains it.")


def fold_frames(clips: Tensor, count: int, rng: Rng) -> tuple[Tensor, Tensor]:
    """`count` different random frames of each clip `[B, C, F, H, W]`, as clips of one frame `[B count, C, 1, H, W]`.

    Also returns the index of each frame's clip, `[B count]`.
    """
    batch, _, frames = clips.shape[:3]
    count = min(count, frames)
    chosen = rng.rand((batch, frames), "frames").argsort(1)[:, :count].reshape(-1)
    rows = torch.arange(batch, device=clips.device).repeat_interleave(count)
    return clips[rows, :, chosen].unsqueeze(2), rows


ROLLOUTS = (BackwardSimulation, FromData, FromPairs)
