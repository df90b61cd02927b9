"""Turn clips into figures batch by batch, so that a large set need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.finite import require_finite
from fewstep.core.pixels import to_uint8
from fewstep.evaluate.cases import Cases
from fewstep.evaluate.features.extractors import FeatureMap
from fewstep.metrics import diversity, flicker, motion, shuffled
from fewstep.world.checker import Checker

Judge = Callable[[Tensor, int, int], Mapping[str, Tensor]]
"""Scores the clips `[n, 3, F, H, W]` of prompts `first` up to `last`: one value per clip, by name of a `Measured` field."""


def checked(cases: Cases) -> Judge:
    """The world's checker: `right` and `abstained`."""

    def judge(frames: Tensor, first: int, last: int) -> Mapping[str, Tensor]:
        score = Checker().score(frames, cases.scene_per_clip(first, last))
        return {"right": score.right, "abstained": score.abstained}

    return judge


class Meter:
    """Collects the figures of one set of clips, a batch at a time."""

    def __init__(self, features: FeatureMap, cases: Cases, judges: Sequence[Judge] = (), keep: int = 0) -> None:
        self._features = features
        self._cases = cases
        self._judges = judges
        self._keep = keep
        self._parts: dict[str, list[Tensor]] = {}
        self._shuffle = torch.Generator().manual_seed(cases.first_seed)

    def add(self, frames: Tensor, first: int, last: int) -> None:
        """Measure the clips `[n, 3, F, H, W]` in [-1, 1] of prompts `first` up to `last`, ordered by prompt."""
        x, seeds = frames.float(), self._cases.seeds_per_prompt
        require_finite(x, f"clips of prompts {first} to {last - 1}")
        self._put("features", self._features.map(x))
        self._put("shuffled", self._features.map(shuffled(x, self._shuffle)))
        if x.shape[2] > 1:
            self._put("motion", motion(x))
            self._put("flicker", flicker(x))
        if seeds > 1:
            self._put("diversity", diversity(x.unflatten(0, (-1, seeds))))
        for judge in self._judges:
            for name, scores in judge(x, first, last).items():
                self._put(name, scores)
        if first < self._keep:
            self._put("shown", to_uint8(x[::seeds][: self._keep - first]))

    def _put(self, name: str, value: Tensor) -> None:
        self._parts.setdefault(name, []).append(value.detach().cpu())

    def done(self, seconds: float = 0.0) -> Measured:
        """All figures so far; `seconds` is the sampling time per clip."""
        whole = {name: torch.cat(parts) for name, parts in self._parts.items()}
        return Measured(
            features=whole["features"],
            shuffled=whole["shuffled"],
            motion=whole.get("motion"),
            flicker=whole.get("flicker"),
            diversity=whole.get("diversity"),
            right=whole.get("right"),
            abstained=whole.get("abstained"),
            clip_score=whole.get("clip_score"),
            shown=whole.get("shown"),
            seconds=seconds / len(self._cases),
        )


@dataclass(frozen=True)
class Measured:
    """Figures of N clips of P prompts, ordered by prompt."""

    features: Tensor
    """Features of the clips, `[N, D]`."""
    shuffled: Tensor
    """Features of the same clips with their frames in random order, `[N, D]`."""
    motion: Tensor | None
    """Motion of each clip, `[N]`; `flicker` has the same shape. None for pictures, which are clips of one frame."""
    flicker: Tensor | None
    diversity: Tensor | None
    """Diversity of each prompt, `[P]`; None with one seed per prompt."""
    right: Tensor | None
    """Whether each attribute is right: bool `[N, 6]` in the order of `world.grammar.ATTRIBUTES`; `abstained` has the same
    shape. None if the prompts cannot be checked."""
    abstained: Tensor | None
    clip_score: Tensor | None
    """CLIPScore of each clip, `[N]`; None without a CLIP model."""
    shown: Tensor | None
    """First clip of the first prompts, uint8 `[K, 3, F, H, W]`."""
    seconds: float
    """Seconds per clip at the suite's batch size, from text to latents."""

    def by_prompt(self, name: str, seeds: int) -> Tensor:
        """Mean over the seeds of each prompt, `[P]`, of `motion`, `flicker` or `clip_score`; for `right`, the share of clips
        with every attribute right.

        `attributes` gives the share of right clips for each attribute, `[P, 6]`.
        """
        values = self.right if name == "attributes" else getattr(self, name)
        if values is None:
            raise ValueError(f"{name} was not measured for these clips; evaluate with the suite that measures it")
        values = values.all(1) if name == "right" else values
        return values.double().unflatten(0, (-1, seeds)).mean(1)
