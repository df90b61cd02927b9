"""Clips of the built-in world as training data: prompts, pixels, latents and labels, rendered on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core import Batch, Rng
from fewstep.core.bounds import Natural, Size
from fewstep.data.base import Data, DataError, Source
from fewstep.data.clipped import Clipped
from fewstep.data.degradation import Degradation
from fewstep.data.images import require_text_alone
from fewstep.data.parts import Part
from fewstep.data.texts import Texts
from fewstep.models import Card, VideoModel
from fewstep.models.videos import cover_latents
from fewstep.world.grammar import Scene, describe, paraphrase, sample_scenes
from fewstep.world.parts import ByAttribute
from fewstep.world.renderer import CANVAS, Variation, render

AT_ONCE = 64
"""Number of clips rendered and encoded together."""


@dataclass(frozen=True, kw_only=True)
class WorldClips(Data):
    """An endless stream of rendered clips with English prompts. Needs no files.

    With `pool > 0`, that many clips are rendered and encoded when the run starts, and then reused, each moved along the torus
    by whole latent cells (encoding and moving commute). This is for long runs, where rendering would take longer than training.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "x0", "low", "frames", "labels"})

    num_frames: Size = 16
    pool: Natural = 0
    """Clips kept in memory as latents (8 kB each at 16 frames); 0: render new clips for every batch."""
    pool_seed: int = 0
    style: Literal["plain", "chalk", "neon"] = "plain"
    """Drawing style: filled shapes, as in the built-in teacher's training; light outlines; light outlines on black."""
    low: Degradation = Degradation()
    """How low-resolution clips are made of the rendered ones, for methods that read them."""
    part: Part | None = None
    """The part of the prompts that is used (MSD, 2410.23274), such as that of some shapes (`ByAttribute`); null: all."""

    def __post_init__(self) -> None:
        if self.part is not None and not isinstance(self.part.by, ByAttribute):
            raise ValueError(f"clips of the built-in world are divided ByAttribute, not {type(self.part.by).__name__}")

    def check_card(self, card: Card) -> None:
        require_text_alone(card, "WorldClips")
        if (card.height, card.width) != (CANVAS, CANVAS):
            raise DataError(
                f"the built-in world's clips are {CANVAS} x {CANVAS}, but model {card.name!r} makes {card.height} x "
                f"{card.width}; train it on your own data (Prompts, Latents, Videos). For a model made from scratch, write "
                f"model.height: {CANVAS} and model.width: {CANVAS}"
            )
        if self.num_frames != card.num_frames:
            raise DataError(
                f"data.num_frames is {self.num_frames}, but model {card.name!r} makes {card.num_frames} frames; "
                f"write data.num_frames: {card.num_frames}"
            )

    def check(self, model: VideoModel) -> None:
        self.check_card(model.card)

    def scenes(self, count: int, generator: torch.Generator) -> list[Scene]:
        """Draw scenes, uniform among those of the part."""
        if self.part is None:
            return sample_scenes(count, generator)
        kept: list[Scene] = []
        while len(kept) < count:
            drawn = sample_scenes(count, generator)
            kept += [scene for scene in drawn if self.part.by.part(describe(scene)) == self.part.index]
        return kept[:count]

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        if self.pool and needs & {"low", "frames", "labels"}:
            raise ValueError(
                "a pool keeps only latents of sharp clips, and this method needs low-resolution clips, frames or labels; write "
                "data.pool: 0"
            )
        if self.pool and "x0" in needs:
            return _Pool(self, model, Texts(model, needs))
        return _Stream(self, model, needs)


class _Stream:
    """Renders new clips for every batch, as a function of the batch's random stream."""

    def __init__(self, data: WorldClips, model: VideoModel, needs: frozenset[str]) -> None:
        self.data, self.model, self.needs, self.texts = data, model, needs, Texts(model, needs)

    def batch(self, size: int, rng: Rng) -> Batch:
        generator = rng.local("world")
        scenes = self.data.scenes(size, generator)
        prompts = tuple(paraphrase(scene, generator) for scene in scenes)
        frames = None
        if self.needs & {"frames", "x0", "low"}:
            frames = render(scenes, Variation.sample(size, generator), self.data.num_frames, style=self.data.style).to(
                rng.device
            )
        return Batch(
            *self.texts(prompts, rng.device),
            latent_shape=latent_shape(self.model, self.data.num_frames),
            prompts=prompts,
            x0=encode(self.model, frames) if "x0" in self.needs and frames is not None else None,
            low=self._low(frames, rng) if "low" in self.needs and frames is not None else None,
            frames=frames if "frames" in self.needs else None,
            labels=labels(scenes).to(rng.device) if "labels" in self.needs else None,
        )

    def _low(self, frames: Tensor, rng: Rng) -> Tensor:
        return cover_latents(self.model, self.data.low(frames, rng.fold("low")))


class _Pool:
    """A fixed set of encoded clips; a batch is a draw from it, each clip rolled by a random number of latent cells."""

    def __init__(self, data: WorldClips, model: VideoModel, texts: Texts) -> None:
        self.texts, self.shape = texts, latent_shape(model, data.num_frames)
        self.scenes: list[Scene] = []
        latents = []
        for start in range(0, data.pool, AT_ONCE):
            generator = Rng(data.pool_seed, step=start).local("pool")
            count = min(AT_ONCE, data.pool - start)
            scenes = data.scenes(count, generator)
            frames = render(scenes, Variation.sample(count, generator), data.num_frames, style=data.style).to(
                model.device
            )
            latents.append(encode(model, frames).half().cpu())
            self.scenes += scenes
        self.latents = torch.cat(latents)

    def batch(self, size: int, rng: Rng) -> Batch:
        generator = rng.local("pool")
        rows = torch.randint(len(self.scenes), (size,), generator=generator)
        height, width = self.shape[2:]
        shifts = torch.stack([torch.randint(n, (size,), generator=generator) for n in (height, width)], 1).tolist()
        x0 = torch.stack([self.latents[r].roll(shift, (-2, -1)) for r, shift in zip(rows.tolist(), shifts)])
        prompts = tuple(paraphrase(self.scenes[r], generator) for r in rows.tolist())
        return Batch(
            *self.texts(prompts, rng.device),
            latent_shape=self.shape,
            prompts=prompts,
            x0=x0.float().to(rng.device),
        )


def world_clips(model: VideoModel, count: int, seed: int) -> Clipped:
    """`count` rendered clips with prompts, encoded when they are read, for trajectories of a teacher that streams
    (`data.make_pairs`). DataError for a model of another size."""
    data = WorldClips(num_frames=model.card.num_frames)
    data.check(model)
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(count, generator)
    captions = tuple(paraphrase(scene, generator) for scene in scenes)

    def latents(rows: Sequence[int]) -> Tensor:
        own = [Variation.sample(1, torch.Generator().manual_seed(seed + 1 + row)) for row in rows]
        clips = [render([scenes[row]], one, data.num_frames) for row, one in zip(rows, own, strict=True)]
        return torch.cat([encode(model, clip.to(model.device)).cpu() for clip in clips])

    return Clipped(captions, latents, f"world clips of seed {seed}")


def encode(model: VideoModel, frames: Tensor) -> Tensor:
    """Latents of pixel clips, without gradient."""
    with torch.no_grad():
        return model.codec.encode(frames)


def labels(scenes: Sequence[Scene]) -> Tensor:
    """Attribute indices `[B, 6]`."""
    return torch.tensor([scene.to_indices() for scene in scenes])


def latent_shape(model: VideoModel, num_frames: int) -> tuple[int, int, int, int]:
    """Shape of the latents of a clip; without a codec, of a clip of nothing."""
    return model.latent_shape(num_frames) if "codec" in model.parts else (0, num_frames, 0, 0)
