"""Stable Diffusion 1.x and 2.x (2112.10752): an image model that processes clips frame by frame.

SD 1.x predicts eps on `Betas(schedule="scaled_linear")`. With one frame it is the image model itself.
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from fewstep.core.types import Cond
from fewstep.diffusion import timestep
from fewstep.models.adapters.ddpm import card_of
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.unets.unet import UNet, to_clips, to_images
from fewstep.models.backbone import Original
from fewstep.models.card import Card


def card(layout: Layout) -> Card:
    """Stable Diffusion as a model of clips of one frame: 50 steps of DDIM, guidance 7.5."""
    return card_of(layout, "StableDiffusion", num_frames=1, steps=50, licence="CreativeML OpenRAIL-M")


class StableDiffusion(UNet):
    """Clips `[B, 4, F, h, w]` as `B x F` images under the text and time of their clip."""

    network = UNet2DConditionModel

    def original(self) -> Original:
        """Pipelines take one image, so only clips of one frame."""
        return super().original()._replace(pack=lambda x: x[:, :, 0])

    def by_original(self, network: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        frames = x.shape[2]
        steps = timestep(t, self.num_train_timesteps).repeat_interleave(frames, 0)
        text = cond.text.to(x.dtype).repeat_interleave(frames, 0)
        return to_clips(network(to_images(x), steps, text, return_dict=False)[0], frames)
