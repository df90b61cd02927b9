"""Checks a run at intervals and acts on the verdict: keeps the best student, helps the critic, stops after a collapse.

It keeps only plain numbers, in `state`, so a resumed run reaches the same verdicts as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewstep.core import Rng
from fewstep.core.finite import require_finite
from fewstep.data.base import Source
from fewstep.diffusion import Contract
from fewstep.engine.health import weights
from fewstep.engine.health.heard import Heard, Terms
from fewstep.engine.health.measure import Gauge, Sampled, eyes
from fewstep.engine.health.record import Check, Record
from fewstep.engine.health.verdict import judge, lags
from fewstep.engine.health.vitals import Baselines, Verdict, Vitals, figures
from fewstep.engine.mesh import Processes
from fewstep.engine.nets import lenders, origin, sources, starts
from fewstep.engine.preview import sheet
from fewstep.engine.settings import Health, Settings
from fewstep.engine.student import untrained
from fewstep.engine.views import Views
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.models import VideoModel
from fewstep.models.denoiser import Predictor
from fewstep.models.images import images_in

SHOWN = 4
"""Number of clips in the picture of a check."""


@dataclass(frozen=True)
class Start:
    """The student before training, sampled on one grid: its initial weights in its own sampler."""

    grid: str
    clips: Sampled
    error: float | None
    """Error of what the critic started as on these clips; None for a method without a critic."""


@dataclass
class Monitor:
    """Made by `watching`. With several processes, all must make every check, and all follow the leader's verdict."""

    health: Health
    gauge: Gauge
    model: VideoModel
    method: Method
    settings: Settings
    nets: Nets
    processes: Processes
    heard: Heard
    """What the run's listener recorded."""
    record: Record
    extra: int = 0
    """Extra rounds of every update that does not train the student."""
    best: tuple[int, float] | None = None
    """Step and score of the student in the run's `best` folder."""
    stopped: str = ""
    """Reason for an early end of the run; empty if there was none."""
    names: set[str] = field(default_factory=set)
    """Names of the student's loss terms."""
    terms: Terms | None = None
    before: dict[str, Tensor] = field(default_factory=dict)
    start: Start | None = None
    """References for the grid of the last check."""
    shown: Sampled | None = None
    """Clips of the last check."""

    # --- during an iteration ------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Is there a check after iteration `step`, counted from 1?"""
        return step % self.health.every == 0 or step == self.settings.steps

    def events(self, step: int) -> Iterator[Update | Sync]:
        """The method's updates of iteration `step`, counted from 0; updates of other roles come `extra` times more."""
        self.terms, self.before = None, {}
        if self.due(step + 1):
            self.before = {role: weights.sample(self.nets.roles[role]) for role in trained(self.method, step)}
            self.terms = Terms()
        for event in self.method.updates(step):
            yield event
            if isinstance(event, Update) and "student" not in event.roles:
                yield from [event] * self.extra

    def compare(self, terms: Mapping[str, Tensor], roles: tuple[str, ...]) -> None:
        """Compare the gradients of loss terms just before their backward pass, if that is possible in this run."""
        if "student" not in roles:
            return
        self.names |= set(terms)
        if self.terms is not None and len(self.names) > 1 and not self.uncompared:
            self.terms.add(terms, self.nets.roles["student"])

    @property
    def uncompared(self) -> str:
        """Why the gradients of loss terms are not compared; empty if they are."""
        if self.settings.compile:
            return "settings.compile: a compiled graph runs backward only once"
        return "several processes: each has only a part of the gradient" if self.processes.world > 1 else ""

    # --- a check ------------------------------------------------------------------------------------------------------

    def check(self, student: VideoModel, step: int) -> Check:
        """Examine the student after `step` iterations: find the verdict, act on it, and record both."""
        contract = self.method.contract_at(self.model.card.contract, step - 1)
        sampled = self.gauge.sample(_sampled_as(student, contract), contract.counts)
        grid = ", ".join(map(str, contract.counts))
        if grid not in self.record.baselines:
            found = self.processes.from_leader(self._baselines(grid, contract))
            self.record = replace(self.record, baselines={**self.record.baselines, grid: found})
        vitals = self.processes.from_leader(self._vitals(sampled, grid, contract, step))
        for name, value in figures(vitals).items():
            require_finite(torch.tensor(value), f"step {step}, health figure {name} of student")
        verdict = judge([*self.record.history, vitals], self.record.baselines[grid])
        check = Check(vitals=vitals, verdict=verdict, done=self._act(vitals, verdict))
        self.record = self.record.with_check(check)
        self.heard.forget()
        self.shown = sampled
        return check

    def _act(self, vitals: Vitals, verdict: Verdict) -> tuple[str, ...]:
        """Follow all policies except `keep_best`, which needs the run's folder; what was done, in words."""
        before, done = self.extra, []
        if lags(vitals):
            self.extra = min(self.extra + 1, self.health.help_critic)
        elif self.extra:
            self.extra -= 1
        if self.extra != before:
            often = f"{1 + self.extra} times" if self.extra else "once"
            done.append(f"each critic update is done {often}")
        checks = self.record.checks
        twice = bool(checks) and checks[-1].verdict.word == verdict.word == "collapsing"
        if twice and self.health.stop_on_collapse and vitals.step < self.settings.steps:
            self.stopped = str(verdict)
            done.append("the run stops: two checks in a row found a collapse")
        return tuple(done)

    def note_best(self, check: Check) -> bool:
        """Whether the student of `check` is the best so far; if so, `best` is set.

        The score is the accuracy (if there is one) minus the distance to the teacher as a share of the initial distance.
        """
        if not self.health.keep_best or check.verdict.word in ("diverging", "collapsing"):
            return False
        start, looks = self.record.baselines[check.vitals.grid].start, check.vitals.looks
        score = (looks.accuracy or 0.0) - looks.distance / max(start.distance, 1e-9)
        same = self.best is not None and self._grid_of(self.best[0]) == check.vitals.grid
        if same and self.best is not None and score <= self.best[1]:
            return False
        self.best = (check.vitals.step, score)
        return True

    @property
    def returns_best(self) -> bool:
        """Does the run return its best student, because the last one fails its check?"""
        ill = bool(self.record.checks) and self.record.checks[-1].verdict.word in ("diverging", "collapsing")
        return ill and self.best is not None

    def _grid_of(self, step: int) -> str:
        return next(check.vitals.grid for check in self.record.checks if check.vitals.step == step)

    # --- what is measured ---------------------------------------------------------------------------------------------

    def _vitals(self, sampled: Sampled, grid: str, contract: Contract, step: int) -> Vitals:
        after = {role: weights.sample(self.nets.roles[role]) for role in self.before}
        own = "student" in after
        self.heard.drain()
        critic, lag = self._critic(sampled, grid, contract)
        return Vitals(
            step=step,
            grid=grid,
            looks=self.gauge.looks(sampled, self._teacher),
            moved={role: weights.moved(self.before[role], after[role]) for role in after},
            change=weights.change(self.before["student"], after["student"]) if own else None,
            coarse=weights.coarse(after["student"]) if own else None,
            noise=self.heard.noise(self.model.denoiser.path),
            asked=self._asked,
            unseen=self.heard.unseen(sampled.times) if contract.trained else (),
            critic=critic,
            lag=lag,
            cosine=self.terms.cosine() if self.terms is not None else None,
            unmeasured=self._unmeasured,
        )

    @property
    def _unmeasured(self) -> dict[str, str]:
        accuracy = {} if self.gauge.scenes else {"accuracy": "only prompts of the built-in world can be checked"}
        return accuracy | ({"cosine": self.uncompared} if len(self.names) > 1 and self.uncompared else {})

    def _critic(self, sampled: Sampled, grid: str, contract: Contract) -> tuple[float | None, float | None]:
        """The critic's error on new samples, relative to that of what it started as; and this, relative to the same on old ones.

        Both networks get what the method gives them: whole clips, or some frames of each.
        """
        start = self._start(grid, contract)
        if self.method.critic is None or start.error is None:
            return None, None
        self.nets.roles[self.method.critic].eval()
        critic: Predictor = self.nets[self.method.critic]
        mine, theirs = self._errors((critic, self._unlearnt), sampled)
        old = self._errors((critic,), start.clips)[0] / max(start.error, 1e-12)
        fresh = mine / max(theirs, 1e-12)
        return fresh, fresh / max(old, 1e-12)

    def _errors(self, networks: tuple[Predictor, ...], clips: Sampled) -> list[float]:
        return self.gauge.errors(networks, self.gauge.mixed(clips), self.model, self._single)

    @property
    def _judge(self) -> Predictor:
        """The network whose score the student follows: the teacher, or another model's denoiser."""
        judge: Predictor = self.nets[judge_of(self.method)]
        return judge

    @property
    def _unlearnt(self) -> Predictor:
        """The frozen network that the critic started as; the judge, if the critic started as a model that is not kept."""
        method = self.method
        begun = origin(method, method.critic or "teacher", sources(method))
        unlearnt: Predictor = self.nets[begun if begun in lenders(method) else judge_of(method)]
        return unlearnt

    @property
    def _single(self) -> int:
        return self.method.shown(self.method.critic or "teacher")

    @cached_property
    def _asked(self) -> float | None:
        guidance = self.method.guidance
        if guidance is None:
            return None
        return self.gauge.asked(guidance, self._judge, self._teacher.latents, self.model, self._single)

    @cached_property
    def _teacher(self) -> Sampled:
        return self.gauge.sample(self.model, (self.model.card.contract.steps,))

    def _start(self, grid: str, contract: Contract) -> Start:
        if self.start is None or self.start.grid != grid:
            clips = self.gauge.sample(_sampled_as(self._begun(), contract), contract.counts)
            error = None if self.method.critic is None else self._errors((self._unlearnt,), clips)[0]
            self.start = Start(grid, clips, error)
        return self.start

    def _begun(self) -> VideoModel:
        """The student before training: the teacher, or the model that `settings.start` names, loaded and transformed again."""
        source = starts(self.settings).get("student")
        if source is None and not self.settings.transforms:
            return self.model
        return untrained(self.model, self.settings, None if source is None else source.load(parts=("denoiser",)))

    def _baselines(self, grid: str, contract: Contract) -> Baselines:
        untrained = self.gauge.sample(self.model, contract.counts)
        clips = (self._teacher, untrained, self._start(grid, contract).clips)
        teacher, same_steps, start = (self.gauge.looks(each, self._teacher) for each in clips)
        return Baselines(teacher=teacher, untrained=same_steps, start=start)

    def draw(self) -> Image.Image:
        """A picture of the last check: the student at its fewest and most steps; what critic and judge make of these clips
        with noise; the teacher."""
        if self.shown is None:
            raise ValueError("there is no check to draw yet; call `check` first")
        rows = self.gauge.seeds * torch.arange(len(self.gauge.prompts))[:SHOWN]
        by_count = self.shown.frames.unflatten(0, (-1, len(self.gauge.texts)))
        x0 = self.gauge.mixed(self.shown)[rows]
        who = [role for role in (self.method.critic, judge_of(self.method)) if role is not None]
        networks: tuple[Predictor, ...] = tuple(self.nets[role] for role in who)
        with self.gauge.precision():
            seen = eyes(networks, x0, self.model, self.gauge.shown(self.model, len(rows)), self._single)
        ends = [by_count[0][rows], by_count[-1][rows]][: len(by_count)]
        return Image.fromarray(sheet([*ends, *seen, self._teacher.frames[rows]]))

    # --- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state as plain values."""
        return {
            "record": self.record.tree(), "extra": self.extra, "best": list(self.best) if self.best else None,
            "stopped": self.stopped, "names": sorted(self.names), "heard": self.heard.state(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.record, self.extra = Record.of(state["record"]), state["extra"]
        self.best = (int(state["best"][0]), float(state["best"][1])) if state["best"] else None
        self.stopped, self.names = state["stopped"], set(state["names"])
        self.heard.restore(state["heard"])


def watching(
    model: VideoModel, method: Method, settings: Settings, nets: Views, processes: Processes, source: Source,
    precision: Callable[[], Any],
) -> Monitor | None:  # fmt: skip
    """The monitor of a run; None if `unexamined` gives a reason for having none."""
    health = settings.health
    if health is None or unexamined(model, method, settings):
        return None
    rng = Rng(settings.seed, device=settings.device).fold("health")
    batch = source.batch(health.prompts, rng)
    gauge = Gauge.of(model, batch.prompts, health.seeds, settings.batch, precision, images_in(model, batch.cond))
    return Monitor(
        health=health,
        gauge=replace(gauge, low=batch.low, shared=nets.spread.shared),
        model=model,
        method=method,
        settings=settings,
        nets=nets,
        processes=processes,
        heard=Heard(),
        record=Record(steps=settings.steps, baselines={}),
    )


def unexamined(model: VideoModel, method: Method, settings: Settings) -> str:
    """Why a run has no health checks; empty if it has them."""
    name, card = type(method).__name__, model.card
    if settings.health is None:
        return "settings.health is null"
    if method.part != "denoiser":
        return f"{name} trains the {method.part}, and only denoisers are checked"
    if method.contract(card.contract) == card.contract:
        return f"{name} does not distil: its student is sampled in the same way as its teacher"
    if "prompts" not in method.needs:
        return f"{name} uses no prompts, and checks need prompts to sample clips"
    if lacking := sorted({"codec", "text"} - model.parts.keys()):
        return f"the model has no {' and no '.join(lacking)}, so it cannot make clips"
    if settings.steps < settings.health.every:
        return f"the run has {settings.steps} iterations, fewer than settings.health.every: {settings.health.every}"
    return ""


def judge_of(method: Method) -> str:
    """The frozen role whose score the student follows, and to which guidance applies: another model's, or the teacher."""
    return next((role for role in lenders(method) if role != "teacher"), "teacher")


def trained(method: Method, step: int) -> tuple[str, ...]:
    """Roles that iteration `step`, counted from 0, trains."""
    events = [event for event in method.updates(step) if isinstance(event, Update)]
    return tuple(dict.fromkeys(role for event in events for role in event.roles))


def _sampled_as(model: VideoModel, contract: Contract) -> VideoModel:
    return VideoModel(replace(model.card, contract=contract), model.parts)
