"""Clips of the steered world as training data: what is told of every frame comes with the condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core import Batch, Rng
from fewstep.core.bounds import Natural, Size
from fewstep.data.base import Data, Source
from fewstep.data.texts import Texts
from fewstep.models import Card, VideoModel
from fewstep.streaming.control import of_latents
from fewstep.world.actions import PACE, camera_moves, headings, paces, random_beat, random_cameras, random_keys, walked
from fewstep.world.data import WorldClips, encode, latent_shape
from fewstep.world.grammar import Scene, sample_scenes
from fewstep.world.renderer import Variation, render_track, velocity

Steered = Literal["keys", "beat", "camera"]


@dataclass(frozen=True)
class Told:
    """What is told of the frames of clips, each `[B, F, ...]`; None: nothing."""

    keys: Tensor | None = None
    beat: Tensor | None = None
    pose: Tensor | None = None

    @classmethod
    def sample(cls, signals: Sequence[Steered], clips: int, frames: int, generator: torch.Generator) -> Told:
        """Random keys, beats and cameras."""
        return cls(
            keys=random_keys(clips, frames, generator) if "keys" in signals else None,
            beat=random_beat(clips, frames, generator) if "beat" in signals else None,
            pose=random_cameras(clips, frames, generator) if "camera" in signals else None,
        )

    def moves(self, scenes: Sequence[Scene], variation: Variation, frames: int) -> Tensor:
        """What the object moves on the screen from the frame before to each, `[B, F, 2]` in pixels."""
        if self.keys is None and self.beat is None:
            moves = velocity(scenes, variation)[:, None].expand(-1, frames, -1)
        else:
            moves = headings(scenes, self.keys, frames) * (PACE if self.beat is None else paces(self.beat))
        return moves if self.pose is None else moves - PACE * camera_moves(self.pose)

    def extra(self, ends: Sequence[int], back: int = 0, ahead: int = 0) -> Mapping[str, Tensor]:
        """Conditions by name, for latent frames that are decoded to so many frames; of the beat with those before and after
        (`of_latents`)."""
        camera = None if self.pose is None else camera_moves(self.pose)
        given = {"keys": self.keys, "camera": camera, "pose": self.pose}
        made = {name: of_latents(numbers, ends) for name, numbers in given.items() if numbers is not None}
        return made if self.beat is None else made | {"beat": of_latents(self.beat, ends, back, ahead)}


def sentence(scene: Scene, signals: Sequence[Steered]) -> str:
    """The prompt of a steered clip: it does not say what the signals say.

    >>> from fewstep.world.grammar import parse
    >>> sentence(parse("a small red ring moves slowly left over a navy background"), ["keys"])
    'a small red ring over a navy background'
    """
    speed = "" if "beat" in signals else f" {scene.speed}"
    motion = "" if "keys" in signals else f" moves{speed} {scene.direction}"
    return f"a {scene.size} {scene.colour} {scene.shape}{motion} over a {scene.background} background"


@dataclass(frozen=True, kw_only=True)
class WorldActions(Data):
    """An endless stream of rendered clips that obey keys, a beat or a camera, at random. Needs no files.

    The conditions have `keys` `[B, F, 4]` (left, right, up, down), `beat` `[B, F, 1]`, and of a camera its moves, `camera`
    `[B, F, 2]`, and its `pose` `[B, F, 6]`, of every latent frame (`FrameInput` reads them).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "x0", "frames"})

    num_frames: Size = 16
    """Frames of the clips; the model's own clips may be shorter."""
    signals: tuple[Steered, ...] = ("keys",)
    """What steers the clips. The prompt says of the motion only what no signal says."""
    back: Natural = 0
    """Frames before its own whose beat a frame is told of, too: `back` of the network's `FrameInput`."""
    ahead: Natural = 0
    """Frames after its own, likewise."""

    def __post_init__(self) -> None:
        if not self.signals or len(set(self.signals)) < len(self.signals):
            raise ValueError(
                f"signals: name at least one of keys, beat and camera, each once; got {list(self.signals)}"
            )
        if (self.back or self.ahead) and "beat" not in self.signals:
            raise ValueError(
                f"back and ahead are frames of the beat, and signals are {list(self.signals)}; leave them out"
            )

    def check_card(self, card: Card) -> None:
        WorldClips(num_frames=card.num_frames).check_card(card)

    def check(self, model: VideoModel) -> None:
        self.check_card(model.card)

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        return _Actions(self, model, needs)


class _Actions:
    """Renders new clips for every batch, as a function of the batch's random stream."""

    def __init__(self, data: WorldActions, model: VideoModel, needs: frozenset[str]) -> None:
        self.data, self.model, self.needs, self.texts = data, model, needs, Texts(model, needs)
        self.shape = latent_shape(model, data.num_frames)
        seen = model.clip_frames if "codec" in model.parts else int
        self.ends = [seen(count) for count in range(self.shape[1] + 1)]

    def batch(self, size: int, rng: Rng) -> Batch:
        data, generator = self.data, rng.local("actions")
        scenes, variation = sample_scenes(size, generator), Variation.sample(size, generator)
        told = Told.sample(data.signals, size, data.num_frames, generator)
        prompts = tuple(sentence(scene, data.signals) for scene in scenes)
        extra = {name: x.to(rng.device) for name, x in told.extra(self.ends, data.back, data.ahead).items()}
        frames = None
        if self.needs & {"frames", "x0"}:
            track = walked(variation.position, told.moves(scenes, variation, data.num_frames))
            frames = render_track(scenes, variation, track).to(rng.device)
        cond, uncond = (x.with_extra(extra, framewise=True) for x in self.texts(prompts, rng.device))
        return Batch(
            cond, uncond,
            latent_shape=self.shape,
            prompts=prompts,
            x0=encode(self.model, frames) if "x0" in self.needs and frames is not None else None,
            frames=frames if "frames" in self.needs else None,
        )  # fmt: skip
