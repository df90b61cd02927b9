"""Video files as training data, for networks that see pixels."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.core import Batch, Rng
from fewstep.core.atomic import replacing
from fewstep.core.build import digest
from fewstep.data.base import Data, DataError, Source, require
from fewstep.data.layouts import Item, Layout
from fewstep.data.listing import read_listing
from fewstep.data.order import draw_indices
from fewstep.data.texts import Texts
from fewstep.data.video import ClipError, Cut, read_clips, to_floats
from fewstep.models.bundle import Card, VideoModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Videos(Data):
    """Clips cut out of captioned video files (see `read_listing`), decoded once when opened.

    Files that are absent, damaged or too short are skipped with a warning; DataError if none is left.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "frames"})

    path: str
    num_frames: int = 16
    height: int = 64
    width: int = 64
    stride: int = 1
    clips_per_video: int = 1
    """At most this many per file, without overlap; 0 = as many as fit."""
    layout: Layout = "plain"
    """How the dataset lies on disk, see `fewstep.data.layouts`."""
    root: str = ""
    """Folder that the names of the videos start from; empty is `path`, or the folder it is in."""
    cache: str = ""
    """Folder for decoded clips, one .npy file per video, read when drawn. Empty keeps them in memory, as uint8."""

    @property
    def cut(self) -> Cut:
        return Cut(
            num_frames=self.num_frames, height=self.height, width=self.width,
            stride=self.stride, clips_per_video=self.clips_per_video,
        )  # fmt: skip

    def __post_init__(self) -> None:
        _ = self.cut  # its own checks

    def check_card(self, card: Card) -> None:
        read_listing(self.path, self.layout, self.root)
        mine, its = (self.num_frames, self.height, self.width), (card.num_frames, card.height, card.width)
        if mine != its:
            raise DataError(
                f"data.num_frames, height, width are {mine}, but model {card.name!r} says {its}; make them equal, "
                "so that fewstep prepare cuts clips as this model saw them"
            )

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        require(self, needs)
        texts = Texts(model, needs)
        shape = (3, self.cut.num_frames, self.cut.height, self.cut.width)
        if "codec" in model.parts:
            shape = model.codec.latent_shape(*shape[1:])
        return _VideoSource(self._decode(), texts, shape)

    def _decode(self) -> tuple[tuple[NDArray[np.uint8], str], ...]:
        """Every clip `[F, H, W, 3]` with its caption."""
        clips: list[tuple[NDArray[np.uint8], str]] = []
        skipped: list[str] = []
        for item in read_listing(self.path, self.layout, self.root):
            try:
                clips += [(clip, item.caption) for clip in self._clips(item)]
            except ClipError as error:
                skipped.append(f"{item.name} skipped: {error}")
                log.warning("%s", skipped[-1])
        if not clips:
            raise DataError(f"{self.path}: no video gave a clip ({'; '.join(skipped[:3])})")
        return tuple(clips)

    def _clips(self, item: Item) -> NDArray[np.uint8]:
        video = item.video()
        if not self.cache:
            return _read(video, self.cut)
        facts = item.path.stat()
        key = digest([str(item.path.resolve()), item.span, facts.st_size, facts.st_mtime_ns, repr(self.cut)])
        stored = Path(self.cache) / f"{Path(item.name).stem}-{key}.npy"
        if not stored.is_file():
            clips = _read(video, self.cut)
            with replacing(stored) as draft:
                np.save(draft, clips)
        return np.load(stored, mmap_mode="r")


def _read(video: Path | BytesIO, cut: Cut) -> NDArray[np.uint8]:
    return np.stack([clip.frames.numpy() for clip in read_clips(video, cut)])


@dataclass(frozen=True)
class _VideoSource:
    clips: tuple[tuple[NDArray[np.uint8], str], ...]
    texts: Texts
    shape: tuple[int, int, int, int]

    def batch(self, size: int, rng: Rng) -> Batch:
        chosen = [self.clips[i] for i in draw_indices(len(self.clips), size, rng)]
        prompts = tuple(caption for _, caption in chosen)
        cond, uncond = self.texts(prompts, rng.device)
        frames = to_floats(torch.from_numpy(np.stack([clip for clip, _ in chosen]))).to(rng.device)
        return Batch(cond=cond, uncond=uncond, latent_shape=self.shape, prompts=prompts, frames=frames)
