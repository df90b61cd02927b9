"""What is asked and what is compared with: the prompts, their seeds, the true clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.world.grammar import Scene
from fewstep.world.renderer import Variation, render


@dataclass(frozen=True)
class Cases:
    """Every prompt is drawn with `seeds_per_prompt` seeds; clip `p * seeds_per_prompt + s` has the seed `first_seed` + that."""

    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...] | None
    """What each prompt means, where the world's grammar understands all of them and the clips have its size."""
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
            raise ValueError("these prompts have no scenes: they cannot be rendered or checked")
        return [scene for scene in self.scenes[first:last] for _ in range(self.seeds_per_prompt)]


def true_clips(scenes: Sequence[Scene], num_frames: int, generator: torch.Generator) -> Tensor:
    """One freshly rendered clip per scene, `[N, 3, F, H, W]`."""
    return render(scenes, Variation.sample(len(scenes), generator), num_frames)
