"""Frames of chunks in their order, in a thread of their own or in the caller's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fewstep.core.finite import require_finite
from fewstep.core.pixels import to_uint8


@dataclass(frozen=True, eq=False)
class Pixels:
    """What a chunk's latents gave."""

    frames: Tensor
    """uint8 `[B, K, H, W, 3]`, on the CPU."""
    past: Any
    """Memory of the codec after them."""
    milliseconds: float


class Decoder:
    """Decodes chunks one after the other; each needs what the codec remembers of those before it."""

    def __init__(self, decode_next: Callable[..., Any], past: Any, device: torch.device, *, beside: bool) -> None:
        """`decode_next` is that of a model or codec, and `past` what it begins with. `beside`: in a thread of its own, and on a
        GPU on a stream of its own."""
        self._decode_next, self._past = decode_next, past
        self._pool = ThreadPoolExecutor(1, "decode") if beside else None
        self._lane = torch.cuda.Stream(device) if beside and device.type == "cuda" else None

    def submit(self, latents: Tensor, *, last: bool) -> Future[Pixels]:
        """The frames of a chunk `[B, C, f, h, w]` that is finished on its device. With `last` nothing follows it."""
        if self._pool is not None:
            return self._pool.submit(self._decode, latents, last)
        made = Future[Pixels]()
        try:
            made.set_result(self._decode(latents, last))
        except Exception as error:
            made.set_exception(error)
        return made

    def close(self) -> None:
        """Free the thread when it has done what it was given."""
        if self._pool is not None:
            self._pool.shutdown()

    def _decode(self, latents: Tensor, last: bool) -> Pixels:
        start = perf_counter()
        with torch.no_grad(), self._on_lane():
            made = self._decode_next(latents, self._past, last=last)
            require_finite(made.frames, "frames of a live stream")
            frames = to_uint8(made.frames).movedim(1, -1).contiguous().cpu()  # a fourth of the bytes of floats to copy
        self._past = made.past
        return Pixels(frames, made.past, 1000 * (perf_counter() - start))

    def _on_lane(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._lane is None else torch.cuda.stream(self._lane)
