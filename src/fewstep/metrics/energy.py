"""Energy distance between two sets of samples of one prompt; two clips in each set are enough."""

from __future__ import annotations

import torch
from torch import Tensor


def energy(a: Tensor, b: Tensor) -> Tensor:
    """Energy distance of each prompt between features `[P, S, D]` and `[P, S, D]`: `[P]`, float64.

    `2 E|a - b| - E|a - a'| - E|b - b'|` (Szekely and Rizzo 2013). Every mean is over pairs of unequal index, because clips of
    equal index may share their noise and are then not independent. For equal distributions its expectation is 0, and it may be
    slightly negative by chance; for equal clips it is exactly 0. Unlike a Frechet distance it is unbiased for any number of
    clips, and it compares within prompts: the right clip for another prompt is far away. ValueError for fewer than 2 clips per
    prompt.
    """
    if a.ndim != 3 or a.shape != b.shape or a.shape[1] < 2:
        raise ValueError(f"energy needs two sets [P, S >= 2, D], got {list(a.shape)} and {list(b.shape)}")
    x, y = (v.detach().double().cpu() for v in (a, b))
    return 2 * _unequal(x, y) - _unequal(x, x) - _unequal(y, y)


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    """Mean distance of pairs with unequal index."""
    count, distance = a.shape[1], torch.cdist(a, b)
    return (distance.sum((1, 2)) - distance.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))
