"""Slots of a memory: which frame takes which, and the tokens that go with it.

Legend: B batch, H heads, S slots, f frames of a chunk, T tokens of a frame, D head dimension, N numbers of a prototype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.attention.kv.standing import EMPTY
from fewstep.core import KV

if TYPE_CHECKING:
    from fewstep.attention.kv.cache import KVCache


def with_room(memory: KVCache, delta: tuple[KV, ...], frames: int, slots: int) -> KVCache:
    """`memory` with so many slots, all of them empty before its first chunk."""
    if memory.layers:
        return memory
    tokens = slots * (delta[0][0].shape[2] // frames)
    layers = tuple((_room(k, tokens), _room(v, tokens)) for k, v in delta)
    return replace(
        memory, layers=layers, positions=memory.start[..., None].expand(*memory.start.shape, slots) * 0 + EMPTY
    )


def ring(memory: KVCache, delta: tuple[KV, ...], frames: int, sink: int, slots: int) -> tuple[KVCache, Tensor]:
    """The memory after its new frames took their slots, and which new frame each slot took, `[S]` or `[B, S]` (-1: none).

    The first `sink` frames have slots of their own; others take the slot of the oldest frame that is no sink.
    """
    memory = with_room(memory, delta, frames, slots)
    new = memory.coming(frames)
    slot = torch.where(new < sink, new, sink + (new - sink) % max(slots - sink, 1))
    fits = (new >= sink) & (new >= memory.start[..., None] + frames - (slots - sink)) | (new < sink)
    taken = _taken(slot, fits, slots)
    return placed(memory, delta, frames, taken), taken


def leaving(before: KVCache, taken: Tensor, frames: int, sink: int) -> Iterator[Tensor]:
    """Which slot a frame leaves, `[S]` or `[B, S]`, in the order of their age: as the new ones of `ring` come. The sink stays."""
    for new in range(frames):
        left = (taken == new) & (before.positions >= sink)
        if bool(left.any()):
            yield left


def placed(memory: KVCache, delta: tuple[KV, ...], frames: int, taken: Tensor) -> KVCache:
    """The memory after every slot took the new frame `taken` `[S]` or `[B, S]`, or kept its own (-1)."""
    new, index = memory.coming(frames), taken.clamp_min(0)
    if taken.ndim > new.ndim:
        new = new.expand(len(taken), -1)
    positions = torch.where(taken >= 0, new.gather(-1, index), memory.positions)
    layers = tuple(
        (_placed(old_k, k, taken, frames), _placed(old_v, v, taken, frames))
        for (old_k, old_v), (k, v) in zip(memory.layers, delta, strict=True)
    )
    return replace(memory, layers=layers, positions=positions, start=memory.start + frames)


def appended(memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
    """The memory with the new frames behind the others."""
    layers = delta
    if memory.layers:
        layers = tuple(
            (torch.cat([old_k, k], 2), torch.cat([old_v, v], 2))
            for (old_k, old_v), (k, v) in zip(memory.layers, delta, strict=True)
        )
    positions, new = memory.positions, memory.coming(frames)
    if positions.ndim > new.ndim:
        new = new.expand(*positions.shape[:-1], -1)
    positions = torch.cat([positions.expand(*new.shape[:-1], -1), new], -1)
    return replace(memory, layers=layers, positions=positions, start=memory.start + frames)


def frames_of(x_BHMD: Tensor, slots: Tensor, held: int) -> Tensor:
    """The tokens of slots `[n]` or `[B, n]`, of `held` in all."""
    x_BHSTD, slots = x_BHMD.unflatten(2, (held, -1)), slots.to(x_BHMD.device)
    if slots.ndim == 1:
        return x_BHSTD.index_select(2, slots).flatten(2, 3)
    return torch.take_along_dim(x_BHSTD, slots[:, None, :, None, None], 2).flatten(2, 3)


def noted(note_BSN: Tensor, slots: Tensor) -> Tensor:
    """What is noted of slots `[n]` or `[B, n]`."""
    slots = slots.to(note_BSN.device)
    return note_BSN[:, slots] if slots.ndim == 1 else torch.take_along_dim(note_BSN, slots[:, :, None], 1)


def prototypes(delta: tuple[KV, ...], frames: int) -> Tensor:
    """One direction per frame, `[B, f, N]`: its mean key in each layer and head, of length 1 there, scaled so that the product of
    two frames is the mean cosine of all layers and heads. Keys are not rotated, so it is of content and not of distance."""
    found = [F.normalize(k.unflatten(2, (frames, -1)).mean(3), dim=-1) for k, _ in delta]  # B H f D each
    every_BAfD = torch.cat(found, 1) / (sum(x.shape[1] for x in found) ** 0.5)
    return every_BAfD.transpose(1, 2).flatten(2)


def _room(like: Tensor, tokens: int) -> Tensor:
    return like.new_zeros(*like.shape[:2], tokens, like.shape[3])


def _taken(slot: Tensor, fits: Tensor, slots: int) -> Tensor:
    """Which of the new frames each slot took (-1: it stays)."""
    here = torch.arange(slots)
    hit = (slot[..., :, None] == here) & fits[..., :, None]  # [..., new, slots]; no two of those that fit share a slot
    order = torch.arange(1, slot.shape[-1] + 1)[:, None]
    return (hit * order).amax(-2) - 1


def _placed(old: Tensor, new: Tensor, taken: Tensor, frames: int) -> Tensor:
    """The tokens of every slot: the new frame's that it took, or the old ones."""
    per_frame, taken = new.shape[2] // frames, taken.to(new.device)
    index = taken.clamp_min(0).expand(len(new), -1)[:, None, :, None, None]
    shape = (-1, new.shape[1], -1, per_frame, new.shape[3])
    chosen = new.unflatten(2, (frames, per_frame)).gather(2, index.expand(shape))
    stays = (taken < 0).expand(len(new), -1)[:, None, :, None, None]
    return torch.where(stays, old.unflatten(2, (-1, per_frame)), chosen).flatten(2, 3)
