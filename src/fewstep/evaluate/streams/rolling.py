"""Makes the long clips of a row and measures them window by window; frames are not kept, except small ones for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.finite import require_finite
from fewstep.data.video import to_uint8
from fewstep.evaluate.features.extractors import FeatureMap
from fewstep.evaluate.streams.clips import LongClips
from fewstep.evaluate.streams.suite import DriftCases, DriftSuite
from fewstep.metrics import brightness, contrast, flicker, frozen, motion, saturation, sharpness
from fewstep.world.checker import Checker, Readings
from fewstep.world.grammar import ATTRIBUTES
from fewstep.world.scripts import Script
from fewstep.world.windows import joined

Progress = Callable[[str, int, int], None]
"""Called as `(row, windows done, of how many)`."""

PIXELS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "motion": motion, "sharpness": sharpness, "saturation": saturation, "brightness": brightness, "contrast": contrast,
    "flicker": flicker, "frozen": frozen,
}  # fmt: skip
"""Measures of pixels by window: clips `[B, 3, F, H, W]` to `[B]`."""
READ = ("accuracy", "same object", *ATTRIBUTES)
"""Measures by the checker: 1 or 0. `accuracy`: every attribute is right."""
SHOWN_FRAMES = 4
"""Frames per window in the film strips."""


@dataclass(frozen=True)
class Rolled:
    """Everything measured on a row's clips."""

    measures: Mapping[str, Tensor]
    """Float64 `[N, W]` by name: `PIXELS` and `READ`. N clips ordered by prompt, W windows."""
    features: Tensor
    """Features `[N, W, D]`."""
    strips: Tensor
    """Frames of each prompt's first clip in the windows of `shown_windows`: uint8 `[P, T, 3, S, h, w]`."""


def shown_windows(count: int, times: tuple[int, ...]) -> tuple[int, ...]:
    """The windows in a film strip, from 0: the first two, one half-way, and those at `times`.

    >>> shown_windows(20, (1, 4, 20))
    (0, 1, 3, 9, 19)
    """
    return tuple(sorted({min(1, count - 1), count // 2 - 1 if count > 2 else 0, *(n - 1 for n in times if n <= count)}))


@torch.inference_mode()
def roll(
    row: LongClips, cases: DriftCases, suite: DriftSuite, features: FeatureMap, progress: Progress | None
) -> Rolled:
    """Make and measure every clip of a row. Rows that cannot drift have one window. NonFiniteError if a model makes NaN."""
    count = suite.count if row.kind != "new clips" else 1
    batches = list(cases.batches(suite.batch))
    parts = []
    for number, span in enumerate(batches):
        meter = _Meter(cases, span, suite, features, count)
        windows = row.windows(cases.scenes[span], cases.prompts[span], cases.seeds[span], count)
        for window, frames in enumerate(windows):
            require_finite(frames, f"window {window + 1} of {row.name}, clips {span.start} to {span.stop - 1}")
            meter.add(window, frames.float())
            if progress is not None:
                progress(row.name, number * count + window + 1, len(batches) * count)
        parts.append(meter.done())
    return Rolled(
        measures={name: torch.cat([part.measures[name] for part in parts]) for name in (*READ, *PIXELS)},
        features=torch.cat([part.features for part in parts]),
        strips=torch.cat([part.strips for part in parts]),
    )


class _Meter:
    """Figures of one batch of clips, a window at a time."""

    def __init__(self, cases: DriftCases, span: slice, suite: DriftSuite, features: FeatureMap, count: int) -> None:
        self._scripts = [Script((scene,)) for scene in cases.scenes[span]]
        self._seeds, self._features = cases.seeds_per_prompt, features
        self._shown = shown_windows(count, suite.times)
        self._checker = Checker()
        self._readings: list[Readings] = []
        self._pixels: dict[str, list[Tensor]] = {name: [] for name in PIXELS}
        self._seen: list[Tensor] = []
        self._strips: list[Tensor] = []

    def add(self, window: int, frames: Tensor) -> None:
        found = self._checker.read(frames)
        self._readings.append(Readings(found.values.cpu(), found.track.cpu()))
        for name, measure in PIXELS.items():
            self._pixels[name].append(measure(frames).double().cpu())
        self._seen.append(self._features.map(frames).double().cpu())
        if window in self._shown:
            at = [round(i * (frames.shape[2] - 1) / (SHOWN_FRAMES - 1)) for i in range(SHOWN_FRAMES)]
            self._strips.append(to_uint8(frames[:: self._seeds, :, at]).cpu())

    def done(self) -> Rolled:
        windows = joined(self._readings, self._readings[0].track.shape[1], self._checker)
        right = windows.right(self._scripts)
        read = dict(zip(ATTRIBUTES, right.unbind(2), strict=True))
        read |= {"accuracy": right.prod(2), "same object": windows.same_object().double()}
        pixels = {name: torch.stack(values, 1) for name, values in self._pixels.items()}
        return Rolled(read | pixels, torch.stack(self._seen, 1), torch.stack(self._strips, 1))
