"""Pure functions on clips `[B, 3, F, H, W]` in [-1, 1] and on features `[N, D]`; no network, no file, no global state."""

from fewstep.metrics.colour import contrast, saturation
from fewstep.metrics.cuts import cuts
from fewstep.metrics.diversity import diversity
from fewstep.metrics.drift import drift
from fewstep.metrics.energy import energy
from fewstep.metrics.exposure import black, brightness, clipped
from fewstep.metrics.flicker import flicker
from fewstep.metrics.frechet import (
    frechet,
    frechet_infinity,
    frechet_without,
    gaussian_distance,
    shuffled,
    split_half,
)
from fewstep.metrics.frozen import frozen
from fewstep.metrics.luma import luma
from fewstep.metrics.motion import motion
from fewstep.metrics.pooled import pooled
from fewstep.metrics.psnr import psnr
from fewstep.metrics.repetition import repetition
from fewstep.metrics.sharpness import sharpness
from fewstep.metrics.statistics import (
    Interval,
    bootstrap_interval,
    clustered_wilson,
    jackknife,
    mean_interval,
    percentile,
    ratio_of_means,
    wilson,
)

__all__ = [
    "Interval", "black", "bootstrap_interval", "brightness", "clipped", "clustered_wilson", "contrast", "cuts", "diversity",
    "drift", "energy", "flicker", "frechet", "frechet_infinity", "frechet_without", "frozen", "gaussian_distance", "jackknife",
    "luma", "mean_interval", "motion", "percentile", "pooled", "psnr", "ratio_of_means", "repetition", "saturation",
    "sharpness", "shuffled", "split_half", "wilson",
]  # fmt: skip
