"""The times of diffusers' own schedulers, where they differ from the plain grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.core.bounds import Count, Natural, Positive
from fewstep.diffusion.grids import TimeGrid

_BELOW_NOISE = 1e-6
"""Diffusers' UniPC begins this much below 1, so that no logarithm is infinite."""


@dataclass(frozen=True, kw_only=True)
class FlowSchedule(TimeGrid):
    """Shifted times of a flow model as a scheduler of diffusers visits them.

    `unipc` (UniPCMultistepScheduler with `use_flow_sigmas`): from 1 - 1e-6, evenly to 1 / num_train_timesteps, which is left
    out, then shifted. `dpm` (DPMSolverMultistepScheduler): the same from 1 - 1 / num_train_timesteps to 0. `euler`
    (FlowMatchEulerDiscreteScheduler): evenly from 1 to the shifted 1 / num_train_timesteps, then shifted once more. All end at 0.
    """

    scheduler: Literal["unipc", "dpm", "euler"] = "unipc"
    shift: Positive = 1.0
    num_train_timesteps: Count = 1000

    def __post_init__(self) -> None:
        if self.scheduler not in ("unipc", "dpm", "euler"):
            raise ValueError(f"scheduler: {self.scheduler!r} is unknown; choose unipc, dpm or euler")
        if self.shift <= 0 or self.num_train_timesteps < 2:
            raise ValueError(
                f"a grid needs shift > 0 and num_train_timesteps > 1, got {self.shift} and {self.num_train_timesteps}"
            )

    @property
    def from_noise(self) -> bool:
        return True

    def times(self, steps: int) -> tuple[float, ...]:
        """`steps + 1` decreasing times; all schedulers but `euler` begin below 1.

        >>> FlowSchedule(scheduler="dpm", shift=3.0).times(2)
        (0.9996664442961973, 0.7496248124062032, 0.0)
        """
        if steps < 1:
            raise ValueError(f"a sampling grid needs at least 1 step, got {steps}")
        lowest = 1 / self.num_train_timesteps
        even = [
            1 + i * ((lowest - 1) / steps) for i in range(steps + 1)
        ]  # in diffusers' order: whole timesteps round alike
        if self.scheduler == "unipc":
            (first, *rest) = map(self._shifted, even[:-1])
            return (first - _BELOW_NOISE, *rest, 0.0)
        if self.scheduler == "dpm":
            return (*(self._shifted(1 - t) for t in (lowest, *even[-2:0:-1])), 0.0)
        last = self._shifted(lowest)
        return (*(self._shifted(1 - (1 - last) * i / max(steps - 1, 1)) for i in range(steps)), 0.0)

    def _shifted(self, t: float) -> float:
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True, kw_only=True)
class MultistepTimesteps(TimeGrid):
    """Which integer timesteps of a DDPM-trained model diffusers' UniPC and DPM-Solver visit, as times `(k + 1) / T`.

    With `leading` and `linspace` they divide the table for one more step, and leave out its lowest timestep. All end at 0.
    """

    spacing: Literal["leading", "trailing", "linspace"] = "linspace"
    num_train_timesteps: Count = 1000
    steps_offset: Natural = 0
    """Offset added to the timesteps if the spacing is `leading`."""

    def times(self, steps: int) -> tuple[float, ...]:
        """`steps + 1` decreasing times. They begin below 1 with `leading`.

        >>> MultistepTimesteps().times(3)
        (1.0, 0.667, 0.334, 0.0)
        """
        total = self.num_train_timesteps
        if not 1 <= steps < total:
            raise ValueError(f"a model of {total} timesteps is sampled in 1 to {total - 1} steps, got {steps}")
        if self.spacing == "leading":
            levels = [i * (total // (steps + 1)) + self.steps_offset + 1 for i in range(steps, 0, -1)]
        elif self.spacing == "trailing":
            levels = [round(total - i * total / steps) for i in range(steps)]
        else:
            levels = [round(i * (total - 1) / steps) + 1 for i in range(steps, 0, -1)]
        if levels[0] > total:
            raise ValueError(f"{steps} steps with steps_offset {self.steps_offset} go beyond timestep {total - 1}")
        return (*(level / total for level in levels), 0.0)
