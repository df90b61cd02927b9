"""How near to the sharp clips of the built-in world do students come that see them in a low resolution?

    python bench/upscaling.py runs/upscaling/2-pixels/student runs/flash_vsr/2-scores/student --picture runs/upscaling.gif

Each student makes the same clips sharp in one step, without a prompt and with the clip's own. Beside them: the low clips scaled
up (`bicubic`), these through the autoencoder, which is what the students begin with, and the sharp clips through it, which is the
most that can be had. PSNR in dB and sharpness relative to the rendered clips, both with 95 % intervals over clips; all attributes
right, as the checker reads them; Frechet distance to the rendered clips. With a prompt a student knows shape and colour, so only
without one does its accuracy say what it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional, arg

from fewstep.core import Rng
from fewstep.core.bounds import Bounds, Count, require_bounds
from fewstep.core.pixels import covering
from fewstep.data.degradation import Degradation
from fewstep.evaluate.features.extractors import FeatureMap, feature_map
from fewstep.evaluate.page.animate import grid_gif
from fewstep.metrics import frechet, mean_interval, psnr, ratio_of_means, sharpness
from fewstep.metrics.statistics import ratio_interval
from fewstep.models import VideoModel
from fewstep.models.videos import video_of
from fewstep.world.checker import Checker
from fewstep.world.grammar import Scene, describe, sample_scenes
from fewstep.world.renderer import CANVAS, Variation, render
from measuring import write

SHOWN = 4
"""Clips in the picture."""
SIZE = (CANVAS, CANVAS)
TOLD = ", with prompt"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Students and clips."""

    students: Positional[Annotated[tuple[str, ...], arg(metavar="STUDENT")]] = ()
    clips: Annotated[int, Bounds(2, 10**6)] = 96
    at_once: Count = 16
    low: Degradation = Degradation(factor=4, blur=0.5, noise=0.05)
    """How the low clips are made; of the recipes `world/upscaling` and its kin."""
    seed: int = 1000
    picture: Path | None = None
    """GIF of the first clips side by side; students are numbered in their order."""

    def __post_init__(self) -> None:
        require_bounds(self)


@dataclass(frozen=True)
class Clips:
    """Rendered clips and what is seen of them."""

    scenes: list[Scene]
    sharp: Tensor
    """`[B, 3, F, 32, 32]` in [-1, 1]; `low` is smaller."""
    low: Tensor
    features: FeatureMap

    @classmethod
    def of(cls, case: Case) -> Clips:
        dice = torch.Generator().manual_seed(case.seed)
        scenes, variation = sample_scenes(case.clips, dice), Variation.sample(case.clips, dice)
        sharp = render(scenes, variation, 16)
        return cls(scenes, sharp, case.low(sharp, Rng(case.seed)), feature_map("auto", SIZE, sharp.device))

    def made(self, students: Mapping[str, VideoModel], case: Case) -> Iterator[tuple[str, Tensor]]:
        """Clips `[B, 3, F, 32, 32]` by the name of who made them."""
        codec = VideoModel.from_pretrained("world").codec
        scaled = covering(self.low, SIZE)
        yield "bicubic", scaled

        def through(clips: Tensor) -> Tensor:
            return codec.decode(codec.encode(clips))

        yield "bicubic, encoded", parts(through, case.at_once, scaled)
        for name, student in students.items():
            for told in (False, True):
                prompts = [describe(scene) if told else "" for scene in self.scenes]
                yield name + (TOLD if told else ""), torch.cat([
                    student(prompts[i : i + case.at_once], video=video_of(student, self.low[i : i + case.at_once]), seed=i)
                    for i in range(0, case.clips, case.at_once)
                ])  # fmt: skip
        yield "sharp, encoded", parts(through, case.at_once, self.sharp)

    @cached_property
    def own(self) -> tuple[Tensor, Tensor]:
        """Sharpness and features of the rendered clips."""
        return sharpness(self.sharp), self.features.map(self.sharp)

    def figures(self, clips: Tensor) -> dict[str, Any]:
        near, fine, (rendered, features) = psnr(clips, self.sharp), sharpness(clips), self.own
        return {
            "psnr": thousandths(float(near.mean()), *mean_interval(near)),
            "sharpness": thousandths(ratio_of_means(fine, rendered), *ratio_interval(fine, rendered)),
            "accuracy": round(Checker().score(clips, self.scenes).accuracy()["all"], 3),
            "distance": round(frechet(self.features.map(clips), features), 2),
        }  # fmt: skip


def parts(fn: Callable[[Tensor], Tensor], size: int, clips: Tensor) -> Tensor:
    return torch.cat([fn(part) for part in clips.split(size)])


def thousandths(*values: float) -> list[float]:
    """A figure, and the ends of its interval."""
    return [round(value, 3) for value in values]


def opened(name: str) -> VideoModel:
    """ValueError for a model that begins with noise, and would not look at the low clip."""
    model = VideoModel.from_pretrained(name)
    if model.card.contract.grid.video_noise is None:
        raise ValueError(f"{name} makes clips from noise; give students that begin with a video (rollout: FromLow)")
    return model


@torch.no_grad()
def measure(case: Case) -> dict[str, Any]:
    students = {name: opened(name) for name in case.students}
    labels = {name + told: f"{i}{told}" for i, name in enumerate(students, 1) for told in ("", TOLD)}
    clips, found = Clips.of(case), dict[str, Any]()
    columns = {"rendered": clips.sharp[:SHOWN]}
    for name, made in clips.made(students, case):
        made = made.clamp(-1, 1)
        found[name], columns[labels.get(name, name)] = clips.figures(made), made[:SHOWN]
        print(name, found[name], flush=True)
    if case.picture is not None:
        print(grid_gif(case.picture, columns))
    return found


def main() -> None:
    case = tyro.cli(Case)
    print(write("upscaling", case, measure(case)))


if __name__ == "__main__":
    main()
