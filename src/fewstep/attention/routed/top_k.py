"""Each block of queries reads the few most similar blocks of keys (MoBA, 2502.13189; VSA, 2505.13389).

    1  q, k in blocks of `block` tokens, in the order of the tokens; the last one may be shorter
    2  score of a pair of blocks = mean of the queries . mean of the keys          (per head, no gradient)
    3  each block of queries keeps itself and the best of the others, `keep` of all
    4  softmax attention over the tokens of the blocks that are kept, gathered

Not from the papers: blocks are runs of tokens, not tiles or cubes, so that every size of clip can be cut.
Legend: as in `pattern.py`; Q, K blocks of queries and of keys, R blocks that are read, T tokens of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.attention.kernels import attend
from fewstep.attention.pattern import Operation, Pattern, Site
from fewstep.core.bounds import Fraction, Size


@dataclass(frozen=True)
class TopK(Pattern):
    """Block-sparse attention by a router without parameters: the best `keep` of all blocks, always its own."""

    block: Size = 64
    """Tokens per block."""
    keep: Fraction = 0.25
    """Share of the blocks of keys that each block of queries reads, rounded up; 1 is dense attention, bit for bit."""

    def __post_init__(self) -> None:
        if self.block < 1 or not 0 < self.keep <= 1:
            raise ValueError(f"block must be at least 1 and keep in (0, 1], got block={self.block}, keep={self.keep}")

    def operation(self, layer: int, heads: int, width: int) -> Operation:
        return _Gathered(self)

    def check(self, site: Site) -> None:
        if site.readable_B11M is not None and site.readable_B11M.is_floating_point():
            raise ValueError(
                "a router cannot weigh the past less than the rest; set the stream's past_weight to 1, or take another pattern"
            )


class _Gathered(Operation):
    def __init__(self, pattern: TopK) -> None:
        super().__init__()
        self.block, self.keep = pattern.block, pattern.keep

    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> Tensor:
        routes_BHQR = self.routes(q_BHND, k_BHMD, _clip_keys(site))
        blocks = _count(k_BHMD.shape[2], self.block)
        chosen = torch.zeros(*routes_BHQR.shape[:3], blocks, dtype=torch.bool, device=q_BHND.device)
        chosen.scatter_(3, routes_BHQR, True)
        chosen = chosen.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)
        return chosen[:, :, : q_BHND.shape[2], : k_BHMD.shape[2]]

    def forward(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, site: Site) -> Tensor:
        beside = site.beside
        blocks = _count(k_BHMD.shape[2] - beside, self.block)
        if math.ceil(self.keep * blocks) >= blocks:
            return attend(q_BHND, k_BHMD, v_BHMD, site.readable_B11M)
        q, k, v = (x[:, :, beside:] for x in (q_BHND, k_BHMD, v_BHMD))
        text = [k_BHMD[:, :, :beside], v_BHMD[:, :, :beside]]
        read = self._read(q, k, v, text, site)
        if not beside:
            return read
        return torch.cat([attend(q_BHND[:, :, :beside], k_BHMD, v_BHMD, site.readable_B11M), read], 2)

    @torch.no_grad()
    def routes(self, q_BHND: Tensor, k_BHMD: Tensor, readable_B11M: Tensor | None) -> Tensor:
        """Which blocks of keys each block of queries reads, `[B, H, Q, R]`, the best first."""  # lines 2 and 3
        k_mean = _means(k_BHMD, self.block, readable_B11M)
        scores_BHQK = _means(q_BHND, self.block, None) @ k_mean.mT
        if readable_B11M is not None:
            empty_B11K = ~_cut(readable_B11M.mT, self.block).any(3).mT
            scores_BHQK = scores_BHQK.masked_fill(empty_B11K, -torch.inf)
        queries, keys = scores_BHQK.shape[2:]
        past = k_BHMD.shape[2] - q_BHND.shape[2]  # the call's own tokens are the last
        own = torch.arange(queries, device=q_BHND.device) * self.block + past
        low, high = own // self.block, (own + self.block - 1).clamp_max(k_BHMD.shape[2] - 1) // self.block
        scores_BHQK[:, :, torch.arange(queries), low] = torch.inf
        scores_BHQK[:, :, torch.arange(queries), high] = torch.inf
        return scores_BHQK.topk(min(keys, max(math.ceil(self.keep * keys), 1 + (past % self.block > 0))), -1).indices

    def _read(self, q: Tensor, k: Tensor, v: Tensor, text: list[Tensor], site: Site) -> Tensor:
        """Line 4, for the queries of the clip: a few blocks of them at a time, which read as many keys as there are."""
        batch, heads, queries, _ = q.shape
        clip_keys, words = _clip_keys(site), q.new_ones(batch, 1, 1, site.beside, dtype=torch.bool)
        if site.readable_B11M is not None:
            words = site.readable_B11M[..., : site.beside].expand(batch, -1, -1, -1)
        keys = torch.ones(batch, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
        keys = keys if clip_keys is None else keys & clip_keys
        seen_BHMD = keys.mT.expand(-1, heads, -1, -1)
        blocks = [_cut(x, self.block) for x in (k, v, seen_BHMD)]
        beside = [*text, words.mT.expand(-1, heads, -1, -1)]
        routes_BHQR = self.routes(q, k, clip_keys)
        some = max(1, blocks[0].shape[2] // routes_BHQR.shape[3])
        parts = zip(_cut(q, self.block).split(some, 2), routes_BHQR.split(some, 2), strict=True)
        return torch.cat([_gathered(q_BHQTD, routes, blocks, beside) for q_BHQTD, routes in parts], 2)[:, :, :queries]


def _gathered(q_BHQTD: Tensor, routes_BHQR: Tensor, blocks: list[Tensor], beside: list[Tensor]) -> Tensor:
    """Blocks of queries, each with the text and the blocks of keys on its route, `[B, H, Q T, D]`."""
    heads, count = q_BHQTD.shape[1:3]
    k, v, seen = (
        torch.cat([words[:, :, None].expand(-1, -1, count, -1, -1), _gather(x, routes_BHQR)], 3)
        for words, x in zip(beside, blocks, strict=True)
    )
    q, k, v, seen = (x.flatten(1, 2) for x in (q_BHQTD, k, v, seen))  # a head for each block
    return attend(q, k, v, seen.mT).unflatten(1, (heads, -1)).flatten(2, 3)


def _clip_keys(site: Site) -> Tensor | None:
    """Which keys of clips may be read."""
    return None if site.readable_B11M is None else site.readable_B11M[..., site.beside :]


def _count(tokens: int, block: int) -> int:
    return -(-tokens // block)


def _cut(x: Tensor, block: int) -> Tensor:
    """`[B, H, N, D]` in blocks, `[B, H, Q, T, D]`, filled up with zeros (False)."""
    padded = F.pad(x, (0, 0, 0, _count(x.shape[2], block) * block - x.shape[2]))
    return padded.unflatten(2, (-1, block))


def _means(x: Tensor, block: int, readable_B11M: Tensor | None) -> Tensor:
    """The mean token of each block, `[B, H, Q, D]`, of the tokens that may be read."""
    weight = torch.ones_like(x[:, :1, :, :1]) if readable_B11M is None else readable_B11M.mT.to(x)
    total = _cut(weight, block).sum(3)
    return _cut(x * weight, block).sum(3) / total.clamp_min(1)


def _gather(blocks_BHKTD: Tensor, routes_BHQR: Tensor) -> Tensor:
    """The tokens of the blocks that each block of queries reads, `[B, H, Q, R T, D]`."""
    queries, read = routes_BHQR.shape[2:]
    flat = routes_BHQR.flatten(2)[..., None, None].expand(-1, -1, -1, *blocks_BHKTD.shape[3:])
    return blocks_BHKTD.gather(2, flat).unflatten(2, (queries, read)).flatten(3, 4)
