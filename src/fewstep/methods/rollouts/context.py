"""Context forcing: teacher and critic read what the student remembered when it made the clip that they judge (2512.14614)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention import Decaying, Int8Memory, KVCache, MovingSink, Window
from fewstep.attention.kv.standing import EMPTY
from fewstep.core import KV, Call, Cond
from fewstep.core.call import Causal
from fewstep.diffusion import NoisePath, Prediction, Standing, Stream
from fewstep.models.by_chunk import clips_of, keys_of
from fewstep.models.denoiser import Predictor
from fewstep.streaming.blocks import keep_of


@dataclass(frozen=True)
class Context:
    """Clean frames of a stream that chunks of a later clip have read, for networks that judge this clip (HY-WorldPlay).

    The frames are a call of their own at time 0, and the clip reads its keys and values, at the places where the student reads
    its memory. So a network that has learned to read clean chunks before noised ones (`TeacherForced`) knows such calls. Of each
    other the frames read earlier ones. They are no part of the clip: no loss is on them.
    """

    latents: Tensor
    """Clean latents `[B, C, S, h, w]`, without gradient; zero where there is no frame."""
    frames: Tensor
    """Number of each in its stream, increasing, int64 `[B, S]` on the CPU; -1: no frame."""
    start: int
    """Number of the clip's first frame."""
    standing: Standing
    """Where the student places remembered frames (`Stream.positions`)."""
    sink: int
    """First frames of the stream that stay in its memory."""

    @classmethod
    def of(cls, stream: Stream, before: Sequence[Tensor], read: Sequence[KVCache]) -> Context | None:
        """What the chunks of a clip have `read` of the chunks `before` it, `[B, C, f, h, w]` each; None if that is nothing."""
        if not before:
            return None
        old = torch.cat(list(before), 2)
        number = torch.arange(old.shape[2])
        seen = torch.zeros(len(old), old.shape[2], dtype=torch.bool)
        for positions in (memory.read().positions for memory in read):
            seen |= (positions[..., None] == number).any(-2)
        if not bool(seen.any()):
            return None
        order = (~seen).long().argsort(dim=1, stable=True)[:, : int(seen.sum(1).max())]
        there = seen.gather(1, order)
        latents = torch.stack([clip[:, rows] for clip, rows in zip(old, order.to(old.device), strict=True)])
        latents = latents * there.to(latents)[:, None, :, None, None]
        frames = torch.where(there, order, EMPTY)
        return cls(latents, frames, old.shape[2], stream.positions, keep_of(stream).pinned)

    def memory(self, layers: tuple[KV, ...], frames: Tensor, clip: int) -> KVCache:
        """These keys and values of the context's `frames`, for a clip of so many frames."""
        keep = Window(window=frames.shape[1] + clip, sink=self.sink)
        return KVCache(keep, layers, frames, torch.tensor(self.start), chunk=clip, standing=self.standing)

    def over(self, network: Predictor) -> _Reminded:
        """`network` as it judges the clip; a call with `n B` samples reads the frames n times."""
        return _Reminded(network, self)


@dataclass(frozen=True)
class _Reminded:
    """A network whose calls read the frames of a context (what `CFG` calls)."""

    network: Predictor
    context: Context

    @property
    def path(self) -> NoisePath:
        return self.network.path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        if told := cond.framewise - {"pose"}:
            raise ValueError(
                f"this model reads {', '.join(sorted(told))} of every frame, which frames of a context are not told; write "
                "context: false"
            )
        clean = clips_of(self.context.latents, len(x_t))
        frames = self.context.frames.repeat(len(x_t) // len(self.context.frames), 1)
        nothing = self.network.recall(KVCache.empty(), clean, call)
        alone = replace(call, kv=nothing, causal=Causal((1,) * clean.shape[2]))
        memory = self.context.memory(keys_of(self.network, clean, cond, alone), frames, x_t.shape[2])
        view = self.network.recall(memory, x_t, call)
        return self.network(x_t, t, cond, replace(call, kv=view))


def require_frames(stream: Stream) -> None:
    """ValueError for a stream whose memory holds other things than frames as they were made."""
    keep = keep_of(stream)
    if isinstance(keep, MovingSink | Decaying | Int8Memory):
        raise ValueError(
            f"context shows teacher and critic the frames that the student remembers, and {type(keep).__name__} remembers less "
            "than whole frames; take a window, Retrieval or Facing, or write context: false"
        )
