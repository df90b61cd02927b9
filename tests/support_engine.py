"""What tests share: a tiny real video model, data with every field, and one small run per method."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fewstep.compress import FlowHead
from fewstep.core import Batch, Pairs, Rng
from fewstep.data.base import Data, Source
from fewstep.diffusion import CFG, VP, Contract, Kind, NoisePath, RectifiedFlow
from fewstep.engine import Optim, Settings, checkpoint, train
from fewstep.engine.optim import RoleOptimizer
from fewstep.engine.run import Run
from fewstep.methods import (
    AVDM2,
    DMD2,
    GRPO,
    METHODS,
    PSO,
    TDM,
    AdversarialDistillation,
    Adversary,
    Alternating,
    BackwardSimulation,
    FlowMatching,
    LatentPixel,
    Method,
    MomentMatching,
    MotionReward,
    Progressive,
    ProgressiveAdversarial,
    ReadAttributes,
    SelfAdversarial,
    TimeAwareDistillation,
    TransitionMatching,
    WorldReward,
)
from fewstep.methods.rollouts import NESTED
from fewstep.models import Card, ClipFeatures, Denoiser, FrameAutoencoder, TextEncoder, VideoDiT, VideoModel
from fewstep.models.card import PARTS
from fewstep.models.fingerprint import describe
from fewstep.models.source import ModelSource
from fewstep.world.data import WorldClips
from support_processes import forked

FRAMES = 4
TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)
ATTRIBUTES = (6, 8, 2, 8, 2, 6)
TWO_GRIDS = BackwardSimulation(grids=((1.0,), (1.0, 0.5)))
LONG = DMD2(critic_updates=2, warmup=3, rollout=BackwardSimulation(grids=NESTED))


def shaken(network: nn.Module, scale: float = 0.05) -> nn.Module:
    """Off every zero initialisation, so that all gradients exist."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def stored_card(model: VideoModel) -> Card:
    """The card that a model has when it is saved, which tells its parts."""
    return replace(model.card, parts={name: describe(part) for name, part in model.parts.items()})


def tiny_model(seed: int = 0, path: NoisePath = RectifiedFlow(), kind: Kind = "flow", depth: int = 2) -> VideoModel:
    """All four parts, a few thousand weights each, equal for equal seeds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = VideoDiT(channels=4, width=24, depth=depth, heads=2, text_width=16)
        parts = {
            "denoiser": shaken(Denoiser(backbone, path, kind)),
            "text": TextEncoder(width=16, length=12, buckets=64, depth=1, heads=2, attribute_sizes=ATTRIBUTES),
            "codec": shaken(FrameAutoencoder(width=8, depth=1)),
            "features": ClipFeatures(width=8, attribute_sizes=ATTRIBUTES),
        }
    contract = Contract(steps=3, guidance=CFG(scale=2.0))
    card = Card(name="tiny", num_frames=FRAMES, path=path, kind=kind, contract=contract)
    return VideoModel(card, parts)


@dataclass(frozen=True, kw_only=True)
class TinyImages(ModelSource):
    """Another tiny model of another kind on another path: an image teacher that shares nothing but widths."""

    seed: int = 7
    depth: int = 2

    def card(self) -> Card:
        return stored_card(self.load())

    def load(self, leave: Collection[str] = (), parts: Collection[str] = PARTS) -> VideoModel:
        model = tiny_model(self.seed, VP(), "eps", self.depth)
        return VideoModel(model.card, {name: part for name, part in model.parts.items() if name in parts})


@dataclass(frozen=True, kw_only=True)
class Sized(ModelSource):
    """The tiny model with a denoiser of another width."""

    width: int
    seed: int = 5
    path: NoisePath = RectifiedFlow()
    text: int = 16

    def card(self) -> Card:
        return stored_card(self.load())

    def load(self, leave: Collection[str] = (), parts: Collection[str] = PARTS) -> VideoModel:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            backbone = VideoDiT(channels=4, width=self.width, depth=self.width // 12, heads=2, text_width=16)
            denoiser = shaken(Denoiser(backbone, self.path, "flow"))
            text = TextEncoder(width=self.text, length=12, buckets=64, depth=1, heads=2)
        model = tiny_model(path=self.path)
        made = {**model.parts, "denoiser": denoiser, **({"text": text} if self.text != 16 else {})}
        return VideoModel(model.card, {name: part for name, part in made.items() if name in parts})


CASES: Mapping[str, Method] = {cls.__name__: cls() for cls in METHODS} | {
    "FlowMatching": FlowMatching(image_fraction=0.3, images_per_clip=2),
    "ReadAttributes-features": ReadAttributes(of="features"),
    "Progressive": Progressive(stages=((4, 3), (2, 4), (1, 3))),
    "DMD2": DMD2(critic_updates=2, warmup=2, rollout=TWO_GRIDS),
    "AVDM2": AVDM2(image_teacher=TinyImages(), frames=2, rollout=TWO_GRIDS),
    "SelfAdversarial": SelfAdversarial(critic_updates=1, r1=1.0, layers=(0, -1), rollout=TWO_GRIDS),
    "ProgressiveAdversarial": ProgressiveAdversarial(
        progressive=Progressive(stages=((2, 1), (1, 1))), steps=1, adversary=Adversary(trained=True, r1=1.0)
    ),
    "MomentMatching": MomentMatching(steps=(1, 2)),
    "TransitionMatching": TransitionMatching(head=FlowHead(blocks=1, steps=2)),
    "TDM": TDM(rollout=BackwardSimulation(grids=TWO_GRIDS.grids, mode="ode")),
    "AdversarialDistillation": AdversarialDistillation(distillation=2.5, regression=0.1),
    "LatentPixel": LatentPixel(pixels=1.0, motion=1.0),
    "TimeAwareDistillation": TimeAwareDistillation(teacher_steps=2),
    "PSO": PSO(rollout=TWO_GRIDS, beta=10.0),
    "GRPO": GRPO(rollout=TWO_GRIDS, reward=MotionReward(), refresh=2, candidates=2),
    "Alternating": Alternating(
        distillation=DMD2(critic_updates=1, rollout=TWO_GRIDS),
        reinforcement=PSO(rollout=TWO_GRIDS, reward=WorldReward(), candidates=3, beta=10.0),
        ratio=2,
    ),
    "DMD2-everything": DMD2(
        critic_updates=1, adversary=Adversary(r1=1.0, layers=(0, -1)), anchor=0.25, rollout=TWO_GRIDS
    ),
}
"""Every registered method with its defaults, unless a smaller or richer variant is given here."""


@dataclass(frozen=True, kw_only=True)
class Everything(Data):
    """World clips with every field a method may need; the stored states are on straight lines from noise to clip."""

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "x0", "low", "frames", "labels", "pairs"})

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        clips = WorldClips(num_frames=FRAMES)
        return _Everything(clips.open(model, needs & clips.provides | {"x0"}), model)


@dataclass(frozen=True)
class _Everything:
    clips: Source
    model: VideoModel

    def batch(self, size: int, rng: Rng) -> Batch:
        batch = self.clips.batch(size, rng)
        assert batch.x0 is not None
        eps, path = rng.randn(batch.x0.shape, "stored"), self.model.denoiser.path
        states = [path.add_noise(batch.x0, eps, torch.full((size,), t)) for t in TIMES]
        return replace(batch, pairs=Pairs(torch.stack(states, 1), TIMES))


def small(steps: int, **others: Any) -> Settings:
    """Settings of a run that takes a second: one log row per step, two clips per batch."""
    optim = {"student": Optim(lr=1e-3, warmup=2, decay="cosine")}
    return Settings(**({"steps": steps, "batch": 2, "log_every": 1, "optim": optim} | others))


def long_run(output: Path) -> VideoModel:
    """Three grids, a critic, Muon, an average and two micro-batches; a checkpoint every second step."""
    optim = {"student": Optim(type="muon", lr=1e-3, decay="linear"), "critic": Optim(lr=1e-3)}
    settings = small(16, save_every=2, ema=0.9, accumulate=2, optim=optim)
    return train(tiny_model(), LONG, WorldClips(num_frames=FRAMES), settings, output, quiet=True)


def short_run(output: Path, case: str, steps: int) -> VideoModel:
    """A few iterations of one method, a checkpoint after every second."""
    steps = 8 if case == "Progressive" else steps  # its last stage begins after seven
    settings = small(steps, save_every=2, ema=0.9, accumulate=2)
    return train(tiny_model(), CASES[case], Everything(), settings, output, quiet=True)


MOMENTS: Mapping[str, tuple[Any, str]] = {
    "iteration": (Run, "iterate"),
    "update": (RoleOptimizer, "step"),
    "file": (checkpoint, "write_component"),
    "rename": (Path, "rename"),
}
"""Before an iteration; an optimiser's step; half-way through a component of a checkpoint; before a folder is renamed."""


def die_at(moment: str, number: int) -> None:
    """Send this process SIGKILL at call `number` of what makes up `moment`."""
    owner, name = MOMENTS[moment]
    real, calls = getattr(owner, name), count(1)

    def fatal(*args: Any, **options: Any) -> Any:
        if next(calls) < number:
            return real(*args, **options)
        if moment == "file":
            real(*args, **options)
            for file in args[1].iterdir():
                os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(owner, name, fatal)


def die(target: Callable[..., VideoModel], moment: str, number: int, *arguments: Any) -> None:
    """Call `target` in another process, which sends itself SIGKILL at a fixed moment: no clock decides what is tested."""
    process = forked().Process(target=_die, args=(target, moment, number, arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _die(target: Callable[..., VideoModel], moment: str, number: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    die_at(moment, number)
    target(*arguments)
