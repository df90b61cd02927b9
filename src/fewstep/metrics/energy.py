"""Energy distance between two sets of samples of one prompt, usable from two clips each."""

from __future__ import annotations

import torch
from torch import Tensor


def energy(a: Tensor, b: Tensor) -> Tensor:
    """Energy distance of each prompt between features `[P, S, D]` and `[P, S, D]`: `[P]`, float64.

    `2 E|a - b| - E|a - a'| - E|b - b'|` (Szekely and Rizzo 2013), every mean over pairs of unequal index: clips of equal
    index may share their noise, so they are no independent pair. 0 in expectation for equal distributions, and exactly 0 for
    equal clips; slightly negative by chance. Unlike a Frechet distance it is unbiased at any number of clips, and it
    compares within prompts: the right clip for the wrong prompt is far away. ValueError for fewer than 2 clips a prompt.
    """
    if a.ndim != 3 or a.shape != b.shape or a.shape[1] < 2:
        raise ValueError(f"energy needs two sets [P, S >= 2, D], got {list(a.shape)} and {list(b.shape)}")
    x, y = (v.detach().double().cpu() for v in (a, b))
    return 2 * _unequal(x, y) - _unequal(x, x) - _unequal(y, y)


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    """Mean distance over pairs of unequal index."""
    count, distance = a.shape[1], torch.cdist(a, b)
    return (distance.sum((1, 2)) - distance.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))
