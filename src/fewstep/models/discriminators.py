"""Small heads that distinguish real from generated clips by a denoiser's features (DMD2, 2405.14867; AVDM2, 2412.05899)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FeatureHeads(nn.Module):
    """One head per feature layer: `[B, width, F, h, w]` each, every layer with its own width and size, to one logit each."""

    def __init__(self, widths: Sequence[int], layers: Sequence[int], hidden: int = 64) -> None:
        super().__init__()
        self.args = {"widths": list(widths), "layers": list(layers), "hidden": hidden}
        self.layers = tuple(layers)
        self.heads = nn.ModuleList(_Head(width, hidden) for width, _ in zip(widths, self.layers, strict=True))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits `[B, len(layers)]`; large means real."""
        logits = [head(volume) for head, volume in zip(self.heads, features, strict=True)]
        return torch.cat(logits, -1).to(features[0].dtype)


class JointHead(nn.Module):
    """All feature layers, each `[B, width, F, h, w]` of its own width and size, to one logit per patch.

    A branch per layer halves height and width; the branches are pooled to the coarsest of them and meet in one convolution.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 64) -> None:
        super().__init__()
        self.args = {"widths": list(widths), "hidden": hidden}
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(width, hidden, 3, stride=(1, 2, 2), padding=1),
                nn.GroupNorm(min(32, hidden), hidden),
                nn.SiLU(),
            )
            for width in widths
        )
        self.logit = nn.Conv3d(hidden * len(widths), 1, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits `[B, patches]`, without a sigmoid; large means real."""
        volumes = [branch(volume) for branch, volume in zip(self.branches, features, strict=True)]
        coarsest = min((volume.shape[2:] for volume in volumes), key=math.prod)
        volumes = [nn.functional.adaptive_avg_pool3d(volume, coarsest) for volume in volumes]
        return self.logit(torch.cat(volumes, 1)).flatten(1).to(features[0].dtype)


class _Head(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv3d(width, hidden, 1),
            nn.GroupNorm(8, hidden),
            nn.SiLU(),
            nn.Conv3d(hidden, hidden, 3, stride=(1, 2, 2), padding=1),
            nn.SiLU(),
        )
        self.logit = nn.Linear(hidden, 1)

    def forward(self, volume: Tensor) -> Tensor:
        return self.logit(self.convs(volume).mean((2, 3, 4)))
