"""Pictures during a run: student next to teacher with the same prompts and seeds, or clips next to their reconstructions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate, pad

from fewstep.core import Rng
from fewstep.core.call import Sharing
from fewstep.core.pixels import to_uint8
from fewstep.data.base import Source
from fewstep.diffusion.times import in_steps
from fewstep.models import VideoModel
from fewstep.models.images import Images, images_in
from fewstep.models.videos import video_for

SHOWN_FRAMES = 6
CLIPS = 4
ROW = 96
"""Approximate height of a frame in the picture, in pixels."""
GAP = 4
HEAD = 20
"""Height of the line with the column names, in pixels."""


@dataclass(frozen=True)
class Preview:
    """Prompts, and the teacher's clips for them, which are sampled once, for the first picture."""

    teacher: VideoModel
    prompts: tuple[str, ...]
    images: Images | None
    """First frames (and last, if any) for an image-to-video model; None for other models."""
    low: Tensor | None = None
    """Latents of low-resolution clips, for students that make them sharp; None: the data give none."""
    shared: Sharing | None = None
    """Processes that generate every clip together."""

    @classmethod
    def of(cls, teacher: VideoModel, source: Source, rng: Rng, shared: Sharing | None = None) -> Preview:
        """A preview with prompts from the run's data; a resumed run gets the same ones. ValueError if there are none."""
        batch = source.batch(CLIPS, rng.fold("preview"))
        if not batch.prompts:
            raise ValueError(
                "settings.preview_every needs prompts, and this run's data have none; write preview_every: 0"
            )
        return cls(teacher, batch.prompts, images_in(teacher, batch.cond), batch.low, shared)

    def draw(self, student: VideoModel) -> Image.Image:
        """One row per prompt. Columns: the student at its smallest step count, at its largest, and the teacher."""
        counts = student.card.contract.counts
        shown = sorted({counts[0], counts[-1]})
        columns = [self._clips(student, n) for n in shown]
        now, before = ("student", "teacher") if student.card.role == "student" else ("now", "before training")
        names = [f"{now}, {in_steps(n)}" for n in shown] + [f"{before}, {in_steps(self.teacher.card.contract.steps)}"]
        return labelled(Image.fromarray(sheet([*columns, self._teacher_clips])), names)

    @cached_property
    def _teacher_clips(self) -> Tensor:
        return self._clips(self.teacher)

    def _clips(self, model: VideoModel, steps: int | None = None) -> Tensor:
        given = {"image": self.images, "video": video_for(model, self.low)}
        return model(self.prompts, **given, num_inference_steps=steps, shared=self.shared).cpu()


@dataclass(frozen=True)
class Reconstructions:
    """Clips of the run's data, drawn next to what a codec in training makes of them."""

    frames: Tensor
    """Clips `[B, 3, F, H, W]`."""

    @classmethod
    def of(cls, source: Source, rng: Rng) -> Reconstructions:
        """The same clips in a resumed run."""
        return cls(source.batch(CLIPS, rng.fold("preview")).require("frames"))

    @torch.no_grad()
    def draw(self, student: VideoModel) -> Image.Image:
        """One row per clip. Columns: the clip, and the clip encoded and decoded again."""
        made = student.codec.decode(student.codec.encode(self.frames))
        return labelled(Image.fromarray(sheet([self.frames.cpu(), made.cpu()])), ["clip", "reconstruction"])


def sheet(columns: list[Tensor]) -> np.ndarray:
    """Columns of clips `[B, 3, F, H, W]` as one uint8 picture `[H', W', 3]`, frames from left to right."""
    strips = []
    for clips in columns:
        frames = torch.linspace(0, clips.shape[2] - 1, min(SHOWN_FRAMES, clips.shape[2])).long()
        shown = _resized(clips[:, :, frames].transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))  # B F 3 H W
        strips.append(pad(shown.permute(0, 3, 1, 4, 2).flatten(2, 3), (0, 0, 0, GAP), value=1.0))  # B H (F W + gap) 3
    sheet = torch.cat(strips, dim=2).flatten(0, 1)
    return to_uint8(sheet).cpu().numpy()


def labelled(picture: Image.Image, names: list[str]) -> Image.Image:
    """The picture with a name above each of its columns, which have equal widths."""
    made = Image.new("RGB", (picture.width, picture.height + HEAD), "white")
    made.paste(picture, (0, HEAD))
    pen = ImageDraw.Draw(made)
    for i, name in enumerate(names):
        pen.text((i * picture.width // len(names) + GAP, GAP), name, fill="black")
    return made


def _resized(images: Tensor) -> Tensor:
    """Images `[N, 3, H, W]` about `ROW` pixels high: small ones are enlarged by a whole factor, large ones are reduced."""
    height = images.shape[-2]
    if height <= ROW:
        return images.repeat_interleave(ROW // height, -2).repeat_interleave(ROW // height, -1)
    return interpolate(images, scale_factor=ROW / height, mode="area")
