"""How near is a DMD2 cycle to what its networks alone would cost? `python bench/train_step.py --help`

A cycle is one iteration in the engine's own loop: five critic updates and one of the student, or what a recipe says. Its
floor is the number of network forwards that the method says it makes (a backward pass counts as two) times the time of one
forward of the same batch under the same precision and compiler. Forwards and cycles take turns, so a slow minute of the
machine hits both.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from fewstep.engine import Parallel, Settings
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare
from fewstep.evaluate.latency import peak_memory
from fewstep.methods import DMD2, BackwardSimulation
from fewstep.methods.base import Method
from fewstep.recipe import Recipe
from measuring import Clock, Forward, Stopwatch, Timer, keep, load, middle, rounded

METHOD = DMD2(rollout=BackwardSimulation(grids=((1.0, 0.5),), exit="last"), critic_updates=5)
"""Two steps of the student's sampler in every turn: no draw decides how long a cycle takes."""
WARM_UP = 2
"""Cycles before the first that counts: optimiser states, compilation."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    model: str = "world"
    """`world`, `wan-1.3b` (random weights; needs a GPU and diffusers) or a folder that fewstep wrote."""
    recipe: str = ""
    """A file whose method and settings are measured, with one micro-batch per update; leave out batch to checkpointing then."""
    batch: int = 16
    autocast: Literal["off", "bf16"] = "off"
    compile: bool = False
    checkpointing: bool = False
    device: str = "cpu"
    rounds: int = 5
    clock: Clock = "wall"

    def __post_init__(self) -> None:
        own = [
            name
            for name in ("batch", "autocast", "compile", "checkpointing")
            if getattr(self, name) != getattr(Case, name)
        ]
        if self.recipe and own:
            raise ValueError(
                f"{', '.join(own)}: with a recipe these are its own; leave them out, or measure a changed copy"
            )

    @property
    def method(self) -> Method:
        return Recipe.load(self.recipe).method if self.recipe else METHOD

    @property
    def settings(self) -> Settings:
        if self.recipe:
            return replace(Recipe.load(self.recipe).settings, accumulate=1, device=self.device)
        return Settings(
            steps=1000, batch=self.batch, autocast=self.autocast, compile=self.compile, ema=0.99, device=self.device,
            parallel=Parallel(checkpointing=self.checkpointing),
        )  # fmt: skip


def measure(case: Case) -> dict[str, Any]:
    """Figures of one case, in seconds and bytes; medians over rounds."""
    model, data = load(case.model)
    method = case.method
    cost = sum(work.forwards for work in method.cost())
    run = prepare(model, method, data, case.settings, Path(tempfile.mkdtemp()))
    timer = Timer(case.device, case.clock)
    forward, watch = Forward(run, timer), Stopwatch(timer)
    for _ in range(WARM_UP):
        run.iterate()
        forward.plain()
        forward.trained()
    rounds: list[dict[str, float]] = []
    for _ in range(case.rounds):
        plain = [forward.plain() for _ in range(3)]
        cycle = timer.of(run.iterate)
        plain += [forward.plain() for _ in range(3)]
        with watch.inside(run):
            run.iterate()
        ahead, back = forward.trained()
        one = middle(plain)
        floor = cost * one
        rounds.append({
            "cycle": cycle, "forward": one, "floor": floor, "cycle over floor": cycle / floor,
            "forward with gradient over forward": ahead / one, "backward over forward": back / one,
        })  # fmt: skip
    counted = sum(watch.calls[phase] for phase in watch.calls if phase.partition(",")[0] in run.nets.roles)
    peak, what = peak_memory(run.iterate, case.device)
    return {
        "cost": cost,
        "counted": round((counted + 2 * watch.calls["backward"]) / case.rounds, 3),
        "medians": {name: middle([r[name] for r in rounds]) for name in rounds[0]},
        "phases": rounded({name: spent / case.rounds for name, spent in watch.seconds.most_common()}),
        "memory": {"peak": peak, "what": what, "planned": planned(case, model.card)},
        "rounds": [rounded(r) for r in rounds],
    }


def planned(case: Case, card: Any) -> int | None:
    """What a dry run says the networks and their training take; None where the model has no parts to be planned from."""
    return Outline.of(card, case.method, replace(case.settings, health=None)).plan().peak.bytes if card.parts else None


def main(case: Case) -> int:
    if torch.device(case.device).type == "cuda" and not torch.cuda.is_available():
        print(f"skipped: --device {case.device}, and this machine has no CUDA device")
        return 0
    if case.model == "wan-1.3b" and case.device == "cpu":
        print("skipped: wan-1.3b is for a GPU (--device cuda); a cycle of it would take a CPU a day")
        return 0
    found = measure(case)
    path = keep("train_step", case, found, case.device)
    for name, value in (found["medians"] | found["phases"]).items():
        print(f"{name:40} {value:9.4f}")
    print(f"cost {found['cost']:g}, counted {found['counted']:g}; peak {found['memory']['peak'] / 2**20:.0f} MiB")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Case, description=__doc__)))
