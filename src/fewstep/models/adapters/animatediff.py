"""AnimateDiff (2307.04725): a Stable Diffusion U-Net whose blocks were given motion modules, attention along time.

It predicts eps on `Betas(schedule="linear")`, not on the scaled-linear table of the image model it was made from.
"""

from __future__ import annotations

from diffusers import UNetMotionModel
from torch import Tensor

from fewstep.attention import KVView
from fewstep.models.adapters.unet import UNet


class AnimateDiff(UNet):
    """Clips `[B, 4, F, h, w]` of at most `motion_max_seq_length` frames (32; trained on 16)."""

    network = UNetMotionModel

    def _check(self, x: Tensor, t: Tensor, kv: KVView | None) -> None:
        super()._check(x, t, kv)
        longest = self.config["motion_max_seq_length"]
        if x.shape[2] > longest:
            raise ValueError(f"this AnimateDiff knows positions of {longest} frames, got a clip of {x.shape[2]}")
