"""Small heads that distinguish real from generated clips by a denoiser's features (DMD2, 2405.14867; AVDM2, 2412.05899;
mobile adversarial distillation, 2507.13343; Seaweed-APT, 2501.08316).

Legend: B batch, F frames, P patches of a frame or of a clip, N tokens, E width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.attention import Grid3, attend
from fewstep.models.rotary import FrameRotary
from fewstep.models.video_dit import MLP, merge_heads, rms_norm, split_heads


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
        return self.logit(torch.cat(_pooled(volumes), 1)).flatten(1).to(features[0].dtype)


class BlockHead(nn.Module):
    """All feature layers, each `[B, width, F, h, w]` of its own width and size, to one logit per patch, through one block of a
    diffusion transformer, in which every patch sees the whole clip.

    Layers are pooled to the coarsest of them, projected to `hidden` channels each, and added. A fresh head gives every clip the
    logit 0, so that it does not push a student before it has learnt anything.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 256, heads: int = 4) -> None:
        super().__init__()
        if hidden % (2 * heads) or hidden // heads < 6:
            raise ValueError(f"hidden / heads must be an even number >= 6, got {hidden} / {heads}")
        self.args = {"widths": list(widths), "hidden": hidden, "heads": heads}
        self.projectors = nn.ModuleList(nn.Linear(width, hidden) for width in widths)
        self.block = _Block(hidden, heads)
        self.logit = nn.Linear(hidden, 1)
        for linear in (self.block.out, self.block.mlp.down, self.logit):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits `[B, patches]`; large means real."""
        volumes = _pooled(features)
        tokens_BNE = [volume.flatten(2).transpose(1, 2) for volume in volumes]
        pairs = zip(self.projectors, tokens_BNE, strict=True)
        x_BNE = torch.stack([projector(_norm(tokens)) for projector, tokens in pairs]).sum(0)
        x_BNE = self.block(x_BNE, Grid3(*volumes[0].shape[2:]))
        return self.logit(_norm(x_BNE)).squeeze(-1).to(features[0].dtype)


class QueryHead(nn.Module):
    """All feature layers, each `[B, width, F, h, w]` of its own width and size, to one logit per clip: on each layer one learned
    query attends to all patches, and what the queries find is joined (Seaweed-APT). With `framewise` a query attends to one
    frame of the features at a time, and each frame has a logit (AAPT, 2506.09350).

    A head adds no places to the patches: it knows the order of frames from features that know it. Layers are pooled to the
    coarsest of them. A fresh head gives the logit 0.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 256, heads: int = 4, *, framewise: bool = False) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"heads must divide hidden, got {heads} and {hidden}")
        self.args = {"widths": list(widths), "hidden": hidden, "heads": heads, "framewise": framewise}
        self.framewise = framewise
        self.queries = nn.ModuleList(_Query(width, hidden, heads) for width in widths)
        self.logit = nn.Linear(hidden * len(widths), 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits `[B, 1]`, or `[B, F]` with `framewise`; large means real."""
        tokens_BFPE = [volume.flatten(3).permute(0, 2, 3, 1) for volume in _pooled(features)]
        sets = [x.flatten(0, 1) if self.framewise else x.flatten(1, 2) for x in tokens_BFPE]
        found = [query(tokens) for query, tokens in zip(self.queries, sets, strict=True)]
        return self.logit(_norm(torch.cat(found, -1))).reshape(len(features[0]), -1).to(features[0].dtype)


class _Query(nn.Module):
    """One learned query that attends to tokens `[N, P, width]`: what it finds, `[N, hidden]`."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, 1, hidden))
        self.key_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, tokens_NPE: Tensor) -> Tensor:
        k, v = (split_heads(y, self.heads) for y in self.key_value(_norm(tokens_NPE)).chunk(2, -1))
        q = split_heads(self.query.to(k).expand(len(tokens_NPE), -1, -1), self.heads)
        return self.out(merge_heads(attend(q, k, v))).squeeze(1)


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


class _Block(nn.Module):
    """Self-attention and an MLP. There is no modulation and no text: features know the time and the prompt."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.rotary = heads, FrameRotary(width // heads, 100.0, halves=True)
        self.qkv = nn.Linear(width, 3 * width)
        self.query_scale = nn.Parameter(torch.ones(width // heads))
        self.key_scale = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x_BNE: Tensor, grid: Grid3) -> Tensor:
        table = self.rotary.table(torch.arange(grid.frames), grid, x_BNE)
        q, k, v = (split_heads(y, self.heads) for y in self.qkv(_norm(x_BNE)).chunk(3, -1))
        q, k = rms_norm(q, self.query_scale), rms_norm(k, self.key_scale)
        q, k = (self.rotary.turn(y, table).to(v) for y in (q, k))
        x_BNE = x_BNE + self.out(merge_heads(attend(q, k, v)))
        return x_BNE + self.mlp(_norm(x_BNE))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _pooled(volumes: Sequence[Tensor]) -> list[Tensor]:
    """Volumes `[B, width, F, h, w]` at the size of the coarsest of them."""
    coarsest = min((volume.shape[2:] for volume in volumes), key=math.prod)
    return [x if x.shape[2:] == coarsest else F.adaptive_avg_pool3d(x, coarsest) for x in volumes]
