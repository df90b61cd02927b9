"""Normalized attention guidance: a negative prompt for models that are sampled without guidance, in one call per step.

Legend: as in `kernels.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NAG:
    """NAG (2505.21179, section 3): what a token reads of the prompt (z+) is pushed away from what it reads of the negative
    prompt (z-), and kept near its old size. The norms are L1, over all heads of a token.

        1  z~ = z+ + (scale - 1) (z+ - z-)
        2  z^ = z~ min(1, tau |z+| / |z~|)
        3  z  = alpha z^ + (1 - alpha) z+

    The scale counts as in the authors' code (nag_scale); the paper's phi is one less. `tau` and `alpha` are the defaults of
    their Wan pipeline (github.com/ChenDarYen/Normalized-Attention-Guidance, src/pipeline_wan_nag.py); the scale is that of the
    node WanVideoNAG (github.com/kijai/ComfyUI-KJNodes), because theirs is 1, which is off.
    """

    scale: float = 11.0
    """Strength; 1: off."""
    tau: float = 2.5
    """Largest factor by which the norm may grow."""
    alpha: float = 0.25
    """Share of the pushed values in the result; 0: off."""

    def __post_init__(self) -> None:
        for name, low, high in (("scale", 1.0, math.inf), ("tau", 1.0, math.inf), ("alpha", 0.0, 1.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                most = "" if high == math.inf else f" and at most {high:g}"
                raise ValueError(f"nag {name} must be at least {low:g}{most}, got {value}")

    def __call__(self, given_BHND: Tensor, negative_BHND: Tensor) -> Tensor:
        """What tokens get, in the type of `given_BHND`, which is what they read of the prompt."""
        pushed = given_BHND + (self.scale - 1) * (given_BHND - negative_BHND)  # 1
        before, after = _norm(given_BHND), _norm(pushed)
        shrink = (self.tau * before / after.clamp_min(torch.finfo(after.dtype).tiny)).clamp_max(1)
        return torch.lerp(given_BHND, pushed * shrink.to(pushed.dtype), self.alpha)  # 2, 3


def _norm(x_BHND: Tensor) -> Tensor:
    """L1 norm of each token, `[B, 1, N, 1]`, float32 at least."""
    dtype = torch.promote_types(x_BHND.dtype, torch.float32)
    return x_BHND.abs().sum((1, 3), keepdim=True, dtype=dtype)
