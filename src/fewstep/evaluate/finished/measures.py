"""What is compared: one entry per figure of a video, with the margin within which two videos count as equal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure of a video, and how two sides are compared by it."""

    name: str
    """Its key in the results."""
    title: str
    kind: Literal["ratio", "difference"]
    """ratio: mean of the videos over the reference's mean. difference: mean minus the reference's mean."""
    margin: float
    """Differences within the margin count as equal: 0.1 for a ratio is from 1/1.1 to 1.1."""
    unit: Literal["", "share", "change", "points"] = ""
    """How values are written: a number, a share in %, a relative change in %, points."""
    floor: float = 0.0
    """Smallest value that a ratio of single videos is taken to."""
    fault: bool = False
    """Whether a single video that has more of it than the reference is named, whatever the mean."""
    about: str = ""

    def distance(self, value: float | None, reference: float | None) -> float:
        """How many margins a video is from the reference, positive if it has more; 0 if one of them has no figure."""
        if value is None or reference is None:
            return 0.0
        if self.kind == "difference":
            return (value - reference) / self.margin
        return math.log((value + self.floor) / (reference + self.floor)) / math.log1p(self.margin)

    def written(self, value: float | None) -> str:
        """A value of one video, or a mean of values."""
        if value is None:
            return "-"
        if self.unit == "share":
            return f"{100 * value:.0f} %" if value == 0 or value >= 0.1 else f"{100 * value:.1f} %"
        if self.unit == "change":
            return f"{round(100 * value):+d} %"
        return f"{value:.1f}" if self.unit == "points" else f"{value:.3g}"

    def compared(self, value: float) -> str:
        """A ratio or a difference."""
        if self.kind == "ratio":
            return f"{value:.2f}x"
        if self.unit in ("share", "change"):
            return f"{100 * value:+.1f} points"
        return f"{value:+.3g}"

    def between(self, ends: tuple[float, float]) -> str:
        """An interval of ratios or differences."""
        if self.kind == "ratio":
            return f"{ends[0]:.2f} to {ends[1]:.2f}"
        if self.unit in ("share", "change"):
            return f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f} points"
        return f"{ends[0]:+.3g} to {ends[1]:+.3g}"


def _ratio(name: str, title: str, floor: float, about: str) -> Measure:
    return Measure(name=name, title=title, kind="ratio", margin=0.1, floor=floor, about=about)


def _drift(name: str, title: str) -> Measure:
    about = f"{title} of the last quarter minus the first quarter, relative to the video's mean"
    return Measure(
        name=f"{name}_drift", title=f"drift of {title}", kind="difference", margin=0.1, unit="change", about=about
    )


MEASURES = (
    _ratio("motion", "motion", 0.001, "mean absolute change from frame to frame"),
    _ratio("flicker", "flicker", 0.001, "mean absolute second difference in time"),
    _ratio("sharpness", "sharpness", 0.01, "fine detail: Laplacian of the luma, relative to its deviation"),
    _ratio("saturation", "saturation", 0.005, "mean of max(r, g, b) - min(r, g, b)"),
    _ratio("contrast", "contrast", 0.01, "standard deviation of the luma in a frame"),
    _ratio("brightness", "brightness", 0.01, "exposure: mean luma"),
    Measure(name="clipped", title="pixels burnt out or black", kind="difference", margin=0.02, unit="share", fault=True,
            about="share of pixels within 2/255 of black or white"),
    _drift("brightness", "brightness"),
    _drift("saturation", "saturation"),
    _drift("contrast", "contrast"),
    _drift("sharpness", "sharpness"),
    Measure(name="frozen", title="frozen frames", kind="difference", margin=0.05, unit="share", fault=True,
            about="share of neighbouring frames that differ by less than 0.001 of the range"),
    Measure(name="black", title="black frames", kind="difference", margin=0.01, unit="share", fault=True,
            about="share of frames with 98 % of their pixels darker than 0.1"),
    Measure(name="cuts", title="cuts", kind="difference", margin=0.5, fault=True, about="jumps to another picture per video"),
    Measure(name="repetition", title="repetition", kind="difference", margin=0.3, fault=True,
            about="largest autocorrelation of the frames after they first differ; a loop has 1"),
    Measure(name="vlite.dynamic_degree", title="vlite.dynamic_degree", kind="difference", margin=0.1, unit="share",
            about="videos that move: fastest 5 % of block shifts above 6 pixels of 256, in a quarter of the frames at 8 fps"),
    Measure(name="vlite.motion_smoothness", title="vlite.motion_smoothness", kind="difference", margin=0.005,
            about="1 - mean error of every second frame, predicted as the mean of its neighbours"),
    Measure(name="vlite.temporal_flickering", title="vlite.temporal_flickering", kind="difference", margin=0.005,
            about="1 - mean change from frame to frame; only videos that do not move"),
    Measure(name="vlite.background_consistency", title="vlite.background_consistency", kind="difference", margin=0.01,
            about="cosines of CLIP's frame embeddings to the first and to the previous frame"),
    Measure(name="clip_score", title="CLIPScore", kind="difference", margin=0.5, unit="points",
            about="100 cos(frame, prompt), mean over frames"),
)  # fmt: skip
"""All measures, in the order of the page."""
BY_NAME = {measure.name: measure for measure in MEASURES}
