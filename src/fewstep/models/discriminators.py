"""Small heads that tell real from made, on features of a denoiser (as in DMD2, 2405.14867)."""

from __future__ import annotations

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
