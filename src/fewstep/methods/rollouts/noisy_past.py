"""History corruption: in training the past is read with noise, so that a stream leans on its sink (Live Avatar, 2512.04677)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import Call, Cond, KVView, Noise
from fewstep.diffusion import NoisePath, Prediction
from fewstep.streaming.blocks import Chunks, Reader


@dataclass(frozen=True)
class NoisyPast:
    """A student that reads its memory with noise: `k + scale rms(k) n`, values likewise, n standard normal (a
    `streaming.Reader`).

    The root mean square is over one layer's remembered frames but the pinned ones (the sink), which stay as they are. All calls
    of a chunk read the same noise, and the memory itself has none. From the paper: noise on the cached history, so that what a
    person looks like must come from the sink. Its size and law are not published: both are ours.
    """

    network: Reader
    scale: float
    rng: Noise
    """Of one chunk."""

    @property
    def path(self) -> NoisePath:
        return self.network.path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        return self.network(x_t, t, cond, call)

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        view, read = self.network.recall(memory, x_t, call), memory.read()
        if not view.layers:
            return view
        slots, tokens = read.positions, view.layers[0][0].shape[2]
        loose = (slots >= memory.keep.pinned).reshape(-1, slots.shape[-1])
        if read.rows is None:
            loose = loose.repeat_interleave(tokens // slots.shape[-1], 1)
        else:
            loose = loose[:, read.rows[:, 0]]
        layers = tuple(
            (self._noised(k, loose, f"keys/{layer}"), self._noised(v, loose, f"values/{layer}"))
            for layer, (k, v) in enumerate(view.layers)
        )
        return replace(view, layers=layers)

    def _noised(self, x_BHMD: Tensor, loose: Tensor, name: str) -> Tensor:
        """With noise on the tokens where `loose` `[1, M]` or `[B, M]` is True."""
        here = loose.to(x_BHMD.device)[:, None, :, None].expand_as(x_BHMD)
        size = (here * x_BHMD.float().square()).sum().div(here.sum().clamp_min(1)).sqrt()
        noise = self.rng.randn(x_BHMD.shape, f"history/{name}")
        return torch.where(here, x_BHMD + (self.scale * size * noise).to(x_BHMD.dtype), x_BHMD)


def reading(loop: Chunks, scale: float, rng: Noise) -> Chunks:
    """The loop for one chunk whose past is read with noise of this scale; `loop` itself without."""
    return loop if scale == 0 else replace(loop, network=NoisyPast(loop.network, scale, rng))
