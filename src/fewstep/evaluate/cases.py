"""The test cases: prompts, their seeds, and the true clips to compare with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.world.grammar import Scene
from fewstep.world.renderer import Variation, render

SEED_STRIDE = 1_000_003  # so that two suites with neighbouring seeds have different clips


@dataclass(frozen=True)
class Cases:
    """Prompts with `seeds_per_prompt` clips each; clip i = `p * seeds_per_prompt + s` has the seed `first_seed + i`."""

    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...] | None
    """Scene of each prompt; None unless the world's grammar understands all prompts and the clips have the world's size."""
    seeds_per_prompt: int
    first_seed: int

    def __len__(self) -> int:
        return len(self.prompts) * self.seeds_per_prompt

    def seeds(self, prompt: int) -> tuple[int, ...]:
        start = self.first_seed + prompt * self.seeds_per_prompt
        return tuple(range(start, start + self.seeds_per_prompt))

    def scene_per_clip(self, first: int, last: int) -> list[Scene]:
        """Scenes of the clips of prompts `first` up to `last`."""
        if self.scenes is None:
            raise ValueError("these prompts are not of the built-in world: they cannot be rendered or checked")
        return [scene for scene in self.scenes[first:last] for _ in range(self.seeds_per_prompt)]


class TrueClips(ABC):
    """True clips (rendered or real) in one or two independent sets, for Frechet distances and their noise floor."""

    kind: ClassVar[str]
    """Name of the report's row."""
    batch: ClassVar[int]
    """Clips drawn and measured at once."""
    name: str
    """Name that the report gives to the set."""

    @property
    @abstractmethod
    def sets(self) -> int:
        """1 or 2. Distances are measured to the first set; the second set, measured like a model, gives the floor."""

    @property
    @abstractmethod
    def judged(self) -> int | None:
        """The set that is also scored against the prompts, like a model; None if no set belongs to the prompts."""

    @abstractmethod
    def draw(self, which: int, spans: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        """Clips `[n, 3, F, H, W]` of one set, for one span `(first, last)` of prompts after another."""


@dataclass(frozen=True)
class Rendered(TrueClips):
    """Newly rendered clips of the prompts' scenes."""

    kind: ClassVar[str] = "renderer"
    batch: ClassVar[int] = 64  # which clips are drawn depends on it

    cases: Cases
    num_frames: int
    name: str = "freshly rendered clips of the same prompts"

    @property
    def sets(self) -> int:
        return 2

    @property
    def judged(self) -> int | None:
        return 1

    def draw(self, which: int, spans: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.cases.first_seed + SEED_STRIDE // 2 + which)
        for first, last in spans:
            yield true_clips(self.cases.scene_per_clip(first, last), self.num_frames, generator)


def true_clips(scenes: Sequence[Scene], num_frames: int, generator: torch.Generator) -> Tensor:
    """One freshly rendered clip per scene, `[N, 3, F, H, W]`."""
    return render(scenes, Variation.sample(len(scenes), generator), num_frames)
