"""Peak signal-to-noise ratio: how near clips are to the ones that they should be."""

from __future__ import annotations

from torch import Tensor


def psnr(frames: Tensor, reference: Tensor) -> Tensor:
    """`10 log10(4 / mean squared error)` of each clip `[B, 3, F, H, W]` in [-1, 1] beside its reference: `[B]` in dB, float64.

    4 is the square of the range, 2. Equal clips have `inf`. It prefers what is blurred to what is sharp at the wrong place, so
    show `sharpness` beside it. ValueError for clips of other shapes.
    """
    if frames.shape != reference.shape or frames.ndim != 5:
        raise ValueError(
            f"psnr compares clips [B, 3, F, H, W] of one shape, got {list(frames.shape)} and {list(reference.shape)}"
        )
    error = (frames.double() - reference.double()).square().flatten(1).mean(1)
    return (10 * (4 / error).log10()).cpu()
