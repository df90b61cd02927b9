"""Classifier-free guidance in one convention: `uncond + scale (cond - uncond)`. Scale 1 is off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from fewstep.core import Call, Cond
from fewstep.diffusion.path import broadcast
from fewstep.diffusion.prediction import Prediction

Calls = Literal["one", "two"]
"""Calls of the network for one guided prediction. one: prompt and negative prompt as one batch. two: one after the other."""


class Net(Protocol):
    """What a denoiser is to those who call it."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = ..., /) -> Prediction: ...


@dataclass(frozen=True, kw_only=True)
class CFG:
    """Guidance of strength `scale` inside the time interval `[low, high]`, of strength `outside` at other times.

    Public code uses two conventions. `cond + w (cond - uncond)` (CausVid, Self-Forcing, the LCM family) is one less:
    `CFG.from_offset(3.0) == CFG(scale=4.0)`.
    """

    scale: float = 1.0
    """Scale: the result is `uncond + scale (cond - uncond)`; 1: no guidance."""
    low: float = 0.0
    high: float = 1.0
    outside: float = 1.0
    """Scale at all other times. Models with one expert for noisy times and one for the rest have a scale for each."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"the guidance interval must satisfy 0 <= low < high <= 1, got [{self.low}, {self.high}]")

    @classmethod
    def from_offset(cls, w: float) -> CFG:
        """From the convention `cond + w (cond - uncond)`."""
        return cls(scale=w + 1)

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is called."""
        return self.scale != 1.0 or self.outside != 1.0

    @property
    def active(self) -> bool:
        """Whether it does anything."""
        return self.guided

    @property
    def passes(self) -> int:
        """Network evaluations for one prediction."""
        return 2 if self.guided else 1

    def rescaled(self, scale: float) -> CFG:
        """The same, with the one scale `scale` at all times at which there is guidance."""
        return replace(self, scale=scale, outside=1.0 if self.outside == 1.0 else scale)

    def scales(self, t: Tensor, call: Call) -> float | Tensor:
        """The scale inside the interval: one, or one for each of the times `t`."""
        return self.scale

    def __call__(
        self, net: Net, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, call: Call = Call(), *, calls: Calls = "one"
    ) -> Prediction:
        """Guided prediction; conditional and unconditional pass run as one batch of 2B or, with `calls` two, one after the other:
        the same numbers up to rounding, in half the memory. One pass of B when off.

        The past that `call` brings, and the keys and values that come back, are of so many samples, too; so a call with a past
        must be one.
        """
        return self.beside(net, x_t, t, cond, uncond, call, calls)[0]

    def beside(
        self, net: Net, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, call: Call, calls: Calls
    ) -> tuple[Prediction, Tensor]:
        """The guided prediction, and what the network gave for the prompt alone (as `Prediction.raw`)."""
        if not self.guided:
            alone = net(x_t, t, cond, call)
            return alone, alone.raw
        if calls == "one":
            both = net(torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat([cond, uncond]), replace(call, branch="both"))
            raw_cond, raw_uncond = both.raw.chunk(2)
        else:
            if call.kv is not None:
                raise ValueError("a stream's past is read by both prompts in one call; guide a stream with calls='one'")
            both = net(x_t, t, cond, replace(call, branch="cond"))
            raw_cond, free = both.raw, replace(call, branch="uncond", negative=None)
            raw_uncond = net(x_t, t, uncond, free).raw
        inside, one = (t >= self.low) & (t <= self.high), torch.ones_like(t, dtype=x_t.dtype)  # float64 stays float64
        scale = torch.where(inside, self.scales(t, call) * one, self.outside * one)
        raw = raw_uncond + broadcast(scale, x_t) * (raw_cond - raw_uncond)
        return Prediction(raw=raw, kind=both.kind, x_t=x_t, t=t, path=both.path, kv=both.kv), raw_cond
