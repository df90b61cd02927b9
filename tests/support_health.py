"""What tests share: runs on the built-in world that are spoiled in one known way each, and runs that are sound.

`python tests/support_health.py [NAME ...]` runs them one after the other and prints a table: run, verdict, step, reason.
The sabotage is here and not in the library: it is what a user's mistake or our bug would do.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fewstep import demo
from fewstep.core import Batch, Rng
from fewstep.data.base import Data, Source
from fewstep.data.pairs import PairPlan, StoredPairs, make_pairs
from fewstep.diffusion import CFG, Contract, Renoise, Trig, Uniform
from fewstep.engine import Health, Optim, Settings, train
from fewstep.engine.health import Record, read_record
from fewstep.engine.optim import RoleOptimizer
from fewstep.methods import AVDM2, DMD2, Adversary, Consistency, KnowledgeDistillation, Method, Nets, Progressive
from fewstep.methods.rollouts import NESTED, BackwardSimulation, FromPairs, student_contract
from fewstep.models import VideoModel
from fewstep.world.data import WorldClips, encode
from fewstep.world.grammar import world_prompts

LIMIT = 96
"""Iterations within which a spoiled run must be named."""
FINE = ("improving", "unclear")
"""Words that name nothing."""
FAST = Optim(lr=3e-4, betas=(0.0, 0.99))
FEW = WorldClips(num_frames=4)
"""Clips of four frames: in those nobody can read direction and speed, so accuracy says nothing, as for most people's videos."""
SOUND: DMD2 = replace(demo.RECIPE.method, critic_updates=1)  # type: ignore[type-var]
QUICK = replace(SOUND, rollout=BackwardSimulation(grids=((1.0,), (1.0, 0.5)), shift=3.0))
"""One step and two."""


def settings(steps: int = 48, every: int = 6, **optim: Optim) -> Settings:
    """Settings of a run with as many checks as `PATIENCE`, a dozen clips each; it takes a minute."""
    health = Health(every=every, prompts=6, seeds=2)
    rates = optim or {"student": FAST, "critic": FAST}
    return Settings(steps=steps, batch=4, ema=0.9, log_every=1, health=health, optim=rates)


@dataclass(frozen=True)
class Spoiled:
    """A run, what is wrong with it, and what it must be called within how many iterations."""

    word: str
    because: str
    """A word of the reason."""
    method: Method = SOUND
    settings: Settings = settings(LIMIT)
    data: Data = FEW
    spoil: Callable[[], Any] | None = None
    """A context in which the run is made."""


class OtherShift(DMD2):
    """Trains on times shifted by 3 and has its student sampled on times shifted by 1."""

    def contract(self, teacher: Contract) -> Contract:
        return student_contract(teacher, demo.GRIDS, 1.0, Renoise())


class OtherConditions(DMD2):
    """Scores every clip of a batch under its neighbour's prompt."""

    def scores(self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().scores(nets, replace(batch, cond=batch.cond[torch.arange(len(batch)).roll(1)]), x_t, t)


class GuidedCritic(DMD2):
    """Guides the critic as it guides the teacher."""

    @torch.no_grad()
    def scores(self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        real, _ = super().scores(nets, batch, x_t, t)
        return real, self.guidance(nets.critic, x_t, t, batch.cond, batch.uncond).x0


@dataclass(frozen=True, kw_only=True)
class HalfBlack(WorldClips):
    """Every second clip is black."""

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        source = super().open(model, needs)
        plain = source.batch

        def spoiled(size: int, rng: Rng) -> Batch:
            batch = plain(size, rng)
            black = encode(model, -torch.ones(1, 3, self.num_frames, model.card.height, model.card.width))
            even = (torch.arange(size) % 2 == 0)[:, None, None, None, None]
            return replace(batch, x0=torch.where(even, black, batch.require("x0")))

        source.batch = spoiled  # type: ignore[method-assign]
        return source


@contextmanager
def average_of_the_critic() -> Iterator[None]:
    """What the run returns is the average of another role."""
    from fewstep.engine import run

    iterate, blend = run.Run.iterate, run.blend

    def wrong(self: run.Run) -> None:
        def other(target: nn.Module, source: nn.Module, decay: float) -> None:
            blend(target, self.nets.roles["critic"] if target is self.average else source, decay)

        with mock.patch.object(run, "blend", other):
            iterate(self)

    with mock.patch.object(run.Run, "iterate", wrong):
        yield


@contextmanager
def coarse_weights() -> Iterator[None]:
    """What `model.bfloat16()` does to the student: whatever an update leaves is rounded to eight bits."""
    step = RoleOptimizer.step

    def rounded(self: RoleOptimizer, at: int) -> float:
        rate = step(self, at)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.copy_(parameter.bfloat16().float())
        return rate

    with mock.patch.object(RoleOptimizer, "step", rounded):
        yield


@contextmanager
def frozen_critic() -> Iterator[None]:
    """The critic's optimiser does not step."""
    made, step = RoleOptimizer.__init__, RoleOptimizer.step
    roles: list[RoleOptimizer] = []

    def note(self: RoleOptimizer, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        roles.append(self)

    def held(self: RoleOptimizer, at: int) -> float:
        if self is roles[0]:  # DMD2 trains its critic first
            for part in self.parts.values():
                part.zero_grad(set_to_none=True)
            return 0.0
        return step(self, at)

    with mock.patch.object(RoleOptimizer, "__init__", note), mock.patch.object(RoleOptimizer, "step", held):
        yield


@contextmanager
def other_path() -> Iterator[None]:
    """The student is fed on a trigonometric path, though it has learnt the straight one."""
    from fewstep.engine import nets as building

    build = building.build_nets

    def wrong(*arguments: Any) -> Any:
        nets = build(*arguments)
        nets.student.path = Trig()
        return nets

    with mock.patch.object(building, "build_nets", wrong):
        yield


SLOW = Optim(lr=2e-5, betas=(0.0, 0.99))
"""As in published runs at scale, relative to the size of these weights: most updates are below bfloat16's steps."""
HUGE = Optim(lr=3e-2, betas=(0.0, 0.99))

SPOILED: dict[str, Spoiled] = {
    "pure-bf16 weights": Spoiled(
        "stalled", "bfloat16", settings=settings(LIMIT, student=SLOW, critic=SLOW), spoil=coarse_weights
    ),
    "frozen critic": Spoiled("diverging", "critic does not learn", spoil=frozen_critic),
    "other shift when sampled": Spoiled(
        "stalled", "times at which the student is not trained", method=OtherShift(**vars(SOUND))
    ),
    "guidance 30": Spoiled("diverging", "guidance is far too strong", method=replace(SOUND, guidance=CFG(scale=30.0))),
    "learning rate x100": Spoiled("diverging", "learning rate", settings=settings(LIMIT, student=HUGE, critic=FAST)),
    "wrong noise path": Spoiled(
        "diverging",
        "another path",
        method=replace(SOUND, rollout=replace(SOUND.rollout, grids=NESTED)),
        settings=settings(LIMIT, 12),
        spoil=other_path,
    ),
}

CONSISTENT = Consistency(guidance=CFG(scale=2.5), shift=3.0)
CALM = Optim(lr=2e-4, warmup=10)

UNKNOWN: dict[str, Spoiled] = {
    "other prompts in the scores": Spoiled(
        "collapsing", "look alike", method=OtherConditions(**vars(QUICK)), settings=settings()
    ),
    "critic guided too": Spoiled("", "", method=GuidedCritic(**vars(QUICK)), settings=settings()),
    "average of the critic": Spoiled(
        "collapsing", "look alike", method=QUICK, settings=settings(), spoil=average_of_the_critic
    ),
    "half of the data black": Spoiled(
        "", "", method=CONSISTENT, settings=settings(student=CALM), data=HalfBlack(num_frames=4)
    ),
}
"""Spoiled in ways that no rule was made for; without a word: the clips do not show it."""

SOUND_RUNS: dict[str, tuple[Method, Settings]] = {
    "DMD2": (QUICK, settings()),
    "Consistency": (CONSISTENT, settings(192, 24, student=CALM)),
    "KnowledgeDistillation": (
        KnowledgeDistillation(rollout=FromPairs(grids=NESTED, shift=3.0, mode="ode")), settings(192, 24, student=CALM)
    ),
    "Progressive": (
        Progressive(stages=((8, 24), (4, 24)), guidance=CFG(scale=2.5), shift=3.0), settings(student=CALM)
    ),
    "AVDM2": (
        AVDM2(
            score="video", rollout=QUICK.rollout, guidance=QUICK.guidance, critic_updates=1,
            adversary=Adversary(weight=0.1, density=Uniform(low=0.2, high=0.9), layers=(2, 4, 5), head="joint"),
        ),
        settings(student=FAST, critic=FAST, discriminator=FAST),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The first verdict that names something, or the last one."""

    word: str
    step: int
    reason: str
    record: Record
    seconds: float


def run_spoiled(name: str, output: Path) -> Outcome:
    case = (SPOILED | UNKNOWN)[name]
    return run(case.method, case.data, case.settings, output, spoil=case.spoil)


def run_sound(name: str, output: Path) -> Outcome:
    method, settings = SOUND_RUNS[name]
    if "pairs" not in method.needs:
        return run(method, FEW, settings, output)
    folder, plan = output / "pairs", PairPlan(steps=16, guidance=CFG(scale=2.5), times=(1.0, 0.9, 0.75, 0.5, 0.0))
    make_pairs(short(VideoModel.from_pretrained("world")), world_prompts(128, 0.5, 7), folder, plan, batch=32)
    return run(method, StoredPairs(path=str(folder)), settings, output / "run")


def run(method: Method, data: Any, settings: Settings, output: Path, spoil: Callable[[], Any] | None = None) -> Outcome:
    """Train until something is named, or to the end."""
    began = time.monotonic()
    with ending_at_a_verdict(), nullcontext() if spoil is None else spoil():
        train(short(VideoModel.from_pretrained("world")), method, data, settings, output, quiet=True)
    record = read_record(output)
    assert record is not None and record.checks
    last = record.checks[-1]
    return Outcome(last.verdict.word, last.vitals.step, last.verdict.reason, record, time.monotonic() - began)


def short(world: VideoModel) -> VideoModel:
    """The model of clips of four frames, whose teacher takes sixteen steps."""
    contract = replace(world.card.contract, steps=16)
    return VideoModel(replace(world.card, num_frames=FEW.num_frames, contract=contract), world.parts)


@contextmanager
def ending_at_a_verdict() -> Iterator[None]:
    """A spoiled run that is named needs no more iterations."""
    from fewstep.engine.health.monitor import Monitor

    check = Monitor.check

    def ending(self: Monitor, student: VideoModel, step: int) -> Any:
        found = check(self, student, step)
        if found.verdict.word not in FINE:
            self.stopped = str(found.verdict)
        return found

    with mock.patch.object(Monitor, "check", ending):
        yield


def main(names: list[str]) -> None:
    wanted = names or [*SPOILED, *UNKNOWN, *SOUND_RUNS]
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            made = run_sound(name, Path(folder)) if name in SOUND_RUNS else run_spoiled(name, Path(folder))
        print(f"| {name} | {made.word} | {made.step} | {made.reason} | {made.seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
