"""Small copies of the videos beside a page, so that the page works from any disk and in any browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from fewstep.core.atomic import replacing, write_text
from fewstep.core.lock import FILE as LOCK
from fewstep.core.pixels import cover
from fewstep.data.base import DataError
from fewstep.data.video import write_pixels

FOLDER = "videos"
LONGEST = 512
"""Longest side of a copy in pixels."""


def write_player(folder: Path, side: int | str, number: int, frames: Tensor, fps: float | None) -> str:
    """Write one video, uint8 `[F, H, W, 3]`, scaled down if it is large; the name of the copy below `folder`."""
    return write_copy(folder, f"{FOLDER}/{side}/{number + 1:03d}", frames, fps)


def write_copy(folder: Path, stem: str, frames: Tensor, fps: float | None) -> str:
    """Write `folder/stem.mp4`, or .png for a picture; the name with its suffix."""
    shown = scaled(frames)
    name = f"{stem}.png" if fps is None else f"{stem}.mp4"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if fps is None:
        with replacing(path) as draft:
            Image.fromarray(shown[0].numpy()).save(draft)
    else:
        write_pixels(path, shown, fps=fps)
    return name


def scaled(frames: Tensor) -> Tensor:
    """uint8 `[F, H, W, 3]`, scaled down so that the longest side has at most 512 pixels."""
    height, width = frames.shape[1:3]
    if max(height, width) <= LONGEST:
        return frames
    ratio = LONGEST / max(height, width)
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    small = frames.new_empty(len(frames), *size, 3)
    for place, frame in enumerate(frames):
        planes = cover(frame.permute(2, 0, 1)[None].float(), size)[0].round().clamp(0, 255)
        small[place] = planes.permute(1, 2, 0).to(small.dtype)
    return small


def require_free(output: Path, sides: Sequence[Path], file: str, kind: str) -> None:
    """Refuse an output folder that is one of the inputs, or that has files of something else."""
    there = output.resolve()
    for side in sides:
        own = side.resolve()
        if there == own or (own.is_dir() and there.is_relative_to(own)) or own.is_relative_to(there):
            raise DataError(f"--output {output}: the videos of {side} are there too; give another output folder")
    if output.is_file():
        raise FileExistsError(f"{output} is a file; give a folder")
    others = [path for path in output.iterdir() if path.name != LOCK] if output.is_dir() else []
    if others and not _ours(output / file, kind):
        raise FileExistsError(f"{output} is not empty, and {kind} did not write it; give another output folder")


def begin(output: Path, file: str, kind: str, copies: str = FOLDER) -> None:
    """Mark the folder, so that a stopped command can be run again, and delete the copies of an earlier one."""
    if _ours(output / file, kind):
        shutil.rmtree(output / copies, ignore_errors=True)
    write_text(output / file, json.dumps({"kind": kind}) + "\n")


def _ours(file: Path, kind: str) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("kind") == kind)
    except (OSError, ValueError, AttributeError):
        return False
