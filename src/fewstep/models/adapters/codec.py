"""Pixels to latents and back by one of diffusers' video autoencoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import torch
from torch import Tensor, nn

Kind = Literal[
    "AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
]  # fmt: skip


class VideoCodec(nn.Module):
    """Latents have mean 0 and deviation 1 per channel, as the denoiser knows them; computed clip by clip, in float32.

    `config` is the arguments of diffusers' class `kind`; the denoiser takes latents in whole patches of `patch` rows and
    columns. With `tiling` large frames are done in overlapping tiles, which need less memory and are not exactly the whole.
    """

    folders: ClassVar[tuple[str, ...]] = ("vae",)
    one_at_a_time: ClassVar[bool] = True
    """Clips of a batch are encoded one after the other: some of these autoencoders can do no more."""

    def __init__(
        self, *, config: dict[str, Any], kind: Kind = "AutoencoderKLWan", patch: int = 1, tiling: bool = False
    ) -> None:
        super().__init__()
        self.args = {"config": config, "kind": kind, "patch": patch, "tiling": tiling}
        self.kind, self.patch = getattr(diffusers, kind), patch
        self._hold(self.kind.from_config(config))

    def load(self, folder: Path) -> None:
        """Take the weights of a folder in diffusers' layout, as float32."""
        self._hold(
            self.kind.from_pretrained(
                folder, subfolder=self.folders[0], torch_dtype=torch.float32, use_safetensors=True
            )
        )

    def _hold(self, vae: Any) -> None:
        self.vae = vae
        if self.args["tiling"]:
            vae.enable_tiling()

    @property
    def factors(self) -> tuple[int, int]:
        """Frames per latent frame, and pixels per latent row and column."""
        vae, config = self.vae, self.vae.config
        if "scale_factor_temporal" in config:  # Wan
            return config.scale_factor_temporal, config.scale_factor_spatial
        if "spatial_compression_ratio" in config:  # LTX, Hunyuan
            return vae.temporal_compression_ratio, vae.spatial_compression_ratio
        return config.temporal_compression_ratio, 2 ** (len(config.block_out_channels) - 1)  # CogVideoX

    def encode(self, frames: Tensor, *, autocast: bool = False) -> Tensor:
        """`[B, 3, F, H, W]` in [-1, 1] to latents `[B, *latent_shape(F, H, W)]`: the mode of the posterior.

        With `autocast` convolutions are computed in bfloat16.
        """
        self.latent_shape(*frames.shape[2:])
        mean, std = self._statistics(frames)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=autocast):
            modes = [self.vae.encode(clip).latent_dist.mode() for clip in frames.float().split(1)]
        return (torch.cat(modes).float() - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """The frames, in [-1, 1]. A decoder that reads a time is given 0, as diffusers does."""
        mean, std = self._statistics(latents)
        reads_time = self.vae.config.get("timestep_conditioning", False)
        time = {"temb": torch.zeros(1, device=latents.device)} if reads_time else {}
        with torch.autocast(latents.device.type, enabled=False):
            clips = (latents.float() * std + mean).split(1)
            return torch.cat([self.vae.decode(clip, **time).sample for clip in clips])

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`(C, F, h, w)` of a clip; ValueError if the size cannot be encoded."""
        config, (time, space) = self.vae.config, self.factors
        if num_frames % time != 1:
            near = num_frames // time * time + 1
            raise ValueError(f"num_frames must be {time} k + 1 for this codec, such as {near}, got {num_frames}")
        if height % (space * self.patch) or width % (space * self.patch):
            raise ValueError(f"height and width must be multiples of {space * self.patch}, got {height} x {width}")
        channels = config["z_dim"] if "z_dim" in config else config["latent_channels"]
        return channels, num_frames // time + 1, height // space, width // space

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's own latents, which its config or its weights name."""
        config = self.vae.config
        known = {**config, **dict(self.vae.named_buffers(recurse=False))}

        def per_channel(name: str, otherwise: float) -> Tensor:
            value = otherwise if known.get(name) is None else known[name]
            return torch.as_tensor(value, dtype=torch.float32, device=like.device).reshape(-1, 1, 1, 1)

        return per_channel("latents_mean", 0.0), per_channel("latents_std", 1.0) / config.get("scaling_factor", 1.0)
