"""Real clips to compare with, drawn from a dataset of captioned videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import Rng
from fewstep.data.base import DataError
from fewstep.data.clips import clips_of
from fewstep.data.keep import Keep
from fewstep.data.layouts import Item, LayoutName
from fewstep.data.listing import open_listing
from fewstep.data.order import draw_indices
from fewstep.data.video import Clip, ClipError, Cut, to_floats
from fewstep.evaluate.cases import TrueClips


@dataclass(frozen=True, kw_only=True)
class RealClips:
    """Captioned videos: a folder, a table or archives (see `data.read_listing`)."""

    path: str
    stride: int = 4
    """Take every N-th frame of the file. WebVid has about 30 frames per second; AnimateDiff generates 8."""
    layout: LayoutName = "plain"
    """Layout of the dataset on disk, see `fewstep.data.layouts`."""
    root: str = ""
    """Folder that video names are relative to; empty: `path`, or the folder that contains it."""

    def draw(self, count: int, num_frames: int, size: tuple[int, int], seed: int) -> Drawn:
        """Draw `count` videos at random, and a second set of `count` if there are enough. DataError if there are too few.

        A clip is the first frames of a video, scaled to cover the models' `size` (height, width) and cropped at the centre.
        From there on, real and generated clips are processed in the same way. Every file is decoded once here, so that the
        caption of an unreadable file is not used as a prompt.
        """
        listing = open_listing(self.path, self.layout, self.root)
        cut = Cut(num_frames=num_frames, height=size[0], width=size[1], stride=self.stride)
        usable: list[Item] = []
        skipped: list[str] = []
        for step in range(len(listing)):
            item = listing[draw_indices(len(listing), 1, Rng(seed, step=step))[0]]
            if len(usable) == 2 * count:
                break
            try:
                _first(item, cut)
                usable.append(item)
            except ClipError as error:
                skipped.append(f"{item.name}: {error}")
        if len(usable) < count:
            why = "; ".join(skipped[:3])
            raise DataError(
                f"{self.path}: {len(usable)} videos have {num_frames} frames at stride {self.stride}, and {count} are needed"
                f"{f' ({why})' if why else ''}; ask for fewer prompts or give more videos"
            )
        return Drawn(
            tuple(usable), count, cut, len(skipped), f"{count} real clips of {self.path}, stride {self.stride}"
        )


@dataclass(frozen=True)
class Drawn(TrueClips):
    """One set of `count` real clips, or two."""

    kind: ClassVar[str] = "real clips"
    batch: ClassVar[int] = 4  # large pictures

    items: tuple[Item, ...]
    count: int
    cut: Cut
    skipped: int
    """Number of videos that were missing, damaged or too short."""
    name: str
    asked: bool = True
    """Whether the captions of the first set are the prompts."""

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(item.caption for item in self.items[: self.count])

    @property
    def sets(self) -> int:
        return len(self.items) // self.count

    @property
    def judged(self) -> int | None:
        return 0 if self.asked else None

    def draw(self, which: int, spans: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        mine = self.items[which * self.count : (which + 1) * self.count]
        for first, last in spans:
            yield to_floats(torch.stack([_first(item, self.cut).frames for item in mine[first:last]]))


def _first(item: Item, cut: Cut) -> Clip:
    return next(clips_of(item, cut, Keep()))
