"""The reference network: a diffusion transformer over space-time patches (DiT 2212.09748, PixArt 2310.00426, Wan 2503.20314).

Bidirectional, block-causal and cached are one forward: the pattern says which keys a query reads, a cache view adds
earlier ones, and keys are cached before rotation, so a key's position is decided when it is read.

What touches the latents or the time runs in the precision of the weights; only the blocks follow autocast.
Legend: as in `backbone.py`; P values per patch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.attention import Dense, Grid3, Operation, Pattern
from fewstep.core import KV, Call, Cond
from fewstep.core.bounds import Depth, Positive, Size
from fewstep.models.backbone import Avoided, Backbone, Context, Tokens, Words, read, read_text, words_of
from fewstep.models.experts import Experts
from fewstep.models.rotary import FrameRotary

_TIME_FEATURES = 128
_FASTEST = 100.0
"""Radians per unit of t of the fastest time feature: d/dt of the network stays tame, which jvp methods need."""
_ROTARY_BASE = 100.0


class VideoDiT(Backbone):
    """2-5 M parameters at the default size; head dimension `width / heads` must be even and at least 6."""

    shares = True
    text_first = True
    unmixes = True
    takes_scalars = True
    takes_signals = True

    def __init__(
        self,
        *,
        channels: Size = 4,
        width: Size = 192,
        depth: Depth = 8,
        heads: Depth = 4,
        mlp_ratio: Positive = 4.0,
        patch: Size = 2,
        text_width: Size = 128,
        pattern: Pattern = Dense(),
    ) -> None:
        super().__init__()
        if width % (2 * heads) or width // heads < 6:
            raise ValueError(f"width / heads must be an even number >= 6, got {width} / {heads}")
        self.args = {
            "channels": channels, "width": width, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio, "patch": patch,
            "text_width": text_width, "pattern": pattern.tree(),
        }  # fmt: skip
        self.channels, self.width, self.heads, self.patch, self.pattern = channels, width, heads, patch, pattern
        self.patches = nn.Linear(channels * patch * patch, width)
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled_text = nn.Linear(text_width, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.rotary = FrameRotary(width // heads, _ROTARY_BASE, halves=True)
        operations = (pattern.operation(layer, heads, width // heads) for layer in range(depth))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, text_width, operation) for operation in operations)
        self.final_table = nn.Parameter(torch.zeros(2, width))
        self.out = nn.Linear(width, channels * patch * patch)
        self._initialise()

    def embed(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Tokens:
        grid = self.grid(x)
        with torch.autocast(x.device.type, enabled=False):
            x_BNE = self.patches(patchify(x, self.patch))
            text = cond.text.to(x.dtype)
            time_BGE = (
                self.time(time_features(time_groups(t, x)).to(x.dtype))
                + self.pooled_text(_mean(text, cond.mask))[:, None]
            )
            time_BGE = self.with_scalars(time_BGE, cond)
            modulation = self.modulation(F.silu(time_BGE)).unflatten(-1, (6, self.width))
            modulation = self.with_signals(modulation, cond, grid.frames)
        context = Context(
            modulation_BG6E=modulation,
            text_BLE=text,
            text_mask_B11L=cond.mask[:, None, None],
            rotary=self.rotary,
            table=self.turns(grid, x, call),
            site=self.site(self.pattern, grid, call, x.device),
            avoided=Avoided.of(call, lambda negative: negative.text.to(x.dtype), masked=True),
        )
        return Tokens(x_BNE, time_BGE, grid, context)

    def head(self, state: Tokens) -> Tensor:
        with torch.autocast(state.x_BNE.device.type, enabled=False):
            shift, scale = (self.final_table + state.time_BGE[:, :, None]).unbind(2)
            tokens = self.out(modulate(_norm(state.x_BNE), shift, scale))
        return unpatchify(tokens, state.grid, self.patch)

    def grid(self, x: Tensor) -> Grid3:
        _, channels, frames, height, width = x.shape
        if channels != self.channels or height % self.patch or width % self.patch:
            raise ValueError(
                f"latents [B, C, F, H, W] need C = {self.channels} and H, W multiples of {self.patch}, got {tuple(x.shape)}"
            )
        return Grid3(frames, height // self.patch, width // self.patch)

    def by_time(self, boundaries: Sequence[float]) -> Experts[VideoDiT]:
        return Experts([self, *(copy.deepcopy(self) for _ in boundaries)], boundaries)

    def _initialise(self) -> None:
        """Gates, cross-attention outputs and the last layer start at zero: each block is the identity, the output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.modulation, self.out, *(block.cross.out for block in self.blocks)):
            nn.init.zeros_(linear.weight)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP; each after a norm, the first and last modulated by time."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, text_width: int, operation: Operation) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, width))
        self.attention = SelfAttention(width, heads, operation)
        self.cross = CrossAttention(width, heads, text_width)
        self.mlp = MLP(width, round(width * mlp_ratio))

    def forward(self, state: Tokens) -> Tokens:
        x, context = state.x_BNE, state.context
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (self.table + context.modulation_BG6E).unbind(2)
        mixed, new = self.attention(modulate(_norm(x), shift_a, scale_a), state)
        x = gated(x, mixed, gate_a)
        x = x + self.cross(_norm(x), state.text or self.reads(context), context)
        x = gated(x, self.mlp(modulate(_norm(x), shift_m, scale_m)), gate_m)
        return replace(state, x_BNE=x, new=new)

    def reads(self, context: Context) -> Words:
        """Keys and values of the words."""
        return words_of(context, self.cross.words)


class SelfAttention(nn.Module):
    """Over the tokens of this call and of the past; queries and keys are normalised, then rotated by position."""

    def __init__(self, width: int, heads: int, operation: Operation) -> None:
        super().__init__()
        self.heads, self.operation = heads, operation
        self.qkv = nn.Linear(width, 3 * width)
        self.query_scale = nn.Parameter(torch.ones(width // heads))
        self.key_scale = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)

    def forward(self, x_BNE: Tensor, state: Tokens) -> tuple[Tensor, KV]:
        q, k, v = (split_heads(y, self.heads) for y in self.qkv(x_BNE).chunk(3, -1))
        q, k = rms_norm(q, self.query_scale), rms_norm(k, self.key_scale)
        mixed, new = read(self.operation, (q, k, v), state)
        return self.out(merge_heads(mixed)), new


class CrossAttention(nn.Module):
    """From tokens to the real words of the prompt."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.query_scale = nn.Parameter(torch.ones(width // heads))
        self.key_scale = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)

    def words(self, text_BLE: Tensor) -> KV:
        k, v = (split_heads(y, self.heads) for y in self.kv(text_BLE).chunk(2, -1))
        return rms_norm(k, self.key_scale), v

    def forward(self, x_BNE: Tensor, words: Words, context: Context) -> Tensor:
        q = rms_norm(split_heads(self.q(x_BNE), self.heads), self.query_scale)
        return self.out(merge_heads(read_text(q, words, context)))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def split_heads(x_BNE: Tensor, heads: int) -> Tensor:
    return x_BNE.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BHND: Tensor) -> Tensor:
    return x_BHND.transpose(1, 2).flatten(2)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Unit root mean square over the head dimension, times a learned scale."""
    return F.rms_norm(x, scale.shape, scale.to(x.dtype), 1e-6)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x_BNE: Tensor, shift_BGE: Tensor, scale_BGE: Tensor) -> Tensor:
    """`x (1 + scale) + shift`, where each time group owns an equal run of tokens."""
    x = x_BNE.unflatten(1, (shift_BGE.shape[1], -1))
    return torch.addcmul(shift_BGE[:, :, None], x, 1 + scale_BGE[:, :, None]).flatten(1, 2)


def gated(x_BNE: Tensor, made_BNE: Tensor, gate_BGE: Tensor) -> Tensor:
    """`x + gate made`, likewise."""
    x, made = (y.unflatten(1, (gate_BGE.shape[1], -1)) for y in (x_BNE, made_BNE))
    return torch.addcmul(x, made, gate_BGE[:, :, None]).flatten(1, 2)


def time_features(t: Tensor) -> Tensor:
    """Sines and cosines of t, `[..., 128]`, from 1 to 100 radians per unit."""
    half = _TIME_FEATURES // 2
    rates = torch.exp(torch.linspace(0, math.log(_FASTEST), half, dtype=t.dtype, device=t.device))
    angle = t[..., None] * rates
    return torch.cat([angle.cos(), angle.sin()], -1)


def time_groups(t: Tensor, x: Tensor) -> Tensor:
    """`t` as `[B, G]` in the dtype of x, but float32 at least: 16 bits are too few for a time."""
    batch, frames = x.shape[0], x.shape[2]
    if t.shape not in ((batch,), (batch, frames)):
        raise ValueError(
            f"time must be [{batch}] or [{batch}, {frames}] for latents {tuple(x.shape)}, got {tuple(t.shape)}"
        )
    return (t[:, None] if t.ndim == 1 else t).to(torch.promote_types(x.dtype, torch.float32))


def _mean(text_BLE: Tensor, mask_BL: Tensor) -> Tensor:
    weight = mask_BL[..., None].to(text_BLE.dtype)
    return (text_BLE * weight).sum(1) / weight.sum(1)


def patchify(x_BCFHW: Tensor, patch: int) -> Tensor:
    """`[B, N, P]` with P ordered channel, row, column."""
    x = x_BCFHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # B C F h p w q
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens_BNP: Tensor, grid: Grid3, patch: int) -> Tensor:
    x = tokens_BNP.unflatten(2, (-1, patch, patch)).unflatten(1, grid)  # B F h w C p q
    return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
