"""What only trained weights can tell: whether the output means what the card says, and whether t does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.data.video import read_video, to_floats
from fewstep.diffusion import KINDS, Kind, Prediction
from fewstep.evaluate.conformance.subject import Measured, NotApplicable, Subject
from fewstep.world.grammar import parse, world_prompts
from fewstep.world.renderer import CANVAS, Variation, render

_TIMES = (0.3, 0.5, 0.7)
_TOLD = (0.1, 0.3, 0.5, 0.7, 0.9)
_UNINFORMATIVE = "informative only with trained weights: this network denoises a known clip no better than shrinking it does"


def convention(s: Subject) -> Measured:
    """Of a known clip with noise, the output read as the card says gives the clip better than under any other convention.

    The card's `kind` is wrong, or the sign: the note says what the output looks like.
    """
    s.require("forward")
    clip = _Noised(s)
    errors: dict[tuple[Kind, int], float] = {
        (kind, sign): clip.error(lambda t, k=kind, g=sign: replace(clip.told(t, t), raw=g * clip.told(t, t).raw, kind=k))
        for kind in KINDS
        for sign in (1, -1)
    }
    best = min(errors, key=errors.__getitem__)
    if not errors[best] < clip.shrinking:
        raise NotApplicable(_UNINFORMATIVE)
    own = (s.network.kind, 1)
    others = min(error for convention, error in errors.items() if convention != own)
    looks = f"{'-' if best[1] < 0 else ''}{best[0]}"
    return Measured(errors[own], others, f"the output looks like {looks}; shrinking gives {clip.shrinking:.2f}")


def told_time(s: Subject) -> Measured:
    """A known clip with noise is denoised best when the network is told the true time.

    Time is turned round (0 is data here), in other units, or shifted twice.
    """
    s.require("forward", "convention")
    clip = _Noised(s)
    off, least = 0.0, float("inf")
    for t in _TIMES:
        errors = {told: clip.error(lambda u, t=t, told=told: clip.told(t, told), (t,)) for told in _TOLD}
        best = min(errors, key=errors.__getitem__)
        least, off = min(least, errors[best] / clip.shrinking_at(t)), max(off, abs(best - t))
    if not least < 1:
        raise NotApplicable(_UNINFORMATIVE)
    return Measured(off, 0.21, f"the best time to tell is off by {off:.1f} at most")


class _Noised:
    """A known clip, and what the network makes of it under noise. Errors are of x0, relative to it."""

    def __init__(self, s: Subject) -> None:
        frames, caption = _known(s)
        self._s, self._made = s, {}  # type: ignore[var-annotated]
        self.x0 = s.model.codec.encode(frames.to(s.model.device)).to(s.dtype)
        self.eps = s.randn("eps", 1)
        self.cond = s.model.encode_text([caption])[0]

    def told(self, t: float, told: float) -> Prediction:
        """The prediction at `t` by a network that is told another time."""
        if (t, told) not in self._made:
            s = self._s
            x_t = s.network.path.add_noise(self.x0, self.eps, s.time(t))
            raw = s.network(x_t, s.time(told), self.cond).raw
            self._made[t, told] = Prediction(raw, s.network.kind, x_t, s.time(t), s.network.path)
        made: Prediction = self._made[t, told]
        return made

    def error(self, predict, times: tuple[float, ...] = _TIMES) -> float:  # type: ignore[no-untyped-def]
        return float(torch.tensor([self._relative(predict(t).x0) for t in times]).mean())

    @property
    def shrinking(self) -> float:
        return float(torch.tensor([self.shrinking_at(t) for t in _TIMES]).mean())

    def shrinking_at(self, t: float) -> float:
        """Of the best multiple of x_t, which is what one gets without a network."""
        x_t = self.told(t, t).x_t.double()
        return self._relative((x_t * self.x0).sum() / x_t.square().sum() * x_t)

    def _relative(self, x0: Tensor) -> float:
        return float((x0.double() - self.x0.double()).norm() / self.x0.double().norm())


def _known(s: Subject) -> tuple[Tensor, str]:
    """A clip `[1, 3, F, H, W]` and what it shows."""
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
