"""Read the files of one case in one size, rate and length, one video in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.base import DataError
from fewstep.data.video import ClipError, decode, fit, read_rate
from fewstep.evaluate.finished.matching import PICTURES, Case

Progress = Callable[[str, int, int], None]
LARGEST = 2**30
"""Bytes of one video in memory, 8 bits per colour. A longer one is scaled down."""


@dataclass(frozen=True)
class Format:
    """Number of frames, frames per second, height and width of a video. A picture has one frame and no rate."""

    frames: int
    fps: float | None
    height: int
    width: int

    @property
    def seconds(self) -> float:
        return self.frames / self.fps if self.fps else 0.0

    def __str__(self) -> str:
        size = f"{self.width} x {self.height}"
        return size if self.fps is None else f"{size}, {self.fps:g} fps, {self.frames} frames"


def look(path: Path) -> Format:
    """The format of a file, from decoding it once. ClipError if it cannot be read."""
    if path.suffix.lower() in PICTURES:
        height, width = _picture(path).shape[:2]
        return Format(1, None, height, width)
    count, shape = 0, (0, 0)
    for frame in decode(path, 0):
        if count and frame.shape[:2] != shape:
            raise ClipError(f"frame {count} has another size than the first; write the video again in one size")
        count, shape = count + 1, frame.shape[:2]
    rate = read_rate(path)
    if rate is None:
        raise ClipError("no frame rate in its header; write the video again with a rate")
    return Format(count, rate, *shape)


def look_at(cases: Sequence[Case], progress: Progress | None = None) -> list[tuple[Format, ...]]:
    """The formats of all files, in the order of the cases. DataError that names what cannot be read or compared."""
    found: list[tuple[Format, ...]] = []
    broken: list[str] = []
    for number, case in enumerate(cases):
        formats: list[Format] = []
        for path in case.files:
            try:
                formats.append(look(path))
            except ClipError as error:
                broken.append(f"{path} ({error})")
        if not broken and len({one.fps is None for one in formats}) > 1:
            raise DataError(f"{case.name}: one side has a picture and another one a video; give the same kind")
        found.append(tuple(formats))
        if progress is not None:
            progress("reading", number + 1, len(cases))
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise DataError(f"cannot read {'; '.join(broken[:3])}{more}. Write these files again, or remove them")
    return found


def meet(formats: Sequence[Format], num_frames: int | None = None) -> Format:
    """The format in which files are compared: the smallest height, width, rate and length, so that nothing is made up.

    `num_frames`: at most so many frames from the beginning. A video of more than 1 GiB is scaled down until it fits.
    """
    height, width = min(f.height for f in formats), min(f.width for f in formats)
    fps = None if formats[0].fps is None else min(f.fps or 0.0 for f in formats)
    frames = 1 if fps is None else max(1, int(min(f.seconds for f in formats) * fps + 1e-6))
    frames = frames if num_frames is None else min(frames, num_frames)
    scale = min(1.0, (LARGEST / (frames * height * width * 3)) ** 0.5)
    return Format(frames, fps, max(1, int(height * scale)), max(1, int(width * scale)))


def read(path: Path, own: Format, wanted: Format) -> Tensor:
    """A file in another format: uint8 `[F, H, W, 3]`.

    Frames are scaled to cover the size and cropped at the centre. A lower rate takes the frame that is nearest in time; times
    are counted from the rate in the header.
    """
    size = (wanted.height, wanted.width)
    if wanted.fps is None or own.fps is None:
        return fit(_picture(path), size)[None]
    ratio = own.fps / wanted.fps
    indices = [min(round(i * ratio), own.frames - 1) for i in range(wanted.frames)]
    clip = torch.empty(wanted.frames, *size, 3, dtype=torch.uint8)
    place = 0
    for number, frame in enumerate(decode(path, indices[-1] + 1)):
        while place < wanted.frames and indices[place] == number:
            clip[place] = fit(frame, size)
            place += 1
    if place < wanted.frames:
        raise ClipError(f"{path} has changed while it was compared; run the same command again")
    return clip


def changes(own: Format, wanted: Format, num_frames: int | None = None) -> tuple[str, ...]:
    """What is resampled of a file, in words; nothing if it is compared as it is, but for the frames after `num_frames`."""
    said: list[str] = []
    if (own.height, own.width) != (wanted.height, wanted.width):
        said.append(f"size {own.width} x {own.height} to {wanted.width} x {wanted.height}")
    if own.fps is not None and wanted.fps is not None:
        if own.fps != wanted.fps:
            said.append(f"rate {own.fps:g} to {wanted.fps:g} fps")
        if own.seconds - wanted.seconds > 1 / wanted.fps - 1e-6 and wanted.frames != num_frames:
            said.append(f"length {own.seconds:.2f} to {wanted.seconds:.2f} s")
    return tuple(said)


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # a broken file can make the decoder raise anything; so can a picture of too many pixels
        raise ClipError(f"not a readable picture: {error}") from None
