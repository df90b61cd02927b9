"""Frames to latents and back with diffusers' image autoencoders, one frame at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from fewstep.models.adapters.unets.unet import to_clips, to_images
from fewstep.models.decoding import FrameByFrame


class FrameCodec(FrameByFrame, nn.Module):
    """The autoencoder of Stable Diffusion and AnimateDiff; `chunk` frames at once, in float32 unless told otherwise.

    `config` is the arguments of diffusers' class; its scaling factor (0.18215) is part of the latents. The denoiser takes
    latents whose rows and columns are multiples of `patch`. With `tiling` large frames are done in overlapping tiles, which
    need less memory and are not exactly the whole.
    """

    folders: ClassVar[tuple[str, ...]] = ("vae",)
    chunks_in_tiles: ClassVar[bool] = True

    def __init__(self, *, config: dict[str, Any], patch: int = 1, tiling: bool = False, chunk: int = 16) -> None:
        super().__init__()
        self.args = {"config": config, "patch": patch, "tiling": tiling, "chunk": chunk}
        self.patch, self.chunk = patch, chunk
        self._hold(AutoencoderKL.from_config(config))

    def load(self, folder: Path) -> None:
        """Take the weights of a folder in diffusers' layout, as float32."""
        self._hold(
            AutoencoderKL.from_pretrained(
                folder, subfolder=self.folders[0], torch_dtype=torch.float32, use_safetensors=True
            )
        )

    def _hold(self, vae: AutoencoderKL) -> None:
        self.vae, self.scale, self.shift = vae, vae.config.scaling_factor, vae.config.shift_factor or 0.0
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)
        self.tile(bool(self.args["tiling"]))

    def tile(self, on: bool) -> None:
        """Do large frames in tiles from now on, or no more."""
        self.vae.enable_tiling() if on else self.vae.disable_tiling()

    def encode(self, frames: Tensor, *, autocast: bool = False) -> Tensor:
        """`[B, 3, F, H, W]` in [-1, 1] to latents `[B, C, F, H / 8, W / 8]`: the mode of the posterior.

        With `autocast` convolutions are computed in bfloat16.
        """
        self.latent_shape(*frames.shape[2:])
        modes = self._per_frame(lambda x: self.vae.encode(x).latent_dist.mode(), frames, autocast)
        return (modes - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """The frames, not clamped."""
        return self._per_frame(lambda z: self.vae.decode(z / self.scale + self.shift).sample, latents)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`(C, F, h, w)` of a clip; ValueError if the size cannot be encoded."""
        unit = self.downsample * self.patch
        if height % unit or width % unit:
            raise ValueError(f"height and width must be multiples of {unit}, got {height} x {width}")
        return self.vae.config.latent_channels, num_frames, height // self.downsample, width // self.downsample

    def _per_frame(self, change: Callable[[Tensor], Tensor], video: Tensor, autocast: bool = False) -> Tensor:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=autocast):
            made = [change(images) for images in to_images(video).float().split(self.chunk)]
        return to_clips(torch.cat(made), video.shape[2]).to(video.dtype)
