"""Train a frame autoencoder whose latents a diffusion model can learn.

After Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2112.10752, section 3.1.

    1  x ~ frames; z = encode(x)
    2  z' = z + noise * std(z) * n,  n ~ N(0, I)
    3  minimise |x - decode(z')|_1 + gradient |dx - d decode(z')|_1 + penalty |z|^2

Not from the paper: no KL, perceptual or adversarial term. Line 2 replaces the KL term: the noise is proportional to the spread
of the latents, so larger latents do not help, and nearby latents must decode alike. Line 3 compares finite differences, which
keeps edges sharp at small cost. A few random frames per clip are enough, because neighbouring frames are alike.

Frames that are black but for a small spot collapse to black: that is the median, which line 3 asks for (LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Amount, Count
from fewstep.methods.base import Method, Nets, Update
from fewstep.methods.flow_matching import fold_frames


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Method):
    """Autoencoder training; `student` is the codec."""

    cite: ClassVar[str] = "after Rombach et al., High-Resolution Image Synthesis with Latent Diffusion, 2112.10752"

    frames_per_clip: Count = 4
    """Random frames per clip and iteration."""
    gradient: Amount = 1.0
    """Weight of the finite-difference term (image gradients)."""
    noise: Amount = 0.1
    """Noise on the latents, as a share of their standard deviation."""
    penalty: Amount = 1e-3
    """Weight of the latents' mean square; it keeps their scale near 1."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"frames"})

    @property
    def part(self) -> str:
        return "codec"

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        frames = fold_frames(batch.require("frames"), self.frames_per_clip, rng).clips
        latents = nets.student.encode_raw(frames)  # 1
        noise = self.noise * latents.detach().std() * rng.randn(latents.shape, "latent_noise")  # 2
        made = nets.student.decode_raw(latents + noise)
        down, right = ((a - b).abs().mean() for a, b in zip(slopes(made), slopes(frames)))
        yield {  # 3
            "pixels": (made - frames).abs().mean(),
            "edges": self.gradient * (down + right),
            "latents": self.penalty * latents.square().mean(),
        }


def slopes(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Finite differences along height and width."""
    return frames.diff(dim=-2), frames.diff(dim=-1)
