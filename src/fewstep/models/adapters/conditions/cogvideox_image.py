"""First frame of CogVideoX's image-to-video models: the first latent frame, followed by zeros."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.models.adapters.codecs.codec import VideoCodec


class CogVideoXImage(nn.Module):
    """It has no weights of its own: images go through the codec."""

    folders: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.args: dict[str, object] = {}

    def load(self, folder: Path) -> None:
        """There is nothing to load."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its conditions in `Cond.extra`."""
        return ("image_latents",)

    @property
    def needs_last(self) -> bool:
        """Whether a clip needs its last image as well as its first."""
        return False

    @torch.no_grad()
    def encode(
        self, image: Tensor, codec: VideoCodec, num_frames: int, last_image: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Conditions for images `[B, 3, H, W]` in [-1, 1] at the clips' size: `image_latents` `[B, C, F, h, w]` of `Cond.extra`.

        The mode of the posterior, where diffusers draws from it. ValueError for a last image.
        """
        if last_image is not None:
            raise ValueError("this model reads the first image of a clip only; leave out last_image (--last-image)")
        first = codec.encode(image[:, :, None])[:, :, :1]
        config = codec.vae.config
        if config.get("invert_scale_latents"):  # of models that were trained on images divided by the factor
            first = first / config.scaling_factor**2
        _, frames, _, _ = codec.latent_shape(num_frames, *image.shape[2:])
        later = first.new_zeros(*first.shape[:2], frames - 1, *first.shape[3:])
        return {"image_latents": torch.cat([first, later], 2)}

    def blank(self, batch: int, codec: VideoCodec, size: tuple[int, int, int]) -> dict[str, Tensor]:
        """What `encode` would make of clips of `size` `(F, H, W)`, all zero."""
        return {"image_latents": torch.zeros(batch, *codec.latent_shape(*size))}
