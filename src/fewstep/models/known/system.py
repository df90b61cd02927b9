"""What is known of a public few-step model: which weights it has, and how its authors sample it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fewstep.diffusion import Betas, Contract, Exact, Kind, NoisePath, RectifiedFlow, Shifted, TimeGrid, Trained

_COUNT = re.compile(r"(\d+)[-_ ]?steps?", re.IGNORECASE)
"""Where the name of a file says for how many steps it was trained."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A system of public weights that can become a student here, or of which it is known why it cannot."""

    name: str
    what: str
    """One sentence for the list."""
    source: str
    """Where its authors publish the weights."""
    bases: tuple[str, ...]
    """Models whose text encoder, codec and, for a LoRA, denoiser it needs; the first is the default."""
    network: str
    """Class of the denoiser of such a model."""
    holds: Literal["lora", "weights", "adapted", "motion"]
    """What its files hold: a LoRA, the whole denoiser, the whole denoiser with a LoRA beside it that belongs to it, or motion
    modules (with a LoRA beside them, if there is one)."""
    inside: str = ""
    """Which of the networks in a training checkpoint its authors sample, such as `generator_ema`. Empty: the averaged one, if
    there is one."""
    files: str
    """Pattern of the names of its files, folders or hub pages. Nothing else may match it."""
    keys: str = ""
    """Pattern of names of tensors that no other system has, for files of other names."""
    path: NoisePath = RectifiedFlow()
    kind: Kind = "flow"
    """What it predicts; the base must predict the same, on the same path."""
    contract: Contract
    """How it is sampled. A file whose name says a step count is for that one."""
    per_file: bool = False
    """Whether each step count has a file of its own."""
    size: Mapping[str, int] = field(default_factory=dict)
    """Size of its clips, where it is not the base's: `num_frames`, `height`, `width`."""
    guidance_input: float | None = None
    """Guidance (`uncond + scale (cond - uncond)`) that a network with an input for it is told."""
    licence: str
    facts: Mapping[str, str]
    """Where each fact comes from."""
    unverified: str = ""
    """What is not certain, and what was decided."""
    missing: str = ""
    """What fewstep lacks to run it; nothing, if it can be imported."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Step counts that can be asked for: of a stream that has its own for each chunk, its name alone."""
        stream = self.contract.stream
        return (self.contract.steps,) if stream is not None and stream.steps else self.contract.counts

    def for_file(self, name: str, steps: int | None) -> Contract:
        """The contract of a file. ValueError where it cannot be told for how many steps it is, or it is for no such count."""
        found = _COUNT.search(name) if self.per_file else None
        told = int(found[1]) if found else None
        count = steps if steps is not None else told
        if count is None and self.per_file:
            raise ValueError(
                f"{self.name} has a file for each of {self._list()} steps, and the name {name!r} does not say which; give "
                "--steps N"
            )
        if count is not None and (count not in self.counts or told not in (None, count)):
            other = f", and {name!r} is for {told}" if told not in (None, count) else ""
            raise ValueError(f"{self.name} is sampled in {self._list()} steps, not in {count}{other}")
        if count is None:
            return self.contract
        grid = _only(self.contract.grid, count) if self.per_file else self.contract.grid
        return replace(self.contract, grid=grid, steps=count)

    def _list(self) -> str:
        return " or ".join(map(str, self.counts))


def _only(grid: TimeGrid, count: int) -> TimeGrid:
    """The same grid for one of its step counts alone."""
    if isinstance(grid, Trained):
        return replace(grid, steps=(count,))
    return Exact(grids=(grid.times(count),), otherwise=grid.free)


LINEAR, SCALED_LINEAR = Betas(schedule="linear"), Betas(schedule="scaled_linear")
"""The noise tables of AnimateDiff and of Stable Diffusion."""


def listed(*times: float, shift: float = 1.0) -> Exact:
    """The grid of one list of times, without the 0 at its end; with `shift` if a caller insists on another step count."""
    return Exact(grids=((*times, 0.0),), otherwise=Shifted(shift=shift))
