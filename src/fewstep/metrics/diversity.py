"""Diversity: how much clips of one prompt differ. Some losses give nearly the same clip for every seed."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def diversity(groups: Tensor) -> Tensor:
    """Mean pairwise distance between the seeds of each prompt: `[P, S, ...]` to `[P]`, float64.

    `2 / (S (S-1)) sum_{i<j} rms(x_i - x_j)`, with the root mean square over all trailing dimensions. The input may be pixels,
    latents or features; the result has its units. ValueError for fewer than 2 seeds.
    """
    if groups.ndim < 3 or groups.shape[1] < 2:
        raise ValueError(
            f"diversity needs [prompts, seeds >= 2, ...], got {list(groups.shape)}; use 2 seeds per prompt or more"
        )
    x = groups.detach().float().flatten(2)
    pairs = [(x[:, i] - x[:, j]).square().mean(1).sqrt() for i, j in combinations(range(x.shape[1]), 2)]
    return torch.stack(pairs, 1).double().mean(1).cpu()
