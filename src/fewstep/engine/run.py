"""A run in progress: one iteration, the student, and the whole state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core import Batch, Losses, Rng
from fewstep.core.atomic import replacing_folder
from fewstep.core.finite import require_finite
from fewstep.data.base import Source
from fewstep.engine.carrying import Places, carried_in
from fewstep.engine.checkpoint import Checkpoint, RunState
from fewstep.engine.effective import Effective, Watch
from fewstep.engine.health.monitor import Monitor
from fewstep.engine.mesh import Processes
from fewstep.engine.optim import RoleOptimizer, begin
from fewstep.engine.precision import autocast, float32
from fewstep.engine.preview import Preview, Reconstructions
from fewstep.engine.probe import Probe
from fewstep.engine.result import recover_best, saved, with_result
from fewstep.engine.settings import Settings
from fewstep.engine.shard import add_gradients, whole
from fewstep.engine.views import Listener, Views
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.models import VideoModel
from fewstep.models.averaging import blend
from fewstep.models.depot import depot_of
from fewstep.models.lora import merge, save_adapter
from fewstep.models.spread import Spread


@dataclass
class Run:
    """Made by `prepare`; everything that changes during a run lives here."""

    model: VideoModel
    method: Method
    settings: Settings
    output: Path
    processes: Processes
    nets: Nets
    source: Source
    optimizers: dict[str, RoleOptimizer]
    average: nn.Module | None
    base: nn.Module
    """What the student began as: with adapters, the frozen network that they belong to."""
    shell: nn.Module
    """Structure of the student without its weights."""
    exact: Mapping[str, Tensor] | None
    """The weights that adapters are merged into, where a depot has those that are trained with: they are read when a student
    is saved, from their files if they have any. None: those of `base`."""
    spread: Spread
    """How its denoisers are called."""
    identity: dict[str, str]
    """Values that a checkpoint must agree with."""
    provenance: dict[str, str]
    """Provenance entries for the student's card."""
    trees: dict[str, Any]
    """Method, data and settings with every default written out: kept in every checkpoint."""
    effective: Effective
    """What is really in effect, as opposed to what was requested."""
    probe: Probe | None = None
    preview: Preview | Reconstructions | None = None
    monitor: Monitor | None = None
    step: int = 0
    """Iterations done."""
    best: dict[str, float] = field(default_factory=dict)
    """Scores of the best student so far, which is in `output/best`."""
    carried: Places = field(default_factory=Places)
    """What is carried from one update to the next, by place."""
    watch: Watch | None = field(default_factory=Watch)
    """Recorder of the times of all calls in the first iterations; None afterwards."""
    figures: dict[str, float] = field(default_factory=dict)
    """Figures of the last iteration by name; a loss is the mean over micro-batches, processes and repeated updates."""

    # --- one iteration ------------------------------------------------------------------------------------------------

    def iterate(self) -> None:
        """All updates of the current step, in the method's order."""
        if self.average is not None and self.settings.parallel.offload and self.settings.lora is None:
            self.average.to("cpu")
        rng = Rng(self.settings.seed, self.step, device=self.settings.device)
        places = [rng.at(place=place) for place in self.processes.places(self.settings.accumulate)]
        batches = [
            (replace(self.source.batch(self.settings.batch, at), carried=self.carried[at.place]), at.place)
            for at in places
        ]
        seen: dict[str, list[float]] = {}
        events = self.monitor.events(self.step) if self.monitor is not None else self.method.updates(self.step)
        for number, event in enumerate(events):
            match event:
                case Update():
                    for name, value in self.update(event, batches, rng.fold(f"update/{number}")):
                        seen.setdefault(name, []).append(value)
                case Sync(target, source, decay):
                    blend(self.nets[target], self.nets[source], decay)
        if self.average is not None:
            # The average forgets fast at first. With a constant decay it would stay near the teacher for 1/(1-ema) steps.
            blend(self.average, self.nets.student, min(self.settings.ema, (1 + self.step) / (10 + self.step)))
        self.figures = self.processes.mean({name: fmean(values) for name, values in seen.items()})
        self.step += 1

    def update(self, update: Update, batches: list[tuple[Batch, int]], rng: Rng) -> list[tuple[str, float]]:
        """Do one optimiser step of the update's roles and return its figures. If a number is not finite, no weight changes."""
        self.nets.begin(update.roles)
        for role, network in self.nets.roles.items():
            begin(network, self.settings.optim_of(role) if role in update.roles else None)
        figures = []
        nets = Views(self.nets, self.spread, self.listeners)
        for batch, place in batches:
            with autocast(self.settings):
                for terms in update.losses(nets, batch, rng.at(place=place)):
                    figures += self.backward(terms, update.roles)
        for role in update.roles:
            add_gradients(self.nets.roles[role], self.processes)
        norms = {role: self.optimizers[role].clip() for role in update.roles}
        for role, norm in norms.items():
            require_finite(norm, f"step {self.step}, gradient norm of {role}")
            figures.append((f"grad/{role}", float(norm)))
        for role in update.roles:
            figures.append((f"lr/{role}", self.optimizers[role].step(self.step)))
        return figures

    def backward(self, terms: Losses, roles: tuple[str, ...]) -> list[tuple[str, float]]:
        """Add the gradient of one graph to the update's gradient; return the value of each loss term.

        Gradients are summed over processes, so each loss is divided by the number of micro-batches of all processes.
        """
        for name, term in terms.items():
            require_finite(term.detach(), f"step {self.step}, loss {name} of {'+'.join(roles)}")
        share = self.settings.accumulate * self.processes.sequence
        with float32(self.settings):
            if self.monitor is not None:
                self.monitor.compare(terms, roles)
            (torch.stack(list(terms.values())).sum() / share).backward()
        return [(f"loss/{name}", float(term.detach())) for name, term in terms.items()]

    @property
    def listeners(self) -> list[Listener]:
        """The objects that are told of every call of a network."""
        heard = None if self.monitor is None else self.monitor.heard
        return [listener for listener in (self.watch, heard) if listener is not None]

    @property
    def over(self) -> bool:
        """Is the run over: are all iterations done, or has a collapse stopped it?"""
        return self.step >= self.settings.steps or (self.monitor is not None and bool(self.monitor.stopped))

    # --- what a run returns and keeps ---------------------------------------------------------------------------------

    def student(self) -> VideoModel:
        """The model with the student as its trained part: the averaged student if there is one, with adapters merged, or
        beside their frozen weights if those come block by block.

        The student is moved to the run's device; an average that stays elsewhere goes back when the next iteration begins.
        """
        if depot_of(self._result) is not None:
            return with_result(self, self._result)
        made = with_result(self, merge(self.base, self._result.to(self.settings.device)))
        if self.settings.lora is not None:  # adapters are merged where the exact weights wait
            made.denoiser.to(self.settings.device)
        return made

    def keep(self, folder: Path) -> None:
        """Write the student's folder completely or not at all; adapters are stored beside the merged weights.

        Every process must call, because each gives its shards.
        """
        network = whole(self._result, self.shell, self.processes)
        if self.processes.leads:
            with replacing_folder(folder) as draft:
                saved(self, network).save(draft)
                if self.settings.lora is not None:
                    save_adapter(network, draft / "adapter", self.settings.start or self.model.card.name)

    @property
    def _result(self) -> nn.Module:
        return self.average if self.average is not None else self.nets.roles["student"]

    @property
    def changing(self) -> dict[str, nn.Module]:
        """Every network a checkpoint holds, by component."""
        frozen = {"teacher", *(role for role, made in self.method.aux().items() if not made.trainable)}
        roles = {role: net for role, net in self.nets.roles.items() if role not in frozen and net.state_dict()}
        return roles if self.average is None else roles | {"ema": self.average}

    @property
    def stepping(self) -> dict[str, RoleOptimizer]:
        """Every optimiser, by the component of a checkpoint that holds its state."""
        return {f"{role}.optim": optimizer for role, optimizer in self.optimizers.items()}

    @property
    def has_best(self) -> bool:
        """Is there a best student so far, by the probe or by the health checks? It is in `output/best`."""
        return bool(self.best) or (self.monitor is not None and self.monitor.best is not None)

    def state(self) -> RunState:
        components = {name: network.state_dict() for name, network in self.changing.items()}
        components |= {name: optimizer.state() for name, optimizer in self.stepping.items()}
        components |= self.carried.component
        health = self.monitor.state() if self.monitor is not None else None
        values = {"identity": self.identity, "best": self.best, "health": health, "run": self.trees}
        return RunState(self.step, components, values)

    def restore(self, saved: Checkpoint) -> None:
        """Resume from a checkpoint of this run. CheckpointError if it belongs to another run or is incomplete."""
        saved.require(self.identity, {*self.changing, *self.stepping, *carried_in(saved)})
        self.step, self.best = saved.step, dict(saved.values["best"])
        if self.monitor is not None:
            self.monitor.restore(saved.values["health"])
        recover_best(self)
        for name, network in self.changing.items():
            saved.read(name, network.state_dict(), self.processes.disk)
        for name, optimizer in self.stepping.items():
            saved.read(name, optimizer.allocate(saved.shapes(name)), self.processes.disk)
        self.carried.restore(saved, self.processes, self.settings.accumulate)
        if self.monitor is not None and self.processes.leads:
            self.monitor.record.save(self.output)
