"""Checks that need trained weights: whether output and time mean what the card says."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.data.video import read_video, to_floats
from fewstep.diffusion import KINDS, Prediction
from fewstep.evaluate.conformance.subject import Measured, NotApplicable, Subject, relative
from fewstep.world.grammar import parse, world_prompts
from fewstep.world.renderer import CANVAS, Variation, render

_TIMES = (0.3, 0.5, 0.7)
_TOLD = (0.1, 0.3, 0.5, 0.7, 0.9)
_SHARE = 0.9
"""A network whose error is above this share of the error of shrinking (see `shrinking`) was not trained."""
_UNINFORMATIVE = "needs trained weights: this network denoises a known clip hardly better than a constant factor does"


def convention(s: Subject) -> Measured:
    """The card's convention recovers a known clip with noise better than any other convention does.

    The card's `kind` or the sign is wrong: the note says which convention fits the output best.
    """
    s.require("forward")
    clip = _Noised(s)
    made = [clip.predict(t) for t in _TIMES]
    errors = {
        (kind, sign): fmean(clip.error(replace(p, raw=sign * p.raw, kind=kind).x0) for p in made)
        for kind in KINDS
        for sign in (1, -1)
    }
    best, shrinking = min(errors, key=errors.__getitem__), fmean(map(clip.shrinking, made))
    if not errors[best] < _SHARE * shrinking:
        raise NotApplicable(_UNINFORMATIVE)
    own = errors.pop((s.network.kind, 1))
    looks = f"{'-' if best[1] < 0 else ''}{best[0]}"
    return Measured(
        own, min(errors.values()), f"the output looks like {looks}; a constant factor gives {shrinking:.2f}"
    )


def told_time(s: Subject) -> Measured:
    """The network denoises a known clip with noise best if it gets the true time.

    Time runs in the other direction (in fewstep, 0 is data), has other units, or is shifted twice.
    """
    s.require("forward", "convention")
    clip, off, informative = _Noised(s), 0.0, False
    for t in _TIMES:
        made = {told: clip.predict(t, told) for told in _TOLD}
        errors = {told: clip.error(prediction.x0) for told, prediction in made.items()}
        best = min(errors, key=errors.__getitem__)
        informative = informative or errors[best] < _SHARE * clip.shrinking(made[best])
        off = max(off, abs(best - t))
    if not informative:
        raise NotApplicable(_UNINFORMATIVE)
    return Measured(off, 0.21)


class _Noised:
    """A known clip, and the network's predictions from it with noise."""

    def __init__(self, s: Subject) -> None:
        frames, caption = _known(s)
        self._s = s
        self._x0 = s.model.codec.encode(frames.to(s.model.device)).to(s.dtype)
        self._cond = s.conditions([caption], frames[0])[0]

    def predict(self, t: float, told: float | None = None) -> Prediction:
        """The prediction from the clip with the noise of time `t`; the network gets the time `told` (default: `t`)."""
        s = self._s
        x_t = s.network.path.add_noise(self._x0, s.randn("eps", 1), s.time(t))
        raw = s.network(x_t, s.time(t if told is None else told), self._cond).raw
        return Prediction(raw, s.network.kind, x_t, s.time(t), s.network.path)

    def error(self, x0: Tensor) -> float:
        """Error of `x0` relative to the clip."""
        return relative(x0, self._x0)

    def shrinking(self, prediction: Prediction) -> float:
        """The error of the best multiple of x_t: the best result without a network."""
        x_t = prediction.x_t
        return self.error((x_t * self._x0).sum() / x_t.square().sum() * x_t)


def _known(s: Subject) -> tuple[Tensor, str]:
    """A clip `[1, 3, F, H, W]` and its caption."""
    card, options = s.model.card, s.options
    if options.video is not None:
        frames = read_video(options.video, card.num_frames, size=(card.height, card.width))
        return to_floats(frames)[None], s.captions[0]
    caption = world_prompts(1, 0.0, options.seed)[0]
    drawn = Variation.sample(1, torch.Generator().manual_seed(options.seed))
    frames = render([parse(caption)], drawn, card.num_frames)
    if (card.height, card.width) == (CANVAS, CANVAS):
        return frames, caption
    scaled = interpolate(frames[0].transpose(0, 1), (card.height, card.width), mode="bicubic", align_corners=False)
    return scaled.transpose(0, 1)[None].clamp(-1, 1), caption
