"""Stable Diffusion 1.x and 2.x (2112.10752): an image model, which sees the frames of a clip one by one.

SD 1.x predicts eps on `Betas(schedule="scaled_linear")`. With one frame it is the image model itself.
"""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from fewstep.models.adapters.unet import UNet


class StableDiffusion(UNet):
    """Clips `[B, 4, F, h, w]` as `B x F` images under the text and time of their clip."""

    network = UNet2DConditionModel
