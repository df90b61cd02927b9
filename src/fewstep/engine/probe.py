"""Probe: a cheap score of the student during training, and the rule that picks the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.bounds import Amount, Count, require_bounds
from fewstep.metrics import diversity, frechet
from fewstep.models import Card, VideoModel
from fewstep.models.bundle import read_card
from fewstep.world.checker import Checker
from fewstep.world.grammar import Scene, paraphrase, sample_scenes
from fewstep.world.renderer import CANVAS, Variation, render


class Probe(Protocol):
    """Scores the current student every `every` iterations and at the last one."""

    @property
    def every(self) -> int: ...
    def check(self, card: Card, part: str) -> None:
        """Refuse (ValueError) a run that the probe cannot judge: `card` is the run's model, `part` what it trains."""
        ...

    def __call__(self, student: VideoModel) -> dict[str, float]: ...
    def better(self, scores: dict[str, float], best: dict[str, float]) -> bool: ...


def merit(accuracy: float, distance: float, weight: float = 0.1) -> float:
    """`accuracy - weight * log(distance)` of a student at one number of steps."""
    return accuracy - weight * math.log(max(distance, 1e-6))


@dataclass(frozen=True, kw_only=True)
class WorldProbe:
    """Prompt accuracy, Frechet distance and diversity on fixed prompts and seeds of the built-in world.

    The rule: the largest mean over step counts of `accuracy - frechet_weight * log(distance)`. Accuracy alone would choose
    mode-seeking students, whose accuracy rises while distance and diversity get worse; the logarithm makes a factor in
    distance comparable with a share of accuracy.
    """

    every: Count = 25
    prompts: Count = 48
    """Number of prompts; each is sampled with two seeds."""
    steps: tuple[Count, ...] = ()
    """Step counts to judge; empty: all that the student serves."""
    frechet_weight: Amount = 0.1
    seed: int = 101
    features: str = "world/features"

    def __post_init__(self) -> None:
        require_bounds(self)

    @property
    def clips(self) -> int:
        """Number of clips that are made at once."""
        return 2 * self.prompts

    def check(self, card: Card, part: str) -> None:
        if part != "denoiser":
            raise ValueError(f"probe: WorldProbe judges clips, and this run trains the {part}; leave probe out")
        if (card.height, card.width) != (CANVAS, CANVAS):
            raise ValueError(
                f"probe: WorldProbe judges clips of the built-in world, {CANVAS} x {CANVAS}, and model {card.name!r} "
                f"makes {card.height} x {card.width}; leave probe out"
            )
        if "features" not in (eyes := read_card(self.features)).parts:
            raise ValueError(f"probe.features: {self.features} has no features; it has {', '.join(eyes.parts)}")

    def __call__(self, student: VideoModel) -> dict[str, float]:
        counts = self.steps or student.card.contract.counts
        scores: dict[str, float] = {}
        rule = 0.0
        for count in counts:
            clips = student(self._texts, num_inference_steps=count, seed=self.seed, force=True).cpu()
            accuracy = Checker().score(clips, self._scenes).accuracy()["all"]
            features = self._features(clips)
            distance = frechet(features, _reference(self, clips.shape[2]))
            scores |= {f"accuracy@{count}": accuracy, f"frechet@{count}": distance}
            scores[f"diversity@{count}"] = float(diversity(clips.unflatten(0, (-1, 2))).mean())
            rule += merit(accuracy, distance, self.frechet_weight) / len(counts)
        return {"rule": rule, **scores}

    def better(self, scores: dict[str, float], best: dict[str, float]) -> bool:
        return not best or scores["rule"] > best["rule"]

    @cached_property
    def _scenes(self) -> Sequence[Scene]:
        scenes = sample_scenes(self.prompts, torch.Generator().manual_seed(self.seed))
        return [scene for scene in scenes for _ in range(2)]

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        generator = torch.Generator().manual_seed(self.seed)
        return tuple(text for scene in self._scenes[::2] for text in [paraphrase(scene, generator)] * 2)

    @cached_property
    def _encoder(self) -> VideoModel:
        return VideoModel.from_pretrained(self.features)

    @torch.inference_mode()
    def _features(self, clips: Tensor) -> Tensor:
        return self._encoder.part("features")(clips)


@lru_cache(maxsize=4)
def _reference(probe: WorldProbe, num_frames: int) -> Tensor:
    """Features of rendered clips of the probe's scenes, with as many frames as the clips they are compared with."""
    generator = torch.Generator().manual_seed(probe.seed + 1)
    scenes = [scene for scene in probe._scenes for _ in range(2)]
    return probe._features(render(scenes, Variation.sample(len(scenes), generator), num_frames))
