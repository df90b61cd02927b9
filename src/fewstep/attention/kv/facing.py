"""The past frames that looked at the same place (Matrix-Game 3, 2604.08995; HY-WorldPlay, 2512.14614)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention.kv.cache import Keep, KVCache
from fewstep.attention.kv.choosing import chosen
from fewstep.attention.kv.slots import appended
from fewstep.core import KV
from fewstep.core.bounds import Count, Natural, Positive


@dataclass(frozen=True)
class Facing(Keep):
    """All frames are kept; a chunk reads the sink, the newest frames, and the `frames` others that see most of what it will see.

    The condition's extra `pose` `[B, f, 6]` has six numbers for each latent frame: where the camera is (x, y, z) and where it
    looks (a direction). The overlap of two views is `(1 + cos angle) / 2 * exp(-distance / reach)`: 1 for the same view. Not from
    the papers, which measure the volume that two cameras share; the formula and `reach` are untested on large models.
    """

    frames: Count = 6
    """Frames that are chosen."""
    recent: Count = 3
    """Newest frames, which are always read."""
    sink: Natural = 3
    """First frames of the stream, which are always read."""
    reach: Positive = 8.0
    """Distance at which the overlap has fallen to 1/e, in the units of the poses."""

    @property
    def pinned(self) -> int:
        return self.sink

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        pose = _told(memory, frames)
        notes = torch.cat([memory.notes[0], pose], 1) if memory.notes else pose
        return replace(appended(memory, delta, frames), notes=(notes,))

    def read(self, memory: KVCache) -> KVCache:
        if not memory.notes:
            return memory
        coming = _told(memory)
        score_BS = torch.stack([self.overlap(memory.notes[0], pose) for pose in coming.unbind(1)]).amax(0)
        return chosen(memory, score_BS, self.sink, self.frames, self.recent)

    def overlap(self, views_BSP: Tensor, view_BP: Tensor) -> Tensor:
        """How much views `[B, S, 6]` overlap with one, from 0 to 1: `[B, S]`."""
        away = (views_BSP[..., :3] - view_BP[:, None, :3]).norm(dim=-1)
        cosine = torch.cosine_similarity(views_BSP[..., 3:], view_BP[:, None, 3:], dim=-1)
        return (1 + cosine) / 2 * torch.exp(-away / self.reach)


def _told(memory: KVCache, frames: int | None = None) -> Tensor:
    pose = memory.poses_BfP
    if pose is None or pose.ndim != 3 or pose.shape[2] != 6 or frames not in (None, pose.shape[1]):
        shape = "nothing" if pose is None else f"{list(pose.shape)}"
        raise ValueError(
            "a memory that chooses frames by pose needs the pose of every latent frame of a chunk, [B, f, 6] (place and "
            f"direction), in the condition's extra 'pose'; got {shape}"
        )
    return pose
