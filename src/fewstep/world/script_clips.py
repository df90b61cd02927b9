"""Clips of scripts as training data: the prompt changes on the way, at a frame that the batch knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fewstep.core import Batch, Later, Rng
from fewstep.core.bounds import Size
from fewstep.data.base import Data, DataError, Source
from fewstep.data.texts import Texts
from fewstep.models import Card, VideoModel
from fewstep.world.data import WorldClips, encode, latent_shape
from fewstep.world.grammar import ATTRIBUTES, Scene, paraphrase, sample_scenes
from fewstep.world.renderer import Variation
from fewstep.world.scripts import Script, render_script


@dataclass(frozen=True, kw_only=True)
class WorldScripts(Data):
    """An endless stream of rendered clips, of any length, whose prompt changes once. Needs no files.

    A batch has the first prompts, and in `later` the second ones with the latent frame from which they hold: one frame for the
    whole batch, a random multiple of `every`.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "x0", "frames", "later"})

    num_frames: Size = 32
    """Frames of the clips; the model's own clips may be shorter."""
    every: Size = 4
    """The prompt changes at a multiple of so many frames: the chunk of the student."""
    changes: tuple[str, ...] = ("direction", "speed")
    """Attributes that the second prompt draws anew; the others stay."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.changes if name not in ATTRIBUTES]:
            raise ValueError(f"changes names {', '.join(unknown)}; the attributes are {', '.join(ATTRIBUTES)}")
        if not self.changes or self.num_frames <= self.every:
            raise ValueError(
                f"a prompt must change after {self.every} frames of {self.num_frames}, in at least one attribute; give longer "
                "clips, a smaller data.every, or data.changes"
            )

    def check_card(self, card: Card) -> None:
        WorldClips(num_frames=card.num_frames).check_card(card)
        if "codec" in card.parts and card.parts["codec"].type != "FrameAutoencoder":
            raise DataError("WorldScripts needs a codec with one latent frame per frame, as the built-in model's")

    def check(self, model: VideoModel) -> None:
        self.check_card(model.card)

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        return _Scripts(self, model, needs)

    def script(self, scene: Scene, frame: int, generator: torch.Generator) -> Script:
        """A script that begins with this scene and changes at a frame."""
        while True:  # until the draw differs: seldom more than once
            (other,) = sample_scenes(1, generator)
            later = replace(scene, **{name: getattr(other, name) for name in self.changes})
            if later != scene:
                return Script((scene, later), (0, frame))


class _Scripts:
    """Renders new clips for every batch, as a function of the batch's random stream."""

    def __init__(self, data: WorldScripts, model: VideoModel, needs: frozenset[str]) -> None:
        self.data, self.model, self.needs, self.texts = data, model, needs, Texts(model, needs)

    def batch(self, size: int, rng: Rng) -> Batch:
        data = self.data
        shared = rng.shared("switch")  # all processes switch at one frame
        frame = data.every * int(torch.randint(1, -(-data.num_frames // data.every), (1,), generator=shared))
        generator = rng.local("scripts")
        scripts = [data.script(scene, frame, generator) for scene in sample_scenes(size, generator)]
        prompts = tuple(paraphrase(script.scenes[0], generator) for script in scripts)
        second = tuple(paraphrase(script.scenes[1], generator) for script in scripts)
        cond, uncond = self.texts(prompts, rng.device)
        frames = None
        if self.needs & {"frames", "x0"}:
            frames = render_script(scripts, Variation.sample(size, generator), data.num_frames).to(rng.device)
        return Batch(
            cond, uncond,
            latent_shape=latent_shape(self.model, data.num_frames),
            prompts=prompts,
            x0=encode(self.model, frames) if "x0" in self.needs and frames is not None else None,
            frames=frames if "frames" in self.needs else None,
            later=Later(self.texts(second, rng.device)[0], frame, second) if "later" in self.needs else None,
        )  # fmt: skip
