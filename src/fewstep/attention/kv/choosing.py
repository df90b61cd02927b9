"""A memory that keeps all frames, and of which a chunk reads some."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.attention.kv.cache import KVCache


def chosen(memory: KVCache, score_BS: Tensor, sink: int, frames: int, recent: int) -> KVCache:
    """The first `sink` and the newest `recent` frames, and the `frames` others of the highest score: those of each sample, in the
    order of the stream. All frames, where they are no more than that."""
    held, batch = memory.positions.shape[-1], len(score_BS)
    if held <= sink + frames + recent:
        return memory
    positions = memory.positions.expand(batch, -1)
    always = (positions < sink) | (positions >= memory.start[..., None] - recent)
    score_BS = score_BS.detach().float().cpu().masked_fill(always, torch.inf)
    best = score_BS.argsort(dim=-1, descending=True, stable=True)[:, : sink + frames + recent]
    return memory.keeping(best.sort(-1).values)
