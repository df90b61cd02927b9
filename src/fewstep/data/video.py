"""Video files to tensors and back.

Pixels are uint8 `[F, H, W, 3]` when decoded and stored, and float `[3, F, H, W]` in [-1, 1] for networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import pad

from fewstep.core.atomic import replacing, replacing_folder
from fewstep.core.finite import require_finite
from fewstep.core.pixels import cover, to_uint8
from fewstep.data.growing import x264
from fewstep.data.shots import find_cuts

LARGEST_SIDE = 16384
"""Largest side of a video in pixels; H.264 allows no more."""


class ClipError(ValueError):
    """A video cannot give the requested clip. The message is the reason, then a colon and details if there are any."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How clips are cut from a video: every `stride`-th frame, scaled to cover the size and cropped at the centre."""

    num_frames: int = 16
    height: int = 64
    width: int = 64
    stride: int = 1
    """Step between two frames, in frames of the file; time stamps are not read."""
    clips_per_video: int = 1
    """Largest number of clips per video, one after the other from the first frame, without overlap; 0: as many as fit."""
    shots: bool = False
    """Detect cuts (see `fewstep.data.shots`). A clip never crosses a cut, and each shot gives at most one clip."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.clips_per_video < 0:
            raise ValueError(f"clips_per_video must be 0 (as many as fit) or more, got {self.clips_per_video}")


@dataclass(frozen=True)
class Clip:
    """uint8 `frames` `[F, H, W, 3]`; the first one is frame `start` of the file."""

    frames: Tensor
    start: int
    problem: str = ""
    """Why the clip cannot be used. A shot that is too short keeps the frames it has."""


def read_video(
    source: str | Path | BytesIO,
    num_frames: int,
    *,
    stride: int = 1,
    size: tuple[int, int] | None = None,
    start: int = 0,
) -> Tensor:
    """Read `num_frames` frames, every `stride`-th from frame `start`: uint8 `[F, H, W, 3]`.

    With `size` `(H, W)`, frames are scaled to cover it and cropped at the centre. ClipError if the file is missing, damaged or
    too short.
    """
    wanted = range(start, start + num_frames * stride, stride)
    frames = [fit(f, size) for i, f in enumerate(decode(source, wanted.stop - stride + 1)) if i in wanted]
    if len(frames) < num_frames:
        raise ClipError(_too_short(frames, wanted))
    return torch.stack(frames)


def read_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A picture, scaled to cover `size` `(H, W)` and cropped at the centre: `[3, H, W]` in [-1, 1]. ClipError as above."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # a broken file can make the decoder raise anything; so can a picture of too many pixels
        raise ClipError(f"{path} is not a readable picture: {error}") from None
    return to_floats(fit(pixels, size)[None])[:, 0]


def read_clips(source: str | Path | BytesIO, cut: Cut) -> Iterator[Clip]:
    """The clips of one video, in one pass over the file, with one clip in memory.

    A codec takes floats `[B, 3, F, H, W]`: `codec.encode(to_floats(torch.stack([clip.frames for clip in clips])))`.

    ClipError if the file is missing, damaged (after the clips before the damage) or too short for one clip. With `cut.shots`, a
    shot that is too short is yielded with its `problem`, without an error.
    """
    span, frames, made, begin = cut.num_frames * cut.stride, list[Tensor](), 0, 0
    done = False  # with this shot
    decoded = decode(source, 0 if cut.shots else cut.clips_per_video * span)
    for i, (frame, is_cut) in enumerate(find_cuts(decoded) if cut.shots else zip(decoded, repeat(False))):
        if is_cut:
            if not done:
                yield _short_shot(frames, cut, begin)
            frames, begin, done = [], i, False
        if not done and (i - begin) % cut.stride == 0:
            frames.append(fit(frame, (cut.height, cut.width)))
        if len(frames) == cut.num_frames:
            yield Clip(torch.stack(frames), begin)
            frames, made, begin, done = [], made + 1, begin + span, cut.shots
            if made == cut.clips_per_video:
                return
    if cut.shots and frames:
        yield _short_shot(frames, cut, begin)
    elif not made:
        raise ClipError(_too_short(frames, range(0, span, cut.stride)))


def _short_shot(frames: list[Tensor], cut: Cut, begin: int) -> Clip:
    return Clip(torch.stack(frames), begin, f"shot too short: {len(frames)} of {cut.num_frames} frames")


@dataclass(frozen=True)
class Facts:
    """Facts from the header of a file, without decoding: `seconds` (None if unknown) and the shorter `side`."""

    seconds: float | None
    side: int


def read_facts(source: str | Path | BytesIO) -> Facts:
    """Read the header of a video. ClipError if the file is not a video."""
    with _opened(source) as file:
        stream = file.streams.video[0]
        length = None if stream.duration is None else float(stream.duration * stream.time_base)
        if length is None and file.duration is not None:
            length = file.duration / av.time_base
        return Facts(length, min(stream.width, stream.height))


def read_rate(source: str | Path | BytesIO) -> float | None:
    """Frames per second by the header of a video, the mean if the rate varies; None if the header has none."""
    with _opened(source) as file:
        rate = file.streams.video[0].average_rate
        return float(rate) if rate else None


def to_floats(frames: Tensor) -> Tensor:
    """Convert uint8 `[..., F, H, W, 3]` (from `read_clips`) to float32 `[..., 3, F, H, W]` in [-1, 1] (for codecs)."""
    return frames.movedim(-1, -4).contiguous().float() / 127.5 - 1  # moving bytes is faster than moving floats


def to_pixels(frames: Tensor) -> Tensor:
    """Convert floats `[..., 3, F, H, W]` in [-1, 1] to uint8 `[..., F, H, W, 3]`. Values outside are clipped; NaN is refused."""
    require_finite(frames, "frames to be written")
    return to_uint8(frames).movedim(-4, -1).cpu().contiguous()


def write_video(
    path: str | Path, frames: Tensor, *, fps: float = 8, scale: int = 1, columns: int = 0, note: str = ""
) -> Path:
    """Write floats `[3, F, H, W]`, or `[B, 3, F, H, W]` side by side, in [-1, 1], to .mp4 (H.264), .gif, .webp (lossless) or
    .png (a file for one frame; a folder of numbered files, named without the suffix, for several). Returns where it is.

    `scale` enlarges by repeating pixels; `columns` is the number of clips per row (0 = all in one row). H.264 needs even sizes,
    so the last row or column of an odd size is repeated. A .gif shows each frame for a whole number of 1/100 s. `read_note`
    reads the `note` again.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"{path}: cannot write {path.suffix or 'without a suffix'}; choose {' or '.join(_WRITERS)}")
    if frames.ndim not in (4, 5) or frames.shape[-4] != 3 or not frames.is_floating_point():
        got = f"{frames.dtype} {tuple(frames.shape)}"
        raise ValueError(f"frames must be floats [3, F, H, W] or [B, 3, F, H, W], got {got}")
    if scale < 1 or fps <= 0:
        raise ValueError(f"scale must be at least 1 and fps positive, got scale={scale}, fps={fps}")
    pixels = _tile(to_pixels(frames if frames.ndim == 5 else frames[None]), columns)
    array = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2).numpy()
    if path.suffix.lower() == ".png" and len(array) > 1:
        with replacing_folder(path.with_suffix("")) as folder:
            for number, frame in enumerate(array, 1):
                _write_png(folder / f"{number:0{max(4, len(str(len(array))))}d}.png", frame[None], fps, note)
        return path.with_suffix("")
    with replacing(path) as draft:
        _WRITERS[path.suffix.lower()](draft, array, fps, note)
    return path


def read_note(path: str | Path) -> str:
    """The note that `write_video` left in a file or folder; empty without one. ClipError for what is no video or picture."""
    path = Path(path)
    if path.is_dir():
        path = next(iter(sorted(path.glob("*.png"))), path)
    try:
        if path.suffix.lower() == ".mp4":
            with _opened(path) as file:
                found: str = file.metadata.get("comment", "")
                return found
        with Image.open(path) as picture:
            kept = (
                picture.info.get("comment", "") if picture.format != "WEBP" else picture.getexif().get(_DESCRIPTION, "")
            )
    except (OSError, SyntaxError, ClipError) as error:
        raise ClipError(f"{path}: cannot be read as a video or picture ({error})") from None
    return kept.decode("utf-8", "replace") if isinstance(kept, bytes) else str(kept)


def write_pixels(path: Path, pixels: Tensor, *, fps: float) -> Path:
    """Write uint8 `[F, H, W, 3]` to .mp4 as `write_video` does, without a copy of it as floats."""
    with replacing(path) as draft:
        _write_mp4(draft, pixels.numpy(), fps, "")
    return path


def _tile(clips: Tensor, columns: int) -> Tensor:
    """Arrange clips `[B, F, H, W, 3]` in one picture per frame; the rest of the last row is black."""
    columns = min(columns or len(clips), len(clips))
    rows = math.ceil(len(clips) / columns)
    clips = pad(clips, (0, 0) * 4 + (0, rows * columns - len(clips)))
    f, h, w, c = clips.shape[1:]
    return clips.reshape(rows, columns, f, h, w, c).permute(2, 0, 3, 1, 4, 5).reshape(f, rows * h, columns * w, c)


def _write_mp4(path: Path, frames: np.ndarray, fps: float, note: str) -> None:
    odd = [(0, size % 2) for size in frames.shape[1:3]]
    frames = np.pad(frames, [(0, 0), *odd, (0, 0)], mode="edge")
    with av.open(str(path), "w") as file:
        if note:
            file.metadata["comment"] = note
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=x264(18))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: float, note: str) -> None:
    path.write_bytes(encode_gif(frames, fps, note))


def _write_webp(path: Path, frames: np.ndarray, fps: float, note: str) -> None:
    first, *rest = map(Image.fromarray, frames)
    told = Image.Exif()
    if note:
        told[_DESCRIPTION] = note
    first.save(
        path, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, lossless=True, exif=told
    )


def _write_png(path: Path, frames: np.ndarray, fps: float, note: str) -> None:
    told = PngInfo()
    if note:
        told.add_text("comment", note)
    Image.fromarray(frames[0]).save(path, "PNG", pnginfo=told)


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp, ".png": _write_png}
FORMATS = tuple(_WRITERS)
"""Suffixes of files that `write_video` writes."""
_DESCRIPTION = 0x010E
"""EXIF's number of the description of a picture."""


def encode_gif(frames: np.ndarray, fps: float, note: str = "") -> bytes:
    """uint8 `[F, H, W, 3]` as an endless GIF of at most 256 colours."""
    # One palette for the whole clip, because a palette per frame would make the clip flicker.
    palette = Image.fromarray(frames.reshape(-1, *frames.shape[2:])).quantize(256, dither=Image.Dither.NONE)
    first, *rest = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    buffer = BytesIO()
    duration = max(20, round(100 / fps) * 10)  # browsers slow down anything faster than 20 ms
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=duration, loop=0, comment=note.encode())
    return buffer.getvalue()


def decode(source: str | Path | BytesIO, stop: int) -> Iterator[np.ndarray]:
    """Upright uint8 `[H, W, 3]` frames of the first video stream, at most `stop` (0 = all)."""
    number = 0
    with _opened(source) as file:
        # Each video is decoded in a thread of its own, and many are open at once.
        file.streams.video[0].codec_context.thread_count = 1
        try:
            for number, frame in enumerate(file.decode(video=0), 1):
                if frame.is_corrupt:
                    raise ClipError(f"damaged: frame {number - 1}")
                yield np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                if number == stop:
                    return
        except av.FFmpegError as error:
            if not number:
                raise
            raise ClipError(f"damaged: cannot be decoded beyond frame {number - 1} ({_reason(error)})") from error
    if not number:
        raise ClipError("not a readable video: no frame in it")


@contextmanager
def _opened(source: str | Path | BytesIO) -> Iterator[Any]:
    """Open a file with a video stream, at its beginning."""
    if isinstance(source, BytesIO):
        source.seek(0)
    elif not Path(source).is_file():
        raise ClipError("no such file")
    try:
        # Titles and comments are not always valid UTF-8, and they are not used here.
        with av.open(source if isinstance(source, BytesIO) else str(source), metadata_errors="replace") as file:
            if not file.streams.video:
                raise ClipError("no video: the file has no video stream")
            yield file
    except av.FFmpegError as error:
        raise ClipError(f"not a readable video: {_reason(error)}") from error


def _reason(error: av.FFmpegError) -> str:
    return getattr(error, "strerror", None) or str(error)


def fit(frame: np.ndarray, size: tuple[int, int] | None) -> Tensor:
    """Scale uint8 `[H, W, 3]` to cover `size`, antialiased, and crop the centre."""
    pixels = torch.from_numpy(np.ascontiguousarray(frame))
    if size is None or tuple(pixels.shape[:2]) == size:
        return pixels.clone()
    planes = cover(pixels.permute(2, 0, 1)[None].float(), size)[0]
    return planes.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def _too_short(frames: list[Tensor], wanted: range) -> str:
    steps = f", every {wanted.step} frames" if wanted.step > 1 else ""
    where = f" from frame {wanted.start}" if wanted.start else ""
    return f"too short: {len(frames)} of {len(wanted)} frames{where}{steps}"
