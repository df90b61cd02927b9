"""Matching the motion between frames, a term for streams (Diagonal Distillation, 2603.09488)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.path import broadcast
from fewstep.methods.targets import FLOOR, toward


def motion_matching(x0: Tensor, real: Tensor, fake: Tensor, keep: Tensor | None = None) -> Tensor:
    """`distribution_matching` of the differences between neighbouring frames. Mean over all elements.

    `keep`, `[B]`, `[B, 1]` or `[B, F]`, says how much each clip or frame counts; a difference counts as the later of its frames
    does. ValueError for clips of one frame.

    Weights of the differences: `0.7 (1 + e_j / e_last)`, with e the error of the motion summed up to there, and 0.3 of `1.2^j`
    scaled to mean 1, which is our reading of "normalised". The published code computes this term without a gradient; here it has
    one.
    """
    if x0.shape[2] < 2:
        raise ValueError("clips of one latent frame have no motion to match; write motion: 0, or take longer clips")
    moved, wanted, seen = (x.diff(dim=2) for x in (x0, real, fake))
    error = (moved.detach() - wanted).abs().mean((1, *range(3, x0.ndim)))
    counts = torch.ones_like(error) if keep is None else _of_differences(keep, error)
    share = counts / counts.mean(1, keepdim=True).clamp_min(FLOOR)  # of the clip's differences
    summed = (share * error).cumsum(1)
    growth = 1.2 ** torch.arange(error.shape[1], dtype=error.dtype, device=error.device)
    growth = growth / (share * growth).mean(1, keepdim=True).clamp_min(FLOOR)
    weight = 0.7 * (1 + summed / (summed[:, -1:] + FLOOR)) + 0.3 * growth
    gap = (seen - wanted).detach()
    weight = counts * weight / ((share * error).mean(1, keepdim=True) + FLOOR)
    return toward(moved, broadcast(weight, gap) * gap)


def _of_differences(keep: Tensor, error: Tensor) -> Tensor:
    """How much each difference counts, `[B, F - 1]`: in sum as much as the clip's frames."""
    if keep.numel() == len(keep):
        return keep.reshape(-1, 1).expand_as(error)
    later = keep[:, 1:]
    return later * keep.mean(1, keepdim=True) / later.mean(1, keepdim=True).clamp_min(FLOOR)
