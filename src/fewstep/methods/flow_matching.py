"""Train a video diffusion model from clips: a teacher for the other methods.

Lipman et al., Flow Matching for Generative Modeling, 2210.02747; condition dropout: Ho & Salimans, 2207.12598.

    1  x0 ~ data with prompt c; eps ~ N(0, I); t ~ density
    2  c <- null prompt with probability cond_drop
    3  x_t = a(t) x0 + s(t) eps                                (a clip that streams: a time per chunk, see `history`)
    4  minimise |net(x_t, t, c) - (p x0 + q eps)|^2          (for flow prediction: da x0 + ds eps)

Not from the paper: any path and prediction kind; times are stratified over the batch; some iterations use single frames, so
that the model is an image model too (1 latent frame), which adversarial and image-teacher methods need. `recycling` (Stable Video
Infinity, 2510.09212) adds the model's own earlier errors to x0, eps and what is read of earlier chunks, with the target of the
clean x0. `imitated` puts what another model predicts for x_t and c in place of x0 and eps in line 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import Batch, Cond, Losses, Rng
from fewstep.core.bounds import Count, Fraction, require_bounds
from fewstep.diffusion import Contract, LogitNormal, TimeDensity, target
from fewstep.methods.base import Method, Nets, Update
from fewstep.methods.frames import fold_frames
from fewstep.methods.histories import History, TeacherForced, WholeClip
from fewstep.methods.recycling import ErrorRecycling, Errors, plus
from fewstep.methods.roles import Other, Role
from fewstep.methods.targets import denoising
from fewstep.methods.work import Work
from fewstep.models.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Method):
    """Pretraining by conditional flow matching."""

    cite: ClassVar[str] = "Lipman et al., Flow Matching for Generative Modeling, 2210.02747"

    density: TimeDensity = LogitNormal()
    """Density of t in training."""
    cond_drop: Fraction = 0.1
    """Share of samples trained with the null prompt; guidance needs them."""
    image_fraction: Fraction = 0.0
    """Share of iterations on single frames."""
    images_per_clip: Count = 4
    """Frames taken from each clip in an iteration on single frames."""
    history: History = WholeClip()
    """What is read of earlier chunks, for a model that streams."""
    recycling: ErrorRecycling | None = None
    """Train on the model's own errors, too, for long streams; null: on data alone."""
    imitated: ModelSource | None = None
    """Model whose prediction is the target in line 4: teacher score matching (MSD, 2410.23274), with which a network of another
    size begins that cannot copy its teacher's weights. null: the clip and the noise."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.image_fraction and self.history.stream is not None:
            raise ValueError("a model that streams is not trained on single frames; set image_fraction: 0")
        if self.recycling is not None and self.recycling.past and not isinstance(self.history, TeacherForced):
            raise ValueError(
                "errors of the past are added to the clean chunks that history TeacherForced reads, and this history reads none; "
                "write recycling.past: 0"
            )

        if self.imitated is not None and (self.history.stream is not None or self.recycling is not None):
            raise ValueError(
                "another model is imitated on whole clips with one time; leave out history and recycling, or write imitated: null"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts", "x0"})

    def aux(self) -> dict[str, Role]:
        return {} if self.imitated is None else {"imitated": Other(self.imitated)}

    @property
    def carries(self) -> bool:
        return self.recycling is not None

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        x0, cond, uncond = batch.require("x0"), batch.cond, batch.uncond
        if torch.rand((), generator=rng.shared("image")) < self.image_fraction:
            stills = fold_frames(x0, self.images_per_clip, rng)
            x0, cond, uncond = stills.clips, stills.of(cond), stills.of(uncond)
        eps, t = rng.randn(x0.shape, "eps"), self.history.times(self.density, x0, rng)  # 1
        cond = drop(cond, uncond, self.cond_drop, rng)  # 2
        lengths = (x0.shape[2],) if self.history.stream is None else self.history.stream.lengths(x0.shape[2])
        errors = Errors()
        if self.recycling is not None:
            errors = self.recycling.draw(batch.require("carried"), x0, t, lengths, rng)
        student, eps = self.history.over(nets.student, plus(x0, errors.past)), plus(eps, errors.noise)
        prediction = student(student.path.add_noise(plus(x0, errors.data), eps, t), t, cond)  # 3
        if self.recycling is not None:
            ideal = prediction.with_raw(target(prediction.kind, x0, eps, t, prediction.path))
            self.recycling.keep(batch.require("carried"), prediction, ideal, errors, lengths, rng)
        if self.imitated is not None:
            with torch.no_grad():
                seen = nets.imitated(prediction.x_t, t, cond)
            x0, eps = seen.x0, seen.eps
        yield {"flow": denoising(prediction, x0, eps, weights(t))}  # 4

    def contract(self, teacher: Contract) -> Contract:
        return self.history.contract(teacher)

    def cost(self) -> tuple[Work, ...]:
        images = Work("student", 3 * self.image_fraction, frames=self.images_per_clip)
        clips = Work("student", 3 * self.history.calls * (1 - self.image_fraction))
        own = tuple(work for work in (clips, images) if work.forwards > 0)
        seen = (
            ()
            if self.imitated is None
            else (replace(each, role="imitated", forwards=each.forwards / 3) for each in own)
        )
        return *own, *seen


def drop(cond: Cond, uncond: Cond, probability: float, rng: Rng) -> Cond:
    """`cond` with a share `probability` of its rows replaced by `uncond`."""
    return cond.where(rng.rand((len(cond),), "cond_drop") >= probability, uncond)


def weights(t: Tensor) -> Tensor | None:
    """Weights of frames with times `[B, F]`, of mean 1: 0 for those without noise, which say nothing. None for times `[B]`."""
    noised = (t > 0).float()
    return None if t.ndim == 1 else noised / noised.mean().clamp_min(1e-6)
