"""Limits for the videos and clips that are used; a dropped video or clip gets a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path

from torch import Tensor

from fewstep.data.video import read_facts


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Limits for videos and clips. None: no limit."""

    min_seconds: float | None = None
    """Shortest video in seconds, from its header; a video without a duration in its header is dropped."""
    max_seconds: float | None = None
    min_side: int | None = None
    """Smallest number of pixels of the file's shorter side, before scaling."""
    min_motion: float | None = None
    """Smallest motion of a clip, see `motion`; a still picture has 0."""
    max_motion: float | None = None
    min_brightness: float | None = None
    """Smallest mean of a clip's pixels, from 0 (black) to 1 (white)."""
    max_brightness: float | None = None

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value, share = getattr(self, name), name.endswith(("motion", "brightness"))
            if value is not None and not (0 <= value <= 1 if share else 0 <= value < math.inf):
                raise ValueError(
                    f"{name} must be {'from 0 to 1' if share else 'a number of at least 0'}, got {value:g}"
                )
            other = name.replace("min_", "max_")
            low, high = getattr(self, name), getattr(self, other, None)
            if name.startswith("min_") and None not in (low, high) and low > high:
                raise ValueError(
                    f"{name} {low:g} is above {other} {high:g}, so nothing would be kept; change one of them"
                )

    def of_video(self, source: Path | BytesIO) -> str:
        """Why a video is dropped before it is decoded; empty if it is kept. ClipError if it is not a video."""
        if self.min_seconds is self.max_seconds is self.min_side is None:
            return ""
        facts = read_facts(source)
        if facts.seconds is None and (self.min_seconds, self.max_seconds) != (None, None):
            return "duration: the file does not say"
        return self._outside("duration", facts.seconds or 0, "seconds") or self._outside(
            "resolution", facts.side, "side"
        )

    def of_clip(self, frames: Tensor) -> str:
        """Why a clip, uint8 `[F, H, W, 3]`, is dropped; empty if it is kept."""
        return self._outside("motion", motion(frames), "motion") or self._outside(
            "brightness", float(frames.float().mean()) / 255, "brightness"
        )

    def _outside(self, reason: str, value: float, name: str) -> str:
        low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}", None)
        if low is not None and value < low:
            return f"{reason}: {value:.4g}, at least {low:g}"
        if high is not None and value > high:
            return f"{reason}: {value:.4g}, at most {high:g}"
        return ""


def motion(frames: Tensor) -> float:
    """Mean absolute difference of neighbouring frames, uint8 `[F, H, W, 3]`: 0 still, 1 from black to white; one frame is 0."""
    levels = frames.float()
    return float((levels[1:] - levels[:-1]).abs().mean()) / 255 if len(frames) > 1 else 0.0
