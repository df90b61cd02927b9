"""Amount of motion in a clip. Few-step distillation loses motion first, and still images cannot show this."""

from __future__ import annotations

from torch import Tensor


def motion(frames: Tensor) -> Tensor:
    """Mean absolute frame difference `mean |x_{f+1} - x_f|` of each clip `[B, C, F, H, W]`: `[B]`, float64.

    Units: pixel range per frame; 2 is black to white. Noise that changes from frame to frame counts as motion too, so read
    `flicker` as well, and compare with the teacher on the same prompts and seeds. ValueError for fewer than 2 frames.
    """
    if frames.ndim != 5 or frames.shape[2] < 2:
        raise ValueError(f"motion needs clips [B, C, F >= 2, H, W], got {list(frames.shape)}")
    return frames.float().diff(dim=2).abs().flatten(1).mean(1).double().cpu()
