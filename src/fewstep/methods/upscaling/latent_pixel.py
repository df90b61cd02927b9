"""Regress the sharp clip from the latents of a low-resolution one, first in latents and then in pixels.

Chen et al., DOVE: Efficient One-Step Diffusion Model for Real-World Video Super-Resolution, 2505.16239.

    1  z = encode(low-resolution clip, scaled up)
    2  x = student(z, t, c),  t = 0.4: z stands for latents of time t, without noise
    3  stage 1: minimise latents * |x - x0|^2
    4  stage 2: minimise pixels * |decode(x) - y|^2 + motion * |d decode(x) - d y|_1,   y = sharp clip, d = from frame to frame

The stages are two of a recipe: latents alone, then pixels and motion. Pixels count in [0, 1], as in the authors' code.

Clips of one frame, which are stage 2's images, have no second term in line 4.

Not from the paper: all frames are decoded at once, and what is decoded is not clipped. Left out: the perceptual term of stage 2
(DISTS), for which the package has no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Amount, require_bounds
from fewstep.methods.base import Method, Nets, Update
from fewstep.methods.roles import Decoder, Role
from fewstep.methods.rollouts import FromLow
from fewstep.methods.targets import mse, pseudo_huber
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class LatentPixel(Method):
    """One-step super-resolution by regression, in latents and in pixels (DOVE; with chunks, FlashVSR)."""

    cite: ClassVar[str] = "Chen et al., DOVE: Efficient One-Step Diffusion Model for Real-World Video SR, 2505.16239"

    rollout: FromLow = FromLow()
    """Where the student begins: at the low-resolution clip."""
    latents: Amount = 1.0
    """Weight of line 3; 0 in DOVE's second stage."""
    pixels: Amount = 0.0
    """Weight of the first term of line 4 (DOVE's second stage: 1); 0: off."""
    motion: Amount = 0.0
    """lambda_2: weight of the second term of line 4 (DOVE's second stage: 1); 0: off."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if not (self.latents or self.pixels or self.motion):
            raise ValueError("latents, pixels and motion are 0, so nothing is trained; raise one of them")

    @property
    def decodes(self) -> bool:
        """Whether clips are compared by their frames."""
        return bool(self.pixels or self.motion)

    @property
    def needs(self) -> frozenset[str]:
        sharp = {"x0"} if self.latents else set()
        return frozenset({"prompts"} | sharp | ({"frames"} if self.decodes else set())) | self.rollout.needs

    def aux(self) -> dict[str, Role]:
        return {"codec": Decoder()} if self.decodes else {}

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        x = self.rollout(nets.student, batch, rng, grad=True).x0  # 2
        losses = {}
        if self.latents:
            losses["latents"] = self.latents * mse(x, batch.require("x0"))  # 3
        if self.decodes:
            made, sharp = nets.codec.decode(x) / 2, batch.require("frames") / 2
            if self.pixels:
                losses["pixels"] = self.pixels * mse(made, sharp)  # 4
            if self.motion and made.shape[2] > 1:
                losses["motion"] = self.motion * pseudo_huber(made.diff(dim=2), sharp.diff(dim=2), 0.0)
        if not losses:
            raise ValueError("clips of one frame have no motion, and motion alone is trained; raise latents or pixels")
        yield losses

    def cost(self) -> tuple[Work, ...]:
        return (Work("student", self.rollout.work),)
