"""Frames to latents and back, one frame at a time.

All padding is circular and nothing looks beyond a neighbourhood, so a frame shifted by 4 pixels (around the edges) has
exactly its latents shifted by 1. Legend: K frames of the whole batch (B x F folded together).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.core.bounds import Depth, Size
from fewstep.models.decoding import FrameByFrame


class FrameAutoencoder(FrameByFrame, nn.Module):
    """Compresses each frame by 4 x 4 pixels; about one million parameters at the default size."""

    downsample: int = 4

    def __init__(self, *, latent_channels: Size = 4, width: Size = 48, depth: Depth = 2) -> None:
        super().__init__()
        self.args = {"latent_channels": latent_channels, "width": width, "depth": depth}
        self.latent_channels = latent_channels
        wide = 2 * width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            _conv(48, wide),
            *(_Residual(wide) for _ in range(depth)),
            nn.SiLU(),
            nn.Conv2d(wide, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            _conv(latent_channels, wide),
            *(_Residual(wide) for _ in range(depth)),
            nn.Conv2d(wide, 4 * width, 1),
            nn.PixelShuffle(2),
            *(_Residual(width) for _ in range(depth)),
            nn.Conv2d(width, 2 * width, 1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            _conv(width // 2, 3),
        )
        self.register_buffer("mean", torch.zeros(latent_channels))
        self.register_buffer("std", torch.ones(latent_channels))

    def encode(self, frames: Tensor, *, autocast: bool = False) -> Tensor:
        """`[B, 3, F, H, W]` in [-1, 1] to latents `[B, C, F, H/4, W/4]` with mean 0 and deviation 1 per channel.

        With `autocast` convolutions are computed in bfloat16, otherwise nothing is.
        """
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=autocast):
            raw = self.encode_raw(frames)
        return (raw - _channels(self.mean)) / _channels(self.std)

    def decode(self, latents: Tensor) -> Tensor:
        """The frames, not clamped."""
        return self.decode_raw(latents * _channels(self.std) + _channels(self.mean))

    def encode_raw(self, frames: Tensor) -> Tensor:
        """Latents before normalisation, for training."""
        return _per_frame(self.encoder, frames)

    def decode_raw(self, latents: Tensor) -> Tensor:
        return _per_frame(self.decoder, latents)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and deviation `[C]` of `encode_raw` over the data."""
        if not bool((std > 0).all()):
            raise ValueError(f"latent deviations must be positive, got {std.tolist()}")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`(C, F, h, w)` of a clip; ValueError if the size cannot be encoded."""
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"height and width must be multiples of {self.downsample}, got {height} x {width}")
        return self.latent_channels, num_frames, height // self.downsample, width // self.downsample


class _Residual(nn.Module):
    """`x + conv(silu(conv(silu(x))))`, the identity at the start; no norm, so that brightness is not forgotten."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = _conv(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, padding_mode="circular")


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _per_frame(network: nn.Module, video: Tensor) -> Tensor:
    images_KCHW = video.transpose(1, 2).flatten(0, 1)
    made_KCHW = network(images_KCHW.contiguous(memory_format=torch.channels_last))
    return made_KCHW.unflatten(0, (video.shape[0], -1)).transpose(1, 2).to(video.dtype)
