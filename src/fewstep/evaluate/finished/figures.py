"""The figures of one finished video, measured a few frames at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.data.video import cover, to_floats
from fewstep.metrics import (
    black,
    brightness,
    clipped,
    contrast,
    cuts,
    drift,
    flicker,
    frozen,
    luma,
    motion,
    repetition,
    saturation,
    sharpness,
)
from fewstep.metrics.drift import FEWEST as FEWEST_TO_DRIFT
from fewstep.metrics.flow import BLOCK, block_flow, scaled_down
from fewstep.metrics.repetition import FEWEST as FEWEST_TO_REPEAT
from fewstep.metrics.repetition import coarse
from fewstep.metrics.vlite import consistency, dynamic_degree, motion_smoothness, temporal_flickering

if TYPE_CHECKING:
    from fewstep.evaluate.features.clip_score import Clip

AT_ONCE = 2**22
"""Values of pixels that are measured at once."""
PAIRS = 32
"""Pairs of frames whose flow is measured at once."""
FLOW_FPS = 8
"""Frames per second at which VBench measures flow."""
SMALL, MOST = 256, 1024
"""Shorter side and largest number of the frames that extractors of the distance get; they scale these to their own size."""
BRIGHT, COLOURED, SHARP = 0.05, 0.02, 0.02
"""Means below which a rise of brightness (and contrast), saturation or sharpness is not taken relative to the mean."""

Figures = dict[str, float | None]
"""One value per measure; None where a video cannot have it, such as the motion of a picture."""


@dataclass(frozen=True)
class Measured:
    """The figures of a video, and the embeddings `[F, E]` of its frames if there is a CLIP model."""

    figures: Figures
    embeddings: Tensor | None = None


def measure(frames: Tensor, fps: float | None, clip: Clip | None = None, text: Tensor | None = None) -> Measured:
    """Measure one video, uint8 `[F, H, W, 3]`. `text` is the embedding `[1, E]` of its prompt.

    A measure that needs more frames than there are is None; so is everything about time for a picture.
    """
    still: dict[str, list[Tensor]] = {
        name: [] for name in ("brightness", "saturation", "contrast", "sharpness", "clipped", "black")
    }
    coarsely, embedded = [], []
    large = min(frames.shape[1:3]) >= 3
    for x in windows(frames, 1):
        for name, figure in {
            "brightness": brightness, "saturation": saturation, "contrast": contrast, "clipped": clipped, "black": black,
        }.items():  # fmt: skip
            still[name].append(figure(x))
        still["sharpness"].append(sharpness(x) if large else x.new_zeros(len(x)))
        coarsely.append(coarse(x)[:, 0])
        if clip is not None:
            embedded.append(clip.frames(x[:, :, 0].transpose(0, 1)).cpu())
    series = {name: torch.cat(parts) for name, parts in still.items()}
    embeddings = torch.cat(embedded) if embedded else None
    found: Figures = {name: float(values.mean()) for name, values in series.items()}
    floors = {"brightness": BRIGHT, "contrast": BRIGHT, "saturation": COLOURED, "sharpness": SHARP}
    for name, floor in floors.items():
        enough = len(frames) >= FEWEST_TO_DRIFT
        found[f"{name}_drift"] = float(drift(series[name][None], floor)) if enough else None
    found |= _in_time(frames)
    enough = len(frames) >= FEWEST_TO_REPEAT
    found["repetition"] = float(repetition(torch.cat(coarsely)[None])) if enough else None
    found |= vlite(frames, fps, embeddings)
    found["clip_score"] = (
        None if embeddings is None or text is None else float(100 * (embeddings @ text[0].cpu()).mean())
    )
    return Measured(found, embeddings)


def _in_time(frames: Tensor) -> Figures:
    """Motion, frozen frames, flicker and cuts."""
    names: dict[str, float | None] = {"motion": None, "frozen": None, "flicker": None, "cuts": None}
    if len(frames) < 2:
        return names
    pairs = [(motion(x), frozen(x)) for x in windows(frames, 2)]
    names["motion"], names["frozen"] = (float(torch.cat(list(part)).mean()) for part in zip(*pairs))
    names["cuts"] = float(len(cuts(frames)))
    if len(frames) > 2:
        names["flicker"] = float(torch.cat([flicker(x) for x in windows(frames, 3)]).mean())
    return names


def vlite(frames: Tensor, fps: float | None, embeddings: Tensor | None = None) -> Figures:
    """The light forms of VBench's measures. Flicker counts only for videos that do not move, as VBench does it."""
    found: Figures = {f"vlite.{name}": None for name in VLITE}
    if fps is None or len(frames) < 3:
        return found
    moves = _moves(frames, fps)
    found["vlite.dynamic_degree"] = None if moves is None else float(moves)
    if moves is False:
        found["vlite.temporal_flickering"] = float(
            torch.cat([temporal_flickering(x) for x in windows(frames, 2)]).mean()
        )
    dropped = [motion_smoothness(x) for x in windows(frames, 3)]
    found["vlite.motion_smoothness"] = float(torch.cat(dropped)[::2].mean())
    if embeddings is not None:
        found["vlite.background_consistency"] = float(consistency(embeddings[None]))
    return found


VLITE = ("dynamic_degree", "motion_smoothness", "temporal_flickering", "background_consistency")


def _moves(frames: Tensor, fps: float) -> bool | None:
    """Whether the video moves; None for frames that are too small or too few to tell."""
    chosen = frames[:: max(1, round(fps / FLOW_FPS))]
    y = torch.cat([scaled_down(luma(x)[:, 0]) for x in windows(chosen, 1)])
    if len(y) < 2 or min(y.shape[1:]) < BLOCK:
        return None
    before, after = y[:-1].split(PAIRS), y[1:].split(PAIRS)
    lengths = [block_flow(a, b) for a, b in zip(before, after)]
    return dynamic_degree(torch.cat(lengths), min(y.shape[1:]))


def small(frames: Tensor) -> Tensor:
    """A video for the extractors of the distance: floats `[1, 3, F, H, W]`, scaled down to a shorter side of 256 pixels.

    ValueError for more than 1024 frames, because extractors take a whole video at once.
    """
    if len(frames) > MOST:
        raise ValueError(
            f"a distance takes at most {MOST} frames per video, got {len(frames)}; give --num-frames {MOST}"
        )
    ratio = min(1.0, SMALL / min(frames.shape[1:3]))
    size = (max(1, round(frames.shape[1] * ratio)), max(1, round(frames.shape[2] * ratio)))
    if size == tuple(frames.shape[1:3]):
        return to_floats(frames)[None]
    planes = [cover(x[:, :, 0], size).clamp(-1, 1) for x in windows(frames, 1)]
    return torch.cat(planes).transpose(0, 1)[None]


def windows(frames: Tensor, span: int) -> Iterator[Tensor]:
    """All runs of `span` neighbouring frames of uint8 `[F, H, W, 3]`, a few at a time: floats `[n, 3, span, H, W]`."""
    step = max(1, AT_ONCE // (frames.shape[1] * frames.shape[2] * 3))
    for first in range(0, len(frames) - span + 1, step):
        part = to_floats(frames[first : first + step + span - 1])
        yield part.unfold(1, span, 1).permute(1, 0, 4, 2, 3)


def mean(rows: Sequence[Figures], name: str) -> float | None:
    """Mean of one measure over the videos that have it; None if none has."""
    values = [value for row in rows if (value := row[name]) is not None]
    return sum(values) / len(values) if values else None
