"""AnimateDiff (2307.04725): a Stable Diffusion U-Net with motion modules, which are attention along time.

It predicts eps on `Betas(schedule="linear")`, not on the scaled-linear table of the image model it was made from. Motion
modules are published without the rest; `AnimateDiffPipeline.from_pretrained(base, motion_adapter=..., scheduler=...)` of
diffusers joins them, and its `save_pretrained` writes the folder that is read here.
"""

from __future__ import annotations

from diffusers import UNetMotionModel
from torch import Tensor

from fewstep.core import Call
from fewstep.models.adapters.ddpm import card_of
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.unets.unet import UNet
from fewstep.models.card import Card

_FRAMES = 16


def card(layout: Layout) -> Card:
    """AnimateDiff as it was measured as a teacher (2412.05899): 16 frames, 25 steps of DDIM, guidance 7.5."""
    frames = min(_FRAMES, layout.config("unet").get("motion_max_seq_length", _FRAMES))
    licence = "CreativeML OpenRAIL-M (image model), Apache-2.0 (motion modules)"
    return card_of(layout, "AnimateDiff", num_frames=frames, steps=25, licence=licence)


class AnimateDiff(UNet):
    """Clips `[B, 4, F, h, w]` of at most `motion_max_seq_length` frames (32; trained on 16)."""

    network = UNetMotionModel

    def _check(self, x: Tensor, t: Tensor, call: Call) -> None:
        super()._check(x, t, call)
        longest = self.config["motion_max_seq_length"]
        if x.shape[2] > longest:
            raise ValueError(f"this AnimateDiff knows positions of {longest} frames, got a clip of {x.shape[2]}")
