"""The figures of one finished video, measured a few frames at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.core.pixels import cover
from fewstep.data.video import to_floats
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
from fewstep.metrics.repetition import CELLS, coarse
from fewstep.metrics.repetition import FEWEST as FEWEST_TO_REPEAT
from fewstep.metrics.vlite import consistency, dynamic_degree, motion_smoothness, temporal_flickering

if TYPE_CHECKING:
    from fewstep.evaluate.features.clip_score import Clip

AT_ONCE, LEAST = 2**22, 4
"""Values of pixels that are measured at once, and the smallest number of frames."""
PAIRS = 32
"""Pairs of frames whose flow is measured at once."""
FLOW_FPS = 8
"""Frames per second at which VBench measures flow."""
SMALL, MOST = 256, 1024
"""Shorter side and largest number of the frames that extractors of the distance get; they scale these to their own size."""
FLOORS = {"brightness": 0.05, "contrast": 0.05, "saturation": 0.02, "sharpness": 0.02}
"""Means below which the drift of a figure is not taken relative to the mean."""

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
    # Small tensors that are kept would lie between the large ones that are freed, and the heap would grow with every part.
    series: dict[str, list[float]] = {name: [] for name in (*STILL, *IN_TIME)}
    coarsely, embedded = torch.empty(1, len(frames), CELLS**2), []
    for part in parts(frames):
        single, pairs, triples = (part.runs(span) for span in (1, 2, 3))
        for name, function in STILL.items():
            series[name] += function(single).tolist()
        series["motion"] += motion(pairs).tolist()
        series["frozen"] += frozen(pairs).tolist()
        series["flicker"] += flicker(triples).tolist()
        coarsely[0, part.first : part.first + part.count] = coarse(single)[:, 0]
        if clip is not None:
            embedded.append(clip.frames(single[:, :, 0].transpose(0, 1)).cpu())
    joined = {name: torch.tensor(values, dtype=torch.float64) for name, values in series.items()}
    embeddings = torch.cat(embedded) if embedded else None
    found: Figures = {name: float(values.mean()) if len(values) else None for name, values in joined.items()}
    for name, floor in FLOORS.items():
        enough = len(frames) >= FEWEST_TO_DRIFT
        found[f"{name}_drift"] = float(drift(joined[name][None], floor)) if enough else None
    found["cuts"] = float(len(cuts(frames))) if len(frames) > 1 else None
    enough = len(frames) >= FEWEST_TO_REPEAT
    found["repetition"] = float(repetition(coarsely)) if enough else None
    found |= vlite(frames, fps, embeddings)
    found["clip_score"] = (
        None if embeddings is None or text is None else float(100 * (embeddings @ text[0].cpu()).mean())
    )
    return Measured(found, embeddings)


def _sharpness(x: Tensor) -> Tensor:
    """Sharpness, 0 for frames that are too small to have one."""
    return sharpness(x) if min(x.shape[-2:]) >= 3 else torch.zeros(len(x), dtype=torch.float64)


STILL: Mapping[str, Callable[[Tensor], Tensor]] = {
    "brightness": brightness, "saturation": saturation, "contrast": contrast, "sharpness": _sharpness, "clipped": clipped,
    "black": black,
}  # fmt: skip
"""Figures of single frames."""
IN_TIME = ("motion", "frozen", "flicker")


def vlite(frames: Tensor, fps: float | None, embeddings: Tensor | None = None, order: Tensor | None = None) -> Figures:
    """The light forms of VBench's measures, of the frames in an order of indices if one is given; `embeddings` are those of the
    frames in that order. Flickering counts only for videos that do not move, as VBench does it."""
    found: Figures = {f"vlite.{name}": None for name in VLITE}
    count = len(frames) if order is None else len(order)
    if fps is None or count < 3:
        return found
    every = max(1, round(fps / FLOW_FPS))
    lumas, smooth, steady = torch.empty(0), list[float](), list[float]()
    for part in parts(frames, order):
        seen = part.runs(1)[-part.first % every :: every]  # every so many frames of the whole
        y = scaled_down(luma(seen)[:, 0])
        lumas = lumas if part.first else y.new_empty(math.ceil(count / every), *y.shape[1:])
        place = math.ceil(part.first / every)
        lumas[place : place + len(y)] = y
        smooth += motion_smoothness(part.runs(3)[part.first % 2 :: 2]).tolist()
        steady += temporal_flickering(part.runs(2)).tolist()
    moves = _moves(lumas)
    found["vlite.dynamic_degree"] = None if moves is None else float(moves)
    found["vlite.temporal_flickering"] = sum(steady) / len(steady) if moves is False else None
    found["vlite.motion_smoothness"] = sum(smooth) / len(smooth)
    if embeddings is not None:
        found["vlite.background_consistency"] = float(consistency(embeddings[None]))
    return found


VLITE = ("dynamic_degree", "motion_smoothness", "temporal_flickering", "background_consistency")


def _moves(y: Tensor) -> bool | None:
    """Whether a video moves, from luma `[N, H, W]` at about 8 frames per second; None if it is too small or short to tell."""
    if len(y) < 2 or min(y.shape[1:]) < BLOCK:
        return None
    lengths = [block_flow(a, b) for a, b in zip(y[:-1].split(PAIRS), y[1:].split(PAIRS))]
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
    planes = [cover(part.runs(1)[:, :, 0], size).clamp(-1, 1) for part in parts(frames)]
    return torch.cat(planes).transpose(0, 1)[None]


@dataclass(frozen=True)
class Part:
    """Some neighbouring frames of a video, and the two after them."""

    first: int
    """Number of the first frame in the video."""
    count: int
    """Frames of this part, without the two after them."""
    pixels: Tensor
    """Floats `[3, F, H, W]` in [-1, 1]."""

    def runs(self, span: int) -> Tensor:
        """All runs of `span` (1 to 3) neighbouring frames that begin in this part, `[n, 3, span, H, W]`; none at the end."""
        x = self.pixels[:, : self.count + span - 1]
        if x.shape[1] < span:
            return x.new_zeros(0, 3, span, *x.shape[2:])
        return x.unfold(1, span, 1).permute(1, 0, 4, 2, 3)


def parts(frames: Tensor, order: Tensor | None = None) -> Iterator[Part]:
    """A video, uint8 `[F, H, W, 3]`, a few frames at a time; its frames in another order if one is given."""
    total = len(frames) if order is None else len(order)
    step = max(LEAST, AT_ONCE // (frames.shape[1] * frames.shape[2] * 3))
    for first in range(0, total, step):
        span = slice(first, first + step + 2)
        yield Part(first, min(step, total - first), to_floats(frames[span] if order is None else frames[order[span]]))


def mean(rows: Sequence[Figures], name: str) -> float | None:
    """Mean of one measure over the videos that have it; None if none has."""
    values = [value for row in rows if (value := row[name]) is not None]
    return sum(values) / len(values) if values else None
