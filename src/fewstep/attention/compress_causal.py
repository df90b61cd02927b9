"""Block-causal attention that leaves learned tokens for its frames (LoViC's FlexFormer, 2507.12952).

    1  local = attention of a chunk over itself and all that is remembered                        (`BlockCausal`)
    2  weight_j = softmax_j(q . k_j / sqrt(D))    over the `ratio` tokens of a row that a learned query stands for
    3  k' = (sum_j weight_j k_j) A,   v' = (sum_j weight_j v_j) B       what is remembered of a frame that has left the window

From the paper: one learned query token, copied, compresses the past at a linear ratio and stands at interpolated positions. Not
from the paper, whose compressor is a network of its own over the whole past: each layer and head has a query, which reads the
keys of its own tokens. q begins at 0 and A, B as the identity: the mean. Keys have no rotary position.
Legend: as in `pattern.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.attention.block_causal import BlockCausal
from fewstep.attention.pattern import Operation, Pattern, Site
from fewstep.core import KV
from fewstep.core.bounds import Count


@dataclass(frozen=True)
class CompressCausal(Pattern):
    """A chunk reads itself and what is remembered, and leaves one learned token in `ratio` for each of its frames.

    Streams take `memory: {type: CompressedMemory, ratio: ...}`. A call has one chunk, because each reads another past:
    `TeacherForced(apart=True)` trains the queries, and in a rollout (`SelfForced`) they stay as they are.
    """

    chunk: Count = 1
    """Latent frames per chunk."""
    ratio: Count = 4
    """Tokens of a row that one learned token stands for; it divides the tokens of a row."""

    @property
    def compresses(self) -> int:
        return self.ratio

    def operation(self, layer: int, heads: int, width: int) -> Operation:
        return _Compressing(self, heads, width)

    def check(self, site: Site) -> None:
        BlockCausal(chunk=self.chunk).check(site)
        if site.grid.frames > self.chunk:
            raise ValueError(
                f"what leaves a memory of compressed frames is known chunk by chunk: call with one chunk of {self.chunk} frames, "
                f"not {site.grid.frames}"
            )
        if site.grid.width % self.ratio:
            raise ValueError(
                f"a row of {site.grid.width} tokens has no groups of {self.ratio}; choose a ratio that divides it"
            )


class _Compressing(Operation):
    def __init__(self, pattern: CompressCausal, heads: int, width: int) -> None:
        super().__init__()
        self.ratio, self.heads = pattern.ratio, heads
        self.query = nn.Parameter(torch.zeros(heads, width))  # q
        self.maps = nn.Parameter(torch.eye(width).repeat(2, heads, 1, 1))  # A, B

    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> None:
        return None

    def finish(self, mixed_BHND: Tensor, qkv: tuple[Tensor, Tensor, Tensor], site: Site) -> tuple[Tensor, KV]:
        _, k, v = qkv
        if k.shape[1] != self.heads:
            raise ValueError("learned tokens belong to all heads of one process; set parallel.sequence: 1")
        if site.call.kv is None or not site.call.kv.compresses:
            return mixed_BHND, (k, v)
        made = self.learned(k, v)
        k, v = (_behind(x, own, site.grid.frames) for x, own in zip((k, v), made, strict=True))
        return mixed_BHND, (k, v)

    def learned(self, k_BHND: Tensor, v_BHND: Tensor) -> KV:
        """Lines 2 and 3: `[B, H, N / ratio, D]` each."""
        k, v = (x.unflatten(2, (-1, self.ratio)) for x in (k_BHND, v_BHND))
        logits = (k * self.query[:, None, None]).sum(-1) * k.shape[-1] ** -0.5
        weight = logits.softmax(-1)[..., None]
        return (weight * k).sum(3) @ self.maps[0], (weight * v).sum(3) @ self.maps[1]


def _behind(own: Tensor, learned: Tensor, frames: int) -> Tensor:
    """The tokens of each frame, and behind them those that stand for it."""
    return torch.cat([x.unflatten(2, (frames, -1)) for x in (own, learned)], 3).flatten(2, 3)
