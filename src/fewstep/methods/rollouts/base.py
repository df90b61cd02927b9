"""Rollouts: how the student's training inputs are made, and which of its calls carry gradient.

A rollout returns the student's clean prediction and the calls that led to it. It also knows how such a student must be
sampled, because training and sampling must agree: the training simulation *is* the sampler, stopped early.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core import Batch, Rng
from fewstep.core.bounds import Positive
from fewstep.diffusion import DDIM, Contract, Renoise, Sampler
from fewstep.methods.rollouts.grids import Grids, exact, student_contract
from fewstep.models.denoiser import Predictor


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
    """Earlier calls, in order. The last `Rollout.grad_calls` calls carry gradient. Of chunks that differ in their number of calls
    the last ones belong together, and those that made fewer stay at their first one."""
    noise: Tensor | None = None
    """Noise of the first input, before scaling to its path; None if the input is a stored state."""
    exit: int = 0
    """Steps of the sampler that were done before the last call; of chunks that differ, the most."""
    grid: tuple[float, ...] = ()
    """Times of that sampler, without the final 0; empty if each sample, or each chunk, has its own step."""


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
    def sampler(self) -> Sampler:
        """The sampler that makes the clips, in training and afterwards."""
        return Renoise() if self.mode == "sde" else DDIM()

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
        return student_contract(teacher, self.grids, self.shift, self.sampler)


def pick(times: Sequence[float], index: Tensor, like: Tensor) -> Tensor:
    """`times[index]` with the shape of `index` (`[B]` or `[B, F]`) and the dtype of `like`."""
    return torch.tensor(times, dtype=torch.float64, device=index.device)[index].to(like.dtype)


def predict(student: Predictor, x_t: Tensor, t: Tensor, batch: Batch, grad: bool, **facts: Any) -> Rolled:
    """The only call of a rollout that takes one; `facts` are what else `Rolled` says."""
    with torch.set_grad_enabled(grad):
        return Rolled(student(x_t, t, batch.cond).x0, x_t, t, **facts)
