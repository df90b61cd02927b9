"""In which style clips are drawn: what a restyled student has taken over, apart from what is right in its clips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.world.checker import ABSTAIN, Checker
from fewstep.world.grammar import Scene
from fewstep.world.renderer import STYLES, Variation, render_track


@torch.no_grad()
def nearest_style(clips: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """The style of each clip `[B, 3, F, 32, 32]`, `[B]`: its number in `STYLES`, or -1 where no style's object is seen.

    The asked scene is drawn in every style, where the checker sees the object in each frame. The style with the least squared
    difference over those frames is the nearest. White shapes that are thinner than a line look alike in all styles. `ValueError`
    for what `Checker.read` refuses, and if the counts differ.
    """
    errors = torch.stack([_error(clips, scenes, style) for style in STYLES], 1)
    return errors.argmin(1).where(errors.isfinite().any(1), ABSTAIN)


def _error(clips: Tensor, scenes: Sequence[Scene], style: str) -> Tensor:
    """Mean squared difference of each clip from its scene in this style, `[B]`; infinite without an object."""
    track = Checker(style=style).read(clips).track
    seen = track.isfinite().all(2)
    track = track.where(seen[..., None], 0)  # frames that do not count
    still = torch.ones(len(clips), device=clips.device)
    usual = Variation(position=track[:, 0], tilt=0 * still, radius_scale=still, speed_scale=still, shade=still)
    drawn = render_track(scenes, usual, track, style=style)
    by_frame = (drawn - clips).square().mean((1, 3, 4)) * seen
    return (by_frame.sum(1) / seen.sum(1)).where(seen.any(1), torch.inf)
