"""Frechet distance between two sets of features, with two controls.

The distance of finite samples is biased upwards. The bias depends on their number `n` and on the width of the features, so
compare values only at the same `n`, and compare them with the noise floor and with the control with shuffled frames.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians fitted to features `[N, D]` and `[M, D]`.

    `|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)` (Dowson and Landau 1982; FID, 1706.08500, eq. 6), in
    squared units of the features. Unbiased covariances, no shrinkage, float64. ValueError for fewer than 2 rows or
    unequal widths.
    """
    (mean_a, x), (mean_b, y) = _centred(a), _centred(b)
    if len(mean_a) == len(mean_b) >= max(len(x), len(y)):
        # Fewer rows than features: X Y^T has the singular values of S_a^1/2 S_b^1/2 (up to the row counts) and is smaller.
        cross = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt((len(x) - 1) * (len(y) - 1))
        spread = x.square().sum() / (len(x) - 1) + y.square().sum() / (len(y) - 1)
        return max(0.0, float((mean_a - mean_b).square().sum() + spread - 2 * cross))
    return gaussian_distance(mean_a, _covariance(x), mean_b, _covariance(y))


def frechet_without(a: Tensor, b: Tensor, size: int = 1) -> Tensor:
    """Distances of features `[N, D]` when one block of `size` rows after another is left out of both sets.

    For `metrics.statistics.jackknife`. A block holds all rows of one or more prompts, because rows of one prompt resemble each
    other. The last block may be smaller. ValueError for sets of unequal shape, or if fewer than 2 rows would be left.
    """
    if a.shape != b.shape or len(a) < size + 2:
        raise ValueError(
            f"give two sets of equal shape with at least {size + 2} rows; got {list(a.shape)} and {list(b.shape)}"
        )
    block = torch.arange(len(a)) // size
    left = [frechet(a[block != i], b[block != i]) for i in range(int(block[-1]) + 1)]
    return torch.tensor(left, dtype=torch.float64)


def frechet_infinity(a: Tensor, b: Tensor, generator: torch.Generator, repeats: int = 4) -> float:
    """Estimate of the distance for infinitely many rows, from two sets of features `[N, D]` with `N >= 2 D`.

    The bias falls like 1/N (Chong and Forsyth 2020, 1911.07023), so the estimate is the intercept of a line through the
    distances of random subsets of N/2, 0.7 N and N rows. ValueError for fewer rows: there the bias does not follow 1/N, and
    the intercept would be as wrong as the distance.
    """
    n, width = a.shape
    if a.shape != b.shape or n < 2 * width:
        raise ValueError(
            f"give two sets of features [N, D] with N >= 2 D, got {list(a.shape)} and {list(b.shape)}; evaluate more clips"
        )
    inverse, distances = [], []
    for rows in (n // 2, round(0.7 * n), n):
        for _ in range(repeats):
            mine, other = (x[torch.randperm(n, generator=generator)[:rows]] for x in (a, b))
            inverse.append(1 / rows)
            distances.append(frechet(mine, other))
    line = torch.stack([torch.ones(len(inverse)), torch.tensor(inverse)], 1).double()
    return float(torch.linalg.lstsq(line, torch.tensor(distances, dtype=torch.float64)[:, None]).solution[0])


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and deviations from it `[N, D]`, float64 on the CPU."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N >= 2, D], got {list(features.shape)}; evaluate on more clips")
    if not bool(features.isfinite().all()):
        raise ValueError("features hold NaN or infinite values; look at the clips they were computed from")
    x = features.detach().double().cpu()
    mean = x.mean(0)
    return mean, x - mean


def _covariance(centred: Tensor) -> Tensor:
    return centred.T @ centred / (len(centred) - 1)


def gaussian_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians, from their means `[D]` and covariances `[D, D]`.

    `Tr (S_a^1/2 S_b S_a^1/2)^1/2` is the sum of the singular values of `S_a^1/2 S_b^1/2`: this form needs no matrix
    root of a product, and stays accurate for singular covariances (fewer clips than features).
    """
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"the two feature sets have widths {len(mean_a)} and {len(mean_b)}; use one feature map for both"
        )
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, float(shift + cov_a.double().trace() + cov_b.double().trace() - 2 * cross))


def split_half(features: Tensor, generator: torch.Generator, repeats: int = 8) -> float:
    """Noise floor: mean distance between two random halves of one set `[N, D]`.

    It is the distance that a perfect model would have with N/2 clips; with N clips the floor is about half of it.
    """
    if len(features) < 4:
        raise ValueError(f"split_half needs at least 4 rows, got {len(features)}")
    half = len(features) // 2
    total = 0.0
    for _ in range(repeats):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        total += frechet(features[order[:half]], features[order[half : 2 * half]])
    return total / repeats


def shuffled(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Clips `[B, C, F, H, W]` with their frames in random order, a different order for each clip.

    A control: every frame stays right, but the motion is destroyed, so a video metric must find this set worse.
    """
    orders = torch.stack([torch.randperm(frames.shape[2], generator=generator) for _ in range(len(frames))])
    index = orders.to(frames.device)[:, None, :, None, None].expand_as(frames)
    return frames.gather(2, index)


def _root(cov: Tensor) -> Tensor:
    """Symmetric square root. Negative eigenvalues come from rounding and are set to zero."""
    values, vectors = torch.linalg.eigh(cov.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
