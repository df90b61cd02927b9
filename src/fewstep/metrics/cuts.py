"""Cuts: a generated video that jumps to another picture."""

from __future__ import annotations

from torch import Tensor

from fewstep.data.shots import find_cuts


def cuts(frames: Tensor) -> list[int]:
    """The frames of one video, uint8 `[F, H, W, 3]`, with which a new shot begins (`data.shots.find_cuts`).

    The first frame is none of them. Dissolves and fades are not found.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype.is_floating_point:
        raise ValueError(f"cuts needs one video, uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    marked = find_cuts(frame.cpu().numpy() for frame in frames)
    return [number for number, (_, begins) in enumerate(marked) if begins]
