"""Video files as training data: decoded when they are drawn, as pixels or as latents."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.core import Batch, Rng
from fewstep.core.atomic import replacing
from fewstep.core.build import digest
from fewstep.data.base import Data, DataError, Source, require
from fewstep.data.clips import clips_of
from fewstep.data.degradation import Degradation
from fewstep.data.images import encode_ends
from fewstep.data.keep import Keep
from fewstep.data.layouts import Item, LayoutName
from fewstep.data.listing import Listing, check_listing, open_listing
from fewstep.data.order import draw_indices
from fewstep.data.texts import Texts
from fewstep.data.video import ClipError, Cut, to_floats
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card
from fewstep.models.images import ImageEncoder
from fewstep.models.videos import cover_latents

log = logging.getLogger(__name__)

TRIES = 100
"""Number of unusable videos in a row after which a run stops."""
SAID = 10
"""Number of skipped videos that are named in the log; after that, only their number is logged from time to time."""


@dataclass(frozen=True, kw_only=True)
class Videos(Data):
    """Captioned video files on disk, shuffled without a list in memory, and decoded ahead of the training.

    In an epoch, each video gives one of its clips. If a video is missing, damaged or outside the limits, a warning names it and
    another one is drawn; DataError after a hundred in a row. An image-to-video model gets the clip's own first frame, and its
    last one if it needs that.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "frames", "x0", "low"})

    path: str
    num_frames: int = 16
    height: int = 64
    width: int = 64
    stride: int = 1
    clips_per_video: int = 1
    """Number of clips to choose from per video; they follow each other from the first frame, without overlap. 0: as many as
    fit."""
    shots: bool = False
    """Detect cuts, so that every clip comes from one shot."""
    keep: Keep = Keep()
    """Limits for videos and clips; anything outside them is dropped."""
    low: Degradation = Degradation()
    """How low-resolution clips are made of them, for methods that read such clips."""
    layout: LayoutName = "plain"
    """Layout of the dataset on disk, see `fewstep.data.layouts`."""
    root: str = ""
    """Folder that video names are relative to; empty: `path`, or the folder that contains it."""
    listing: str = ""
    """File that stores the list of videos, written if it does not exist; a prepared folder's `listing.jsonl` works too.
    Empty: every process makes the list again, which takes a minute for a million videos."""
    cache: str = ""
    """Folder for decoded clips, one .npy file per video. Empty: decoded clips are not stored."""
    text_cache: str = ""
    """Folder for the text states of all captions, as in Prompts. Empty: encode each caption when it is first drawn."""
    hold_mib: int = 2048
    """Decoded clips kept in each process' main memory, in MiB; all others are decoded again when drawn again."""
    threads: int = 4
    """Decoding threads per process; they prepare the next batch during training."""

    @property
    def cut(self) -> Cut:
        return Cut(
            num_frames=self.num_frames, height=self.height, width=self.width,
            stride=self.stride, clips_per_video=self.clips_per_video, shots=self.shots,
        )  # fmt: skip

    def __post_init__(self) -> None:
        _ = self.cut  # its own checks
        if self.threads < 1 or self.hold_mib < 0:
            raise ValueError(
                f"threads must be at least 1 and hold_mib at least 0, got {self.threads} and {self.hold_mib}"
            )

    def check_card(self, card: Card) -> None:
        check_listing(self.path, self.layout, self.root)
        mine, its = (self.num_frames, self.height, self.width), (card.num_frames, card.height, card.width)
        if mine != its:
            raise DataError(
                f"data.num_frames, height, width are {mine}, but model {card.name!r} has {its}; make them equal, because "
                "clips are cut to the model's size"
            )

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        require(self, needs)
        listing = open_listing(self.path, self.layout, self.root, self.listing)
        texts = Texts(model, needs, self.text_cache, listing.captions)
        shape = (3, self.cut.num_frames, self.cut.height, self.cut.width)
        if "codec" in model.parts or needs & {"x0", "low"}:
            shape = model.codec.latent_shape(*shape[1:])
        return _VideoSource(
            self.low, model, needs, texts, shape, _Shelf(listing, self._decode, self.threads, self.hold_mib * 2**20)
        )

    def _decode(self, item: Item) -> NDArray[np.uint8]:
        """The clips of a video, `[N, F, H, W, 3]`; ClipError if it has none."""
        if not self.cache or item.problem or not item.path.is_file():
            return self._read(item)
        facts = item.path.stat()
        key = digest([
            str(item.path.resolve()), item.span, facts.st_size, facts.st_mtime_ns, repr(self.cut), repr(self.keep),
        ])  # fmt: skip
        stored = Path(self.cache) / f"{Path(item.name).stem}-{key}.npy"
        if not stored.is_file():
            clips, mine = (
                self._read(item),
                stored.with_suffix(f".{os.getpid()}.npy"),
            )  # other processes may write it too
            with replacing(mine) as draft:
                np.save(draft, clips)
            mine.replace(stored)
        return np.load(stored, mmap_mode="r")

    def _read(self, item: Item) -> NDArray[np.uint8]:
        clips, problem = [], ""
        try:
            for clip in clips_of(item, self.cut, self.keep):
                problem = clip.problem or problem
                if not clip.problem:
                    clips.append(clip.frames.numpy())
        except ClipError as error:  # clips before the damage can be used
            problem = str(error)
        if not clips:
            raise ClipError(problem)
        return np.stack(clips)


class _Shelf:
    """Clips by video number: clips that were used last are kept, and clips that are needed next are decoded in threads."""

    def __init__(self, listing: Listing, decode: Callable[[Item], NDArray[np.uint8]], threads: int, room: int) -> None:
        self.listing, self.decode, self.room = listing, decode, room
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.coming: dict[int, Future[NDArray[np.uint8]]] = {}
        self.held: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self.bytes = 0
        self.unusable: set[int] = set()
        self.reasons: deque[str] = deque(maxlen=3)
        """The latest reasons for skipping a video."""

    def want(self, numbers: Sequence[int]) -> None:
        """Begin to decode these videos."""
        for number in numbers:
            if number not in self.coming and number not in self.held and number not in self.unusable:
                self.coming[number] = self.pool.submit(self._take, number)

    def get(self, number: int) -> NDArray[np.uint8] | None:
        """The clips of a video; None if it has none, which is logged once."""
        self.want([number])
        if number in self.coming:
            try:
                self._hold(number, self.coming.pop(number).result())
            except ClipError as error:
                self._skip(number, error)
        if number in self.unusable:
            return None
        self.held.move_to_end(number)
        return self.held[number]

    def _skip(self, number: int, error: ClipError) -> None:
        self.unusable.add(number)
        self.reasons.append(f"{self.listing[number].name} skipped: {error}")
        count = len(self.unusable)
        if count <= SAID:
            log.warning("%s", self.reasons[-1])
        elif count.bit_count() == 1:  # 16, 32, 64, ...: the log of a long run stays short
            log.warning("%d of %d videos skipped so far; the latest: %s", count, len(self.listing), self.reasons[-1])

    def _take(self, number: int) -> NDArray[np.uint8]:
        return self.decode(self.listing[number])

    def _hold(self, number: int, clips: NDArray[np.uint8]) -> None:
        self.held[number] = clips
        self.bytes += clips.nbytes
        while self.bytes > self.room and len(self.held) > 1:
            self.bytes -= self.held.popitem(last=False)[1].nbytes


class _VideoSource:
    """Draws videos and one clip of each. A batch is a function of its random stream."""

    def __init__(
        self, low: Degradation, model: VideoModel, needs: frozenset[str], texts: Texts, shape: tuple[int, int, int, int],
        shelf: _Shelf,
    ) -> None:  # fmt: skip
        self.low, self.model, self.needs, self.texts, self.shape, self.shelf = low, model, needs, texts, shape, shelf
        self.steps: dict[tuple[int, int, int], int] = {}
        """The last requested step, by seed, place and size. If steps are requested in order, the next one is decoded ahead."""

    def batch(self, size: int, rng: Rng) -> Batch:
        listing = self.shelf.listing
        numbers = draw_indices(len(listing), size, rng)
        self.shelf.want(numbers)
        stream = rng.seed, rng.place, size
        if self.steps.get(stream) == rng.step - 1:
            self.shelf.want(draw_indices(len(listing), size, rng.at(step=rng.step + 1)))
        self.steps[stream] = rng.step
        captions, clips = [], []
        picks = rng.integers((size,), "clip", 2**31).tolist()
        for position, pick in enumerate(picks):
            number, found = self._usable(numbers[position], position, rng)
            captions.append(listing[number].caption)
            clips.append(found[pick % len(found)])
        return self._batch(tuple(captions), to_floats(torch.from_numpy(np.stack(clips)).to(rng.device)), rng)

    def _usable(self, number: int, position: int, rng: Rng) -> tuple[int, NDArray[np.uint8]]:
        """A video and its clips: the drawn video, or another one in its place."""
        for instead in self._instead(number, position, rng):
            if (found := self.shelf.get(instead)) is not None:
                return instead, found
        why = "; ".join(self.shelf.reasons)
        raise DataError(
            f"{TRIES} videos in a row gave no clip ({why}). Check that the disk is mounted, and the size and length of clips"
        )

    def _instead(self, number: int, position: int, rng: Rng) -> Iterator[int]:
        yield number
        yield from rng.fold(f"instead/{position}").integers((TRIES - 1,), "video", len(self.shelf.listing)).tolist()

    @torch.no_grad()
    def _batch(self, prompts: tuple[str, ...], frames: Tensor, rng: Rng) -> Batch:
        cond, uncond = self.texts(prompts, rng.device)
        if "image" in self.model.parts:
            image, codec = cast(ImageEncoder, self.model.part("image")), self.model.codec
            images = encode_ends(image, codec, frames.to(next(codec.parameters()).device))
            cond, uncond = (each.with_extra(images).to(rng.device) for each in (cond, uncond))
        return Batch(
            cond=cond, uncond=uncond, latent_shape=self.shape, prompts=prompts,
            x0=self.model.codec.encode(frames) if "x0" in self.needs else None,
            low=cover_latents(self.model, self.low(frames, rng.fold("low"))) if "low" in self.needs else None,
            frames=frames if "frames" in self.needs else None,
        )  # fmt: skip
