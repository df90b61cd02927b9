"""Time grids: the times that a sampler visits for a given number of steps. Each is a frozen class that knows its times."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from fewstep.core.bounds import Bounds, Count, Decay, Natural, Part, Positive, require_bounds
from fewstep.diffusion.times import check_grid, linear_quadratic_grid, uniform_grid


class StepCountError(ValueError):
    """A model was asked for a number of steps it was not trained for."""


class TimeGrid(ABC):
    """Decreasing times from noise to data. Subclasses are frozen dataclasses."""

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that it has exact times for, increasing; empty where it takes any."""
        return ()

    @property
    def from_noise(self) -> bool:
        """Whether sampling starts from the noise itself, even if the first time is below 1, as in diffusers' pipelines."""
        return False

    @property
    def video_noise(self) -> float | None:
        """Time of the noise on the latents of a given video, which sampling must begin with. None: it begins with noise, or with
        a video that has the noise of its first time."""
        return None

    @property
    def free(self) -> TimeGrid:
        """The grid of step counts that the model was not trained for: of a grid that takes any, itself."""
        return self

    @abstractmethod
    def times(self, steps: int) -> tuple[float, ...]:
        """`steps + 1` decreasing times, the first 1 and the last 0 unless it says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Shifted(TimeGrid):
    """Uniform times, then shifted: `shift t / (1 + (shift - 1) t)`.

    >>> Shifted(shift=5.0).times(4)
    (1.0, 0.9375, 0.8333333333333334, 0.625, 0.0)
    """

    shift: Positive = 1.0
    """Shift of the times: values above 1 spend more steps at high noise."""
    terminal: Decay = 0.0
    """Smallest time before the final 0: all other times are stretched to end here (LTX). 0: no stretching."""

    def __post_init__(self) -> None:
        if self.shift <= 0 or not 0 <= self.terminal < 1:
            raise ValueError(f"a grid needs shift > 0 and 0 <= terminal < 1, got {self.shift} and {self.terminal}")

    def times(self, steps: int) -> tuple[float, ...]:
        return uniform_grid(steps, self.shift, self.terminal)


@dataclass(frozen=True, kw_only=True)
class LinearQuadratic(TimeGrid):
    """Linear down to `1 - threshold` in the first half of the steps, then ever faster (2410.13720; LTX 0.9.5)."""

    threshold: Annotated[float, Bounds(above=0, below=1)] = 0.025

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}")

    def times(self, steps: int) -> tuple[float, ...]:
        return linear_quadratic_grid(steps, self.threshold)


@dataclass(frozen=True, kw_only=True)
class Timesteps(TimeGrid):
    """Which integer timesteps of a DDPM-trained model are visited (2305.08891, table 2), as times `(k + 1) / T`.

    diffusers' DDIM moves by `T // steps` levels whatever timestep comes next. Where that is the next one, which holds for
    `leading`, and for `trailing` if `steps` divides T, both make the same clip; elsewhere this grid goes to the next one.
    """

    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    num_train_timesteps: Count = 1000
    steps_offset: Natural = 0
    """Offset added to the timesteps if the spacing is `leading`."""
    ends_clean: bool = True
    """Whether the last step ends at t = 0; if not, at the table's first level (`set_alpha_to_one: false`)."""

    def times(self, steps: int) -> tuple[float, ...]:
        """`steps + 1` decreasing times. They begin below 1 where the spacing leaves out the last timestep.

        >>> Timesteps().times(4)
        (1.0, 0.75, 0.5, 0.25, 0.0)
        """
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"a model of {total} timesteps is sampled in 1 to {total} steps, got {steps}")
        if self.spacing == "leading":
            levels = [i * (total // steps) + self.steps_offset + 1 for i in reversed(range(steps))]
        elif self.spacing == "trailing":
            levels = [round(total - i * total / steps) for i in range(steps)]
        else:
            levels = [round(i * (total - 1) / max(steps - 1, 1)) + 1 for i in reversed(range(steps))]
        if levels[0] > total:
            raise ValueError(f"{steps} steps with steps_offset {self.steps_offset} go beyond timestep {total - 1}")
        return (*(level / total for level in levels), 0.0 if self.ends_clean else 1 / total)


@dataclass(frozen=True, kw_only=True)
class Exact(TimeGrid):
    """The very times that a student was trained at, for each of its step counts. Other counts are refused."""

    grids: tuple[tuple[float, ...], ...] = ((1.0, 0.0),)
    """Grids of times that decrease strictly from 1 to 0; n + 1 times are a grid of n steps."""
    otherwise: TimeGrid = Shifted()
    """Grid for step counts that it was not trained for, if the caller insists (`force`)."""

    def __post_init__(self) -> None:
        lengths = [len(check_grid(grid)) for grid in self.grids]
        if not lengths or len(set(lengths)) < len(lengths):
            raise ValueError(f"give one grid per step count, and at least one; got grids of {lengths} times")

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(sorted(len(grid) - 1 for grid in self.grids))

    @property
    def free(self) -> TimeGrid:
        return self.otherwise.free

    def times(self, steps: int) -> tuple[float, ...]:
        """StepCountError for a step count that is not listed."""
        for grid in self.grids:
            if len(grid) == steps + 1:
                return grid
        raise _untrained(self, steps)


@dataclass(frozen=True, kw_only=True)
class Trained(TimeGrid):
    """The times of another grid, for the step counts that a student was trained for. Other counts are refused.

    >>> Trained(grid=Shifted(shift=5.0), steps=(4,)).times(4)
    (1.0, 0.9375, 0.8333333333333334, 0.625, 0.0)
    """

    grid: TimeGrid = Shifted()
    steps: tuple[Count, ...] = (4,)
    """The step counts that it was trained for."""

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or self.grid.counts:
            raise ValueError(
                f"name at least one step count, and a grid that takes any; got {self.steps} and {self.grid}"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.steps)))

    @property
    def from_noise(self) -> bool:
        return self.grid.from_noise

    @property
    def video_noise(self) -> float | None:
        return self.grid.video_noise

    @property
    def free(self) -> TimeGrid:
        return self.grid

    def times(self, steps: int) -> tuple[float, ...]:
        """StepCountError for a step count that is not listed."""
        if steps not in self.steps:
            raise _untrained(self, steps)
        return self.grid.times(steps)


@dataclass(frozen=True, kw_only=True)
class FromVideo(TimeGrid):
    """Uniform times from one below 1, for a student that begins with the latents of a given video and not with noise, such as a
    low-resolution one that is to become sharp (DOVE, 2505.16239).

    >>> FromVideo(time=0.4).times(2)
    (0.4, 0.2, 0.0)
    """

    time: Annotated[float, Bounds(above=0, most=1)] = 0.4
    """First time: the one for which the network takes the video's latents (DOVE: 0.4 of a table of 1000 timesteps)."""
    noise: Part = 0.0
    """Time of the noise that the latents are given before; 0: none (DOVE). Equal to `time`, they are latents of that time."""

    def __post_init__(self) -> None:
        require_bounds(self)

    @property
    def video_noise(self) -> float:
        return self.noise

    def times(self, steps: int) -> tuple[float, ...]:
        return tuple(self.time * t for t in uniform_grid(steps))


@dataclass(frozen=True, kw_only=True)
class Angles(TimeGrid):
    """Angles `atan(s / a)` that a student of rectified flow was trained at (rCM, 2510.08431): `t = sin / (sin + cos)`.

    The first is that of `sigma_max`, so the times begin below 1, and sampling begins with a little less than pure noise.
    """

    sigma_max: Positive = 80.0
    """Ratio of noise to signal at which sampling begins."""
    angles: tuple[Annotated[float, Bounds(above=0, below=math.pi / 2)], ...] = (1.5, 1.4, 1.0)
    """Angles of the later steps, decreasing: n - 1 of them, the first ones, in n steps."""

    def __post_init__(self) -> None:
        every = (math.atan(self.sigma_max), *self.angles, 0.0)
        if any(a <= b for a, b in zip(every, every[1:])):
            raise ValueError(f"angles decrease from atan(sigma_max) = {every[0]:.6g} to 0, got {list(self.angles)}")

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(range(1, len(self.angles) + 2))

    @property
    def free(self) -> TimeGrid:
        return Shifted()

    def times(self, steps: int) -> tuple[float, ...]:
        """StepCountError for more steps than there are angles.

        >>> [round(t, 4) for t in Angles().times(2)]
        [0.9877, 0.9338, 0.0]
        """
        if steps not in self.counts:
            raise _untrained(self, steps)
        angles = (math.atan(self.sigma_max), *self.angles[: steps - 1])
        return (*(math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles), 0.0)


def _untrained(grid: TimeGrid, steps: int) -> StepCountError:
    trained = ", ".join(map(str, grid.counts))
    return StepCountError(f"this student was trained for {trained} steps and was asked for {steps}. Use one of these.")
