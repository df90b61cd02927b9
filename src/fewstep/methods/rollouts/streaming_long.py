"""Streaming long tuning: each update trains on the next clip of a stream that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import Batch, Rng, Seeds
from fewstep.core.bounds import Amount, Count, Natural
from fewstep.diffusion import Contract, Stream
from fewstep.methods.rollouts.base import Rolled, Rollout, Visit, aligned, calls_of
from fewstep.methods.rollouts.grids import Exit, deepest, drawn, stops
from fewstep.methods.rollouts.noisy_past import reading
from fewstep.methods.rollouts.underway import Underway
from fewstep.models.denoiser import Predictor
from fewstep.streaming.blocks import Chunks
from fewstep.streaming.noise import start_noise


@dataclass(frozen=True, kw_only=True)
class StreamingLong(Rollout):
    """The next clip of a stream that earlier updates have begun (LongLive, 2509.22622, streaming long tuning).

        1  a stream begins with the prompts of the batch, and a first clip of F frames, as long as the teacher's clips
        2  each call goes on from the memory that the call before has left: F - overlap new frames, each chunk stopped at one exit
        3  networks that judge see the last `overlap` frames and the new ones; losses but a GAN's count the new
        4  at one random clip the prompts become those of the batch of that moment: the memory is made anew from the last latents
           with them (`Chunks.recache`), and student, teacher and critic use them from then on
        5  before the stream would be longer than `length` frames, another one begins

    The stream between two calls is `Underway`, in `Batch.carried`: the run keeps one for each place, in main memory and in its
    checkpoints, and all updates of an iteration, the critic's too, go on with it. Keys and values that were made with earlier
    weights stay, as in the paper. At the last exit and fixed weights, clips are those of a `streaming.Session`, bit for bit.

    Not as published: the first latent of a clip is not replaced by an image latent (see `SelfForced`); a switch is as likely
    before every clip but the first; memory is made anew from as many latents as a chunk may read, as in a session.
    """

    carries: ClassVar[bool] = True

    stream: Stream = Stream()
    """How chunks are made, in training and afterwards. Give it a window, or memory grows with the stream."""
    length: Count = 240
    """Largest length of a stream in latent frames. Its number of clips and the updates of an iteration should have no common
    factor: otherwise the student is always trained on the same ones of them."""
    overlap: Natural = 3
    """Latent frames of the clip before that teacher and critic see again; what is left of a clip must be whole chunks."""
    switch: bool = True
    """Let every stream change its prompts once."""
    exit: Exit = "random"
    """Step to stop at, the same in all chunks of a clip: a random one or the last."""
    history_noise: Amount = 0.0
    """Noise on what is read of the past in training, relative to its root mean square (`NoisyPast`; Live Avatar, 2512.04677);
    0: none. Sampling never has any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream.steps or self.stream.rolling > 1 or self.stream.recompute:
            raise ValueError(
                "this rollout carries its memory on and stops chunks at one step; leave out steps, rolling and recompute"
            )
        if self.switch and self.stream.commit in ("last", "levels", "nothing"):
            raise ValueError(
                "a switch makes the memory anew from latents, and this stream remembers its last steps; write switch: false, or "
                "let the stream commit clean latents"
            )

    @property
    def whole(self) -> bool:
        return False

    @property
    def calls(self) -> float:
        """Those of a first clip. A memory that is made anew, once per stream, is not counted."""
        return self.stream.commits + fmean(fmean(found) + 1 for found in stops(self.grids, self.exit))

    @property
    def fullest(self) -> Mapping[str, int]:
        return deepest(self.grids)

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        grid, stop = drawn(self.grids, self.exit, self.shift, rng)
        contract = Contract(sampler=self.sampler, steps=len(grid), stream=self.stream)
        loop, carried = Chunks(network=student, contract=contract, times=(*grid, 0.0)), batch.require("carried")
        clips, known = self._clips(batch.latent_shape[1]), carried.part("stream")
        now = Underway.of(known, loop.begin(), rng.device) if known else self._begun(loop, batch, rng, clips)  # 1
        if now.switch and now.clip == now.switch:
            now = self._switched(loop, now, batch, rng.device)  # 4
        past, conds, seeds = now.past, now.conds, Seeds(now.seeds, device=rng.device)
        noises, made = list[Tensor](), list[list[Visit]]()
        for _ in self._lengths(now, batch.latent_shape[1]):  # 2
            own = seeds.fold(f"chunk/{now.chunks}")
            noise = start_noise(self.stream, now.chunks, batch.frame_shape, seeds)
            chunks, start = reading(loop, self.history_noise, own), student.path.prior(noise)
            visits, memory = calls_of(chunks, now.memory, start, conds, own, exit=stop, grad=grad)
            latents = loop.recent(now.latents, visits[-1].x0.detach(), now.chunks)
            now = replace(now, memory=memory, latents=latents, chunks=now.chunks + 1)
            noises.append(noise)
            made.append(visits)
        *before, last = aligned(made)
        rolled = Rolled(
            last.x0, last.x_t, last.t, tuple(before), torch.cat(noises, 2), exit=stop, grid=grid, past=past, conds=conds
        )  # 3
        end = rolled.clip.detach()[:, :, -self.overlap :] if self.overlap else None
        carried.put("stream", replace(now, clip=now.clip + 1, past=end).tensors() if now.clip + 1 < clips else {})  # 5
        return rolled

    def _clips(self, frames: int) -> int:
        """Clips of a stream."""
        if self.length < frames or self.overlap >= frames:
            raise ValueError(
                f"clips have {frames} latent frames, so length must be at least {frames} and overlap below it; got "
                f"length={self.length} and overlap={self.overlap}"
            )
        return 1 + (self.length - frames) // (frames - self.overlap)

    def _begun(self, loop: Chunks, batch: Batch, rng: Rng, clips: int) -> Underway:
        if batch.cond.framewise:
            raise ValueError(
                f"long streams take conditions of whole clips; {min(batch.cond.framewise)} is told of every frame"
            )
        seeds = tuple(rng.integers((len(batch),), "seeds", 2**62).tolist())
        switch = 1 + rng.integer("switch", clips - 1) if self.switch and clips > 1 else 0
        return Underway(memory=loop.begin(), conds=(batch.cond, batch.uncond), seeds=seeds, switch=switch)

    @torch.no_grad()
    def _switched(self, loop: Chunks, now: Underway, batch: Batch, device: str) -> Underway:
        """The same stream with the prompts of `batch`, and a memory that says so."""
        assert now.latents is not None
        conds, seeds = (batch.cond, batch.uncond), Seeds(now.seeds, device=device).fold(f"recache/{now.chunks}")
        return replace(now, conds=conds, memory=loop.recache(now.memory, now.latents, *conds, seeds))

    def _lengths(self, now: Underway, frames: int) -> list[int]:
        """Lengths of the chunks of the next clip."""
        new, lengths = frames - (self.overlap if now.clip else 0), list[int]()
        while sum(lengths) < new:
            lengths.append(self.stream.length(now.chunks + len(lengths)))
        if sum(lengths) > new:
            raise ValueError(
                f"{new} new latent frames are not whole chunks of {list(self.stream.chunks)}; change overlap, or the chunks"
            )
        return lengths

    def contract(self, teacher: Contract) -> Contract:
        return replace(super().contract(teacher), stream=self.stream)
