"""Pixels to latents and back by one of diffusers' video autoencoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn


class VideoCodec(nn.Module):
    """Latents have mean 0 and deviation 1 per channel, as the denoiser knows them; always computed in float32.

    `config` is the arguments of diffusers' class; the denoiser takes latents in whole patches of `patch` rows and columns.
    With `tiling` large frames are done in overlapping tiles, which need less memory and are not exactly the whole.
    """

    folders: ClassVar[tuple[str, ...]] = ("vae",)

    def __init__(self, *, config: dict[str, Any], patch: int = 1, tiling: bool = False) -> None:
        super().__init__()
        self.args = {"config": config, "patch": patch, "tiling": tiling}
        self.patch = patch
        self._hold(AutoencoderKLWan.from_config(config))

    def load(self, folder: Path) -> None:
        """Take the weights of a folder in diffusers' layout, as float32."""
        self._hold(
            AutoencoderKLWan.from_pretrained(
                folder, subfolder=self.folders[0], torch_dtype=torch.float32, use_safetensors=True
            )
        )

    def _hold(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        if self.args["tiling"]:
            vae.enable_tiling()

    def encode(self, frames: Tensor) -> Tensor:
        """`[B, 3, F, H, W]` in [-1, 1] to latents `[B, C, (F - 1) / 4 + 1, H / 8, W / 8]`: the mode of the posterior."""
        self.latent_shape(*frames.shape[2:])
        mean, std = self._statistics(frames)
        with torch.autocast(frames.device.type, enabled=False):
            return (self.vae.encode(frames.float()).latent_dist.mode() - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """The frames, in [-1, 1]."""
        mean, std = self._statistics(latents)
        with torch.autocast(latents.device.type, enabled=False):
            frames: Tensor = self.vae.decode(latents.float() * std + mean).sample
        return frames

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`(C, F, h, w)` of a clip; ValueError if the size cannot be encoded."""
        config = self.vae.config
        time, space = config.scale_factor_temporal, config.scale_factor_spatial
        if num_frames % time != 1:
            near = num_frames // time * time + 1
            raise ValueError(f"num_frames must be {time} k + 1 for this codec, such as {near}, got {num_frames}")
        if height % (space * self.patch) or width % (space * self.patch):
            raise ValueError(f"height and width must be multiples of {space * self.patch}, got {height} x {width}")
        return config.z_dim, num_frames // time + 1, height // space, width // space

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = (torch.tensor(values, device=like.device) for values in (config.latents_mean, config.latents_std))
        return mean[:, None, None, None], std[:, None, None, None]
