"""Samplers: from noise to a clip, step by step. Each is a frozen class that moves the latents by one step.

`denoise(x_t, t, call)` returns a Prediction; `call` says which step of how many it is. `x` is noise `[B, C, F, H, W]` at
`times[0]`, and `times` decrease to 0. A time is one number for all frames, or one for each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.core import Call, Noise
from fewstep.diffusion.path import broadcast
from fewstep.diffusion.prediction import Prediction

Denoise = Callable[[Tensor, Tensor, Call], Prediction]
Time = float | tuple[float, ...]
"""A time for all frames of a clip, or one for each."""
Times = tuple[Time, ...]


@dataclass(frozen=True)
class Step:
    """A step that has been made."""

    index: int
    """Number of the step, from 0."""
    steps: int
    """Total number of steps."""
    prediction: Prediction
    """Prediction of the step's first call, with its latents and its time."""
    x: Tensor
    """Latents after the step. After the last step they are the sample."""


@dataclass(frozen=True)
class Here:
    """A step that is to be made, from time `t` to time `s`."""

    x: Tensor
    """Latents at time `t`."""
    t: Time
    s: Time
    prediction: Prediction
    """Prediction for `x` at time `t`."""
    before: Prediction | None
    """Prediction of the step before; None in the first step."""
    call: Call
    denoise: Denoise
    rng: Noise

    @property
    def ends(self) -> bool:
        """Whether no frame has noise after this step."""
        return (max(self.s) if isinstance(self.s, tuple) else self.s) == 0

    @property
    def dt(self) -> Tensor:
        """`s - t`, taken in float64, in the dtype of the latents and shaped to multiply them."""
        t, s = (full(u, self.x.double()) for u in (self.t, self.s))
        return broadcast(s - t, self.x).to(self.x.dtype)

    def at_s(self) -> Tensor:
        """The time `s` of every sample: `[B]`, or `[B, F]`."""
        return full(self.s, self.x)

    def finished(self, moved: Tensor, clean: Tensor) -> Tensor:
        """`clean` in frames that this step brings to time 0, `moved` in the others."""
        if not isinstance(self.s, tuple):
            return clean if self.s == 0 else moved
        return torch.where(broadcast(self.at_s(), self.x) == 0, clean, moved)

    def kept(self, moved: Tensor) -> Tensor:
        """`moved`, but the latents as they are in frames whose time stands still."""
        if not isinstance(self.t, tuple) and not isinstance(self.s, tuple):
            return moved
        return torch.where(self.dt == 0, self.x, moved)


class Sampler(ABC):
    """How a clip is sampled. Subclasses are frozen dataclasses: two equal samplers make the same clip."""

    @property
    def deterministic(self) -> bool:
        """Whether the first noise decides the clip. Otherwise fresh noise is drawn between steps."""
        return True

    @property
    def one_time(self) -> bool:
        """Whether all frames of a clip have the same time in every call."""
        return True

    @property
    def by_frame(self) -> bool:
        """Whether frames may have times of their own."""
        return True

    def calls(self, steps: int) -> int:
        """Network evaluations of one clip in so many steps, without guidance."""
        return steps

    @abstractmethod
    def move(self, here: Here) -> Tensor:
        """The latents at `here.s`."""

    def sampling(self, denoise: Denoise, x: Tensor, times: Times, *, rng: Noise) -> Iterator[Step]:
        """Make the steps one by one. Whoever has seen enough stops asking; nothing is left behind."""
        before = None
        for index, (t, s) in enumerate(pairwise(times)):
            call = Call(step=index, steps=len(times) - 1, rng=rng)
            prediction = denoise(x, full(t, x), call)
            here = Here(x, t, s, prediction, before, call, denoise, rng)
            x, before = here.kept(self.move(here)), prediction
            yield Step(index, call.steps, prediction, x)

    def __call__(self, denoise: Denoise, x: Tensor, times: Times, *, rng: Noise) -> Tensor:
        """The sample: `sampling` run to its end."""
        return finish(self.sampling(denoise, x, times, rng=rng))


def finish(steps: Iterator[Step]) -> Tensor:
    """The sample at the end of `steps`, none of which is kept."""
    x = next(steps).x
    for step in steps:
        x = step.x
    return x


def full(t: Time, like: Tensor) -> Tensor:
    """The time `t` of every sample of `like`, float32 (float64 for float64 latents): `[B]`, or `[B, F]` of a time per frame."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(t, tuple):
        return torch.full((len(like),), t, dtype=dtype, device=like.device)
    if len(t) != like.shape[2]:
        raise ValueError(
            f"{len(t)} times were given for clips of {like.shape[2]} frames; give one for each, or one number"
        )
    return torch.tensor(t, dtype=dtype, device=like.device).expand(len(like), -1)
