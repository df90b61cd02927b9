"""A stream that can be paused, steered, cancelled, and restored from a snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.caching import CachePolicy
from fewstep.core import Seeds
from fewstep.core.call import every_block
from fewstep.diffusion import Step
from fewstep.models import VideoModel
from fewstep.models.sampling import evaluating
from fewstep.streaming.blocks import Chunks


@dataclass(frozen=True)
class Snapshot:
    """Where a stream is between two chunks: everything that the next one depends on. Nothing in it is ever changed."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    memory: KVCache
    chunks: int = 0
    """Number of chunks made so far."""


class Session:
    """A stream of latents, chunk by chunk, of a model whose contract has a `stream`.

    >>> session = Session(student, ["a red ball rolls left"])          # doctest: +SKIP
    >>> for latents in session.take(4): ...                            # doctest: +SKIP

    What it is at any moment is its `snapshot`; `Session(model, snapshot)` goes on from there, bit for bit.
    """

    def __init__(
        self,
        model: VideoModel,
        start: Snapshot | Sequence[str],
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        cache: CachePolicy | None = None,
    ) -> None:
        """`start` is one prompt per clip, or a snapshot. ValueError for a model that makes whole clips."""
        contract = model.card.contract
        self._chunks = Chunks(network=model.denoiser, contract=contract, times=contract.times(num_inference_steps))
        if not isinstance(start, Snapshot):
            start = Snapshot(tuple(start), tuple(range(seed, seed + len(start))), self._chunks.begin())
        self._model, self._cache, self.snapshot = model, cache, start
        self._guided = contract.guidance.active
        self._conditions = model.conditions(start.prompts, guided=self._guided)

    def steer(self, prompts: Sequence[str]) -> None:
        """Other prompts, one per clip, from the next chunk on."""
        if len(prompts) != len(self.snapshot.prompts):
            raise ValueError(
                f"this session has {len(self.snapshot.prompts)} clips, and was given {len(prompts)} prompts"
            )
        self._conditions = self._model.conditions(prompts, guided=self._guided)
        self.snapshot = replace(self.snapshot, prompts=tuple(prompts))

    @torch.no_grad()
    def steps(self) -> Iterator[Step]:
        """The next chunk, step by step; the latents of its last step are the chunk's. Given up before, it was never begun."""
        before, index = self.snapshot, self.snapshot.chunks
        noise = Seeds(before.seeds, device=str(self._model.device)).fold(f"chunk/{index}")
        channels, _, height, width = self._model.latent_shape()
        shape = (len(before.prompts), channels, self._chunks.stream.length(index), height, width)
        start = self._model.denoiser.path.prior(noise.randn(shape, "start"))
        runner = self._model.runner(every_block if self._cache is None else self._cache.begin())
        made = self._chunks.chunk(before.memory, start, *self._conditions, noise, runner)
        while True:
            self._model.bring("denoiser")
            with evaluating(self._model.denoiser), self._model.runtime.denoising():
                now = next(made, None)
            if now is None:
                return
            if now.memory is not None:
                self.snapshot = replace(self.snapshot, memory=now.memory, chunks=index + 1)
            yield now.step

    def take(self, chunks: int) -> Iterator[Tensor]:
        """The next chunks, latents `[B, C, f, h, w]` each, as soon as they are made."""
        for _ in range(chunks):
            *_, last = self.steps()
            yield last.x
