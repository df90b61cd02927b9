"""The sampling contract that travels with the weights: which solver, which exact times, which guidance."""

from __future__ import annotations

from dataclasses import dataclass, field

from fewstep.core.bounds import Count, Fraction, Positive
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.samplers import Solver, calls
from fewstep.diffusion.times import Timesteps, check_grid, linear_quadratic_grid, uniform_grid


class StepCountError(ValueError):
    """A model was asked for a number of steps it was not trained for."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """How a model must be sampled to get what was measured.

    A teacher has `grids == {}`: any number of steps, on the shifted uniform grid or by its `timesteps`. A student lists
    the exact times of each step count it was trained for and refuses others.
    """

    solver: Solver = "euler"
    steps: Count = 50
    """The default number of steps."""
    shift: Positive = 1.0
    """Of the uniform grid, where no exact grid is listed."""
    terminal: Fraction = 0.0
    """The last time before 0 of that grid (LTX), if not 0."""
    threshold: Fraction = 0.0
    """Where not 0, the grid is linear down to 1 less that in its first half, then quadratic (LTX 0.9.5), and has no shift."""
    timesteps: Timesteps | None = None
    """Of a model trained on integer timesteps: takes the place of the uniform grid."""
    grids: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Step count (as text, JSON has no integer keys) -> exact decreasing times from 1 to 0."""
    guidance: CFG = CFG()
    """Scale 1 in a student whose guidance was distilled in."""

    def __post_init__(self) -> None:
        for count, times in self.grids.items():
            if len(check_grid(times)) != int(count) + 1:
                raise ValueError(f"the grid of {count} steps needs {int(count) + 1} times, got {list(times)}")

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts it was trained for, increasing; of a teacher, which takes any, its default alone."""
        return tuple(sorted(map(int, self.grids))) or (self.steps,)

    def times(self, steps: int | None = None, *, force: bool = False) -> tuple[float, ...]:
        """The times to visit for `steps` (default: the contract's own). StepCountError if untrained, unless `force`."""
        steps = self.steps if steps is None else steps
        if str(steps) in self.grids:
            return self.grids[str(steps)]
        if self.grids and not force:
            trained = ", ".join(sorted(self.grids, key=int))
            raise StepCountError(
                f"this student was trained for {trained} steps and was asked for {steps}. Use one of these."
            )
        if self.timesteps is not None:
            return self.timesteps.grid(steps)
        if self.threshold:
            return linear_quadratic_grid(steps, self.threshold)
        return uniform_grid(steps, self.shift, self.terminal)

    def calls(self, steps: int | None = None) -> int:
        """NFE: network evaluations per clip, guidance counted (two per step when it is on)."""
        return calls(self.solver, self.steps if steps is None else steps) * (2 if self.guidance.active else 1)
