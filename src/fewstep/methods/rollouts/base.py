"""Rollouts: how the student's training inputs are made, and which of its calls carry gradient.

A rollout returns the student's clean prediction and the calls that led to it. It also knows how such a student must be
sampled, because training and sampling must agree: the training simulation *is* the sampler, stopped early.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import Batch, Cond, Rng, Seeds
from fewstep.core.bounds import Positive
from fewstep.diffusion import DDIM, Contract, Renoise, Sampler
from fewstep.methods.rollouts.context import Context
from fewstep.methods.rollouts.grids import WHOLE, Grids, ends, exact, student_contract
from fewstep.models.denoiser import Predictor
from fewstep.streaming.blocks import Chunks


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
    past: Tensor | None = None
    """Latents `[B, C, P, H, W]` that come right before `x0` in its stream, without gradient: networks that judge the clip see
    them, and losses do not count them. None: the clip is `x0`."""
    conds: tuple[Cond, Cond] | None = None
    """What the clip shows, and the null prompt, where they are not those of the batch."""
    context: Context | None = None
    """Earlier frames that its chunks have read, for networks that judge it; None: they judge the clip alone."""

    @property
    def clip(self) -> Tensor:
        """What teacher and critic see: the past, then `x0`."""
        return self.x0 if self.past is None else torch.cat([self.past, self.x0], 2)

    @property
    def keep(self) -> Tensor | None:
        """Weights of the frames of `clip` in a loss, `[B, F]`, of mean 1: 0 in the past, so that a mean over the clip is a mean
        over `x0`. None: all are 1."""
        if self.past is None:
            return None
        clip = self.clip
        new = torch.arange(clip.shape[2], device=clip.device) >= self.past.shape[2]
        return (new * (clip.shape[2] / self.x0.shape[2])).to(clip.dtype).expand(len(clip), -1)

    def of(self, batch: Batch) -> Batch:
        """The batch with the conditions of this clip."""
        return batch if self.conds is None else replace(batch, cond=self.conds[0], uncond=self.conds[1])


@dataclass(frozen=True, kw_only=True)
class Rollout(ABC):
    """The student's sampler (`grids`, `shift`, `mode`), and how its training samples are made."""

    carries: ClassVar[bool] = False
    """Whether it goes on with what an earlier call has left in `Batch.carried`."""

    grids: Grids = ((1.0, 0.75, 0.5, 0.25),)
    """Time grids without the final 0, one tuple per step count."""
    shift: Positive = 1.0
    """Shift applied to every time of `grids`; 1: none."""
    mode: Literal["sde", "ode"] = "sde"
    """Between steps: `sde` adds new noise to x0; `ode` takes the deterministic first-order step."""

    def __post_init__(self) -> None:
        exact(self.grids, self.shift)

    @property
    def needs(self) -> frozenset[str]:
        """Fields of Batch that it reads, other than the condition."""
        return frozenset()

    @property
    def sampler(self) -> Sampler:
        """The sampler that makes the clips, in training and afterwards."""
        return Renoise() if self.mode == "sde" else DDIM()

    @property
    def whole(self) -> bool:
        """Whether the clip is `x0` alone, with the conditions of the batch (`Rolled.past`, `Rolled.conds`)."""
        return True

    @property
    def ends(self) -> set[float]:
        """Times, after the shift, of the last calls, which make the clips that losses see."""
        return ends(self.grids, getattr(self, "exit", "random"), self.shift, getattr(self, "span", WHOLE))

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


def calls_of(
    loop: Chunks,
    memory: KVCache,
    start: Tensor,
    conds: tuple[Cond, Cond],
    rng: Seeds | Rng,
    *,
    exit: int | None,
    grad: bool,
) -> tuple[list[Visit], KVCache]:
    """The calls that make the next chunk of a stream from `start`, up to step `exit` (None: all), and the memory after it."""
    visits = list[Visit]()
    with torch.set_grad_enabled(grad):
        for made in loop.chunk(memory, start, *conds, rng, exit=exit):
            visits.append(Visit(made.x, made.step.prediction.x_t, made.step.prediction.t))
        return visits, made.memory or memory


def aligned(chunks: Sequence[Sequence[Visit]], *, apart: bool = False) -> list[Visit]:
    """The calls of each chunk, as calls on all of them: the last ones together, and those with fewer stay at their first. At one
    time for all, or where they are `apart`, at a time for each frame. Only the last has gradient."""
    deep = max(map(len, chunks))
    calls = [[calls[max(0, n + len(calls) - deep)] for calls in chunks] for n in range(deep)]
    with torch.no_grad():
        before = [_joined(visits, apart) for visits in calls[:-1]]
    return [*before, _joined(calls[-1], apart)]


def _joined(chunks: Sequence[Visit], apart: bool) -> Visit:
    each = [v.t[:, None].expand(-1, v.x0.shape[2]) if v.t.ndim == 1 else v.t for v in chunks]
    t = torch.cat(each, 1) if apart else chunks[0].t
    return Visit(torch.cat([v.x0 for v in chunks], 2), torch.cat([v.x_t for v in chunks], 2), t)


def predict(student: Predictor, x_t: Tensor, t: Tensor, batch: Batch, grad: bool, **facts: Any) -> Rolled:
    """The only call of a rollout that takes one; `facts` are what else `Rolled` says."""
    with torch.set_grad_enabled(grad):
        return Rolled(student(x_t, t, batch.cond).x0, x_t, t, **facts)
