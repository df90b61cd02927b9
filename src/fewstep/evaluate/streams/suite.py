"""What a drift evaluation measures, and on which prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fewstep.evaluate.cases import SEED_STRIDE
from fewstep.world.grammar import Scene, parse, world_prompts


@dataclass(frozen=True, kw_only=True)
class DriftSuite:
    """How long clips are, and how many."""

    times: tuple[int, ...] = (1, 4, 20)
    """Lengths at which figures are compared, in multiples of the models' own number of frames; rising from 1."""
    prompts: int = 24
    """Prompts of the built-in world; `seed` draws scenes and wordings."""
    seeds_per_prompt: int = 1
    seed: int = 2026
    paraphrased: float = 0.5
    """Share of prompts that are not the canonical sentence."""
    batch: int = 8
    """Prompts whose clips are made together."""
    features: str = "auto"
    """Features of the Frechet distance (`extractors.feature_map`)."""
    switch: bool = True
    """Whether prompts are also switched on the way (`switching`)."""
    shown: int = 6
    """Prompts with film strips in the page: those that drift most."""

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("prompts", "seeds_per_prompt", "batch", "shown")}
        if low := [f"{name}={value}" for name, value in counts.items() if value < 1]:
            raise ValueError(f"counts must be at least 1; wrong: {', '.join(low)}")
        if len(self.times) < 2 or self.times[0] != 1 or list(self.times) != sorted(set(self.times)):
            raise ValueError(f"times must rise from 1, such as 1 4 20; got {' '.join(map(str, self.times))}")

    @property
    def count(self) -> int:
        """Windows of the longest clips."""
        return self.times[-1]

    def cases(self) -> DriftCases:
        """The clips to make."""
        prompts = world_prompts(self.prompts, self.paraphrased, self.seed)
        first = self.seed * SEED_STRIDE
        every = [prompt for prompt in prompts for _ in range(self.seeds_per_prompt)]
        return DriftCases(tuple(every), tuple(range(first, first + len(every))), self.seeds_per_prompt)


@dataclass(frozen=True)
class DriftCases:
    """One prompt and one seed per clip, ordered by prompt."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    seeds_per_prompt: int

    @property
    def scenes(self) -> tuple[Scene, ...]:
        return tuple(parse(prompt) for prompt in self.prompts)

    def batches(self, size: int) -> Iterator[slice]:
        """Clips that are made together: those of `size` prompts."""
        step = size * self.seeds_per_prompt
        for first in range(0, len(self.prompts), step):
            yield slice(first, min(first + step, len(self.prompts)))

    def by_prompt(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the clips of each prompt, ignoring NaN: `[N, ...]` -> `[P, ...]`."""
        return values.unflatten(0, (-1, self.seeds_per_prompt)).nanmean(1)
