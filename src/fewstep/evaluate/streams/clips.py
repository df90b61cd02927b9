"""Where long clips come from, window by window: a stream, whole clips one after the other, or the renderer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.diffusion import Contract
from fewstep.models.bundle import VideoModel
from fewstep.models.decoding import decode_stream
from fewstep.streaming import Session
from fewstep.world.grammar import Scene
from fewstep.world.renderer import Variation
from fewstep.world.scripts import Script, render_script


@dataclass(frozen=True, kw_only=True)
class LongClips(ABC):
    """One row of a drift evaluation."""

    kind: ClassVar[str]
    """How its windows hang together."""
    name: str
    """Name shown in the report; must be unique."""
    role: str
    """What it is compared as: `student`, `causal` (the undistilled causal model), `teacher`, or `real`."""

    @abstractmethod
    def windows(
        self, scenes: Sequence[Scene], prompts: Sequence[str], seeds: Sequence[int], count: int
    ) -> Iterator[Tensor]:
        """The first `count` windows `[B, 3, F, H, W]` of one clip per prompt, F as in the models' cards. Each is made when it is
        asked for, and none is kept."""

    @property
    @abstractmethod
    def nfe_per_frame(self) -> float:
        """Network evaluations that each frame goes through; guidance counts twice."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What its clips depend on, besides prompts and seeds."""


@dataclass(frozen=True, kw_only=True)
class Sampled(LongClips):
    """Clips of a model."""

    model: VideoModel
    steps: int | None = None
    """Number of steps; None: the contract's default. A number that the model was not trained for is allowed."""

    @property
    def contract(self) -> Contract:
        return self.model.card.contract

    @property
    def nfe_per_frame(self) -> float:
        return float(self.contract.calls(self.steps))

    def facts(self) -> dict[str, str]:
        weights = {name: self.model.fingerprint(name) for name in self.model.parts}
        return {"weights": repr(weights), "contract": repr(self.contract), "steps": repr(self.steps)}


@dataclass(frozen=True, kw_only=True)
class Streamed(Sampled):
    """One stream per prompt, chunk by chunk."""

    kind = "stream"

    @property
    def nfe_per_frame(self) -> float:
        """With the call that commits a chunk to the memory, where there is one."""
        commits = self.contract.stream is not None and self.contract.stream.commits
        return self.contract.calls(self.steps) + commits * (2.0 if self.contract.guidance.active else 1.0)

    def windows(
        self, scenes: Sequence[Scene], prompts: Sequence[str], seeds: Sequence[int], count: int
    ) -> Iterator[Tensor]:
        session = Session(self.model, prompts, seed=seeds, num_inference_steps=self.steps, force=True)
        frames = decoded_stream(self.model, endless(session))
        return cut(frames, self.model.card.num_frames, count)


@dataclass(frozen=True, kw_only=True)
class Fresh(Sampled):
    """A whole-clip model: every window is a new clip from new noise, so it cannot drift."""

    kind = "new clips"

    def windows(
        self, scenes: Sequence[Scene], prompts: Sequence[str], seeds: Sequence[int], count: int
    ) -> Iterator[Tensor]:
        for window in range(count):
            own = [seed + window * 1_000_003 for seed in seeds]
            latents = self.model.latents(prompts, seed=own, num_inference_steps=self.steps, force=True)
            with torch.no_grad():  # left before the caller goes on
                frames = self.model.decode(latents)
            yield frames


@dataclass(frozen=True, kw_only=True)
class Rendered(LongClips):
    """Rendered clips of the prompts' scenes: what a perfect model would make."""

    kind = "renderer"
    num_frames: int
    name: str = "real clips"
    role: str = "real"
    draw: int = 0
    """Another number draws other clips of the same scenes."""
    device: torch.device = torch.device("cpu")
    """Where the clips are needed; they are drawn on the CPU."""

    @property
    def nfe_per_frame(self) -> float:
        return 0.0

    def facts(self) -> dict[str, str]:
        return {"frames": str(self.num_frames), "draw": str(self.draw)}

    def windows(
        self, scenes: Sequence[Scene], prompts: Sequence[str], seeds: Sequence[int], count: int
    ) -> Iterator[Tensor]:
        clips = [
            render_script([Script((scene,))], variation(seed, self.draw), count * self.num_frames)
            for scene, seed in zip(scenes, seeds, strict=True)
        ]
        for frames in torch.cat(clips).split(self.num_frames, 2):
            yield frames.to(self.device)


def clips_of(model: VideoModel, name: str, role: str, steps: int | None = None) -> Sampled:
    """Long clips of a model: as a stream if its contract has one."""
    kind = Fresh if model.card.contract.stream is None else Streamed
    return kind(name=name, role=role, model=model, steps=steps)


def variation(seed: int, draw: int = 0) -> Variation:
    """The look of the rendered clip with this seed."""
    return Variation.sample(1, torch.Generator().manual_seed(seed + 500_000_000 * (draw + 1)))


def endless(session: Session) -> Iterator[Tensor]:
    """The chunks of a stream."""
    while True:
        yield from session.take(1)


def decoded_stream(model: VideoModel, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Frames in [-1, 1] of chunks of latents, as soon as they can be decoded."""

    def brought() -> Iterator[Tensor]:
        for latents in chunks:
            model.bring("codec")
            yield latents

    for frames in decode_stream(model.codec, brought()):
        yield frames.clamp(-1, 1)


def cut(parts: Iterable[Tensor], length: int, count: int) -> Iterator[Tensor]:
    """`count` windows of `length` frames of a clip that comes in parts `[B, 3, f, H, W]`. No more than a window is kept."""
    held: list[Tensor] = []
    for part in parts:
        held.append(part)
        while sum(x.shape[2] for x in held) >= length:
            whole = torch.cat(held, 2)
            yield whole[:, :, :length]
            held = [whole[:, :, length:]]
            count -= 1
            if count == 0:
                return
