"""The training loop: one fixed order for every method.

draw -> freeze/unfreeze -> loss by loss backward -> clip -> finite? -> step -> (all updates done) -> average, probe,
picture, log, checkpoint. Distilling a student and training a teacher from scratch are the same function.
"""

from __future__ import annotations

import copy
import difflib
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fewstep.core import Batch, Losses, Rng, dump
from fewstep.core.atomic import recover, replacing_folder
from fewstep.core.build import digest
from fewstep.core.env import place
from fewstep.core.finite import require_finite
from fewstep.data.base import Data, Source, require
from fewstep.engine.checkpoint import CheckpointError, RunState, checkpoints, prune
from fewstep.engine.compiling import compile_problem
from fewstep.engine.health.examine import announce, examine
from fewstep.engine.health.monitor import Monitor, watching
from fewstep.engine.log import RunLog
from fewstep.engine.nets import build_nets, trained_roles
from fewstep.engine.optim import RoleOptimizer
from fewstep.engine.preview import Preview
from fewstep.engine.probe import Probe
from fewstep.engine.settings import Settings
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.models import Card, Denoiser, VideoModel, fingerprint

WHOSE = ("recipe", "method", "cite", "teacher", "data")
"""Entries of the provenance that say which run it is; the others (machine, versions) may change when it goes on."""


@dataclass
class Run:
    """A run in progress. Made by `prepare`; everything that changes during a run lives here."""

    model: VideoModel
    method: Method
    settings: Settings
    output: Path
    nets: Nets
    source: Source
    optimizers: dict[str, RoleOptimizer]
    average: nn.Module | None
    identity: dict[str, str]
    """What a checkpoint must agree with."""
    provenance: dict[str, str]
    """What the student's card says of its making."""
    probe: Probe | None = None
    preview: Preview | None = None
    monitor: Monitor | None = None
    step: int = 0
    """Iterations done."""
    best: dict[str, float] = field(default_factory=dict)
    """Scores of the best student so far, which is in `output/best`."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the last iteration, by name; a loss is the mean over micro-batches and repeated updates."""

    # --- one iteration ------------------------------------------------------------------------------------------------

    def iterate(self) -> None:
        """All updates of the current step, in the method's order."""
        rng = Rng(self.settings.seed, self.step, device=self.settings.device)
        places = [rng.at(place=p) for p in range(self.settings.accumulate)]
        batches = [self.source.batch(self.settings.batch, where) for where in places]
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
            # A short memory at first: an average that starts at the teacher would stay there for 1/(1-ema) steps.
            blend(self.average, self.nets.student, min(self.settings.ema, (1 + self.step) / (10 + self.step)))
        self.figures = {name: fmean(values) for name, values in seen.items()}
        self.step += 1

    def update(self, update: Update, batches: list[Batch], rng: Rng) -> list[tuple[str, float]]:
        """One optimiser step of the update's roles; its figures. Nothing has moved if a number is not finite."""
        for role, network in self.nets.items():
            network.requires_grad_(role in update.roles).train(role in update.roles)
        figures = []
        nets = self.monitor.nets if self.monitor is not None else self.nets
        for number, batch in enumerate(batches):
            with autocast(self.settings):
                for terms in update.losses(nets, batch, rng.at(place=number)):
                    figures += self.backward(terms, "+".join(update.roles))
        norms = {role: self.optimizers[role].clip() for role in update.roles}
        for role, norm in norms.items():
            require_finite(norm, f"step {self.step}, gradient norm of {role}")
            figures.append((f"grad/{role}", float(norm)))
        for role in update.roles:
            figures.append((f"lr/{role}", self.optimizers[role].step(self.step)))
        return figures

    def backward(self, terms: Losses, roles: str) -> list[tuple[str, float]]:
        """Add the gradient of one graph to what this update has; the value of each term."""
        for name, term in terms.items():
            require_finite(term.detach(), f"step {self.step}, loss {name} of {roles}")
        with torch.autocast(_device_type(self.settings), enabled=False):
            if self.monitor is not None:
                self.monitor.hear(terms, roles)
            (torch.stack(list(terms.values())).sum() / self.settings.accumulate).backward()
        return [(f"loss/{name}", float(term.detach())) for name, term in terms.items()]

    # --- what a run returns and keeps ---------------------------------------------------------------------------------

    def student(self) -> VideoModel:
        """The model with the student (its average, where one is kept) in the trained part's place."""
        network = self.average if self.average is not None else self.nets.student
        card = self.model.card
        if self.method.part != "denoiser":
            return self.model.with_part(self.method.part, network, provenance=self.provenance)
        contract = self.method.contract(card.contract)
        role = card.role if contract == card.contract else "student"
        return self.model.with_part(
            "denoiser", network, contract=contract, role=role, provenance=self.provenance, scores=dict(self.best)
        )

    @property
    def changing(self) -> dict[str, nn.Module]:
        """Every network a checkpoint holds, by component."""
        roles = {role: network for role, network in self.nets.items() if role != "teacher"}
        return roles if self.average is None else roles | {"ema": self.average}

    def state(self) -> RunState:
        components = {name: network.state_dict() for name, network in self.changing.items()}
        components |= {f"{role}.optim": optimizer.state() for role, optimizer in self.optimizers.items()}
        health = self.monitor.state() if self.monitor is not None else None
        return RunState(self.step, components, {"identity": self.identity, "best": self.best, "health": health})

    def restore(self, state: RunState) -> None:
        """Go on from a checkpoint. CheckpointError if it belongs to another run or is not whole."""
        theirs: dict[str, str] = state.values["identity"]
        pairs = {key: (was, self.identity.get(key, "absent")) for key, was in theirs.items()}
        changed = [f"{key} was {was}, is {now}" for key, (was, now) in pairs.items() if was != now]
        if changed:
            raise CheckpointError(
                f"{self.output} holds another run ({'; '.join(changed)}). Give another output folder, or delete this one."
            )
        expected = {*self.changing, *(f"{role}.optim" for role in self.optimizers)}
        odd = sorted(expected ^ set(state.components))
        if odd:
            raise CheckpointError(f"the checkpoint in {self.output} lacks or adds components: {', '.join(odd)}")
        recover(self.output / "best")
        if state.values["best"] and not (self.output / "best" / "card.json").is_file():
            raise CheckpointError(
                f"{self.output / 'best'}, the best student so far, is gone. Put it back, or start anew."
            )
        for name, network in self.changing.items():
            network.load_state_dict(state.components[name])
        for role, optimizer in self.optimizers.items():
            optimizer.load_state(state.components[f"{role}.optim"])
        self.step, self.best = state.step, dict(state.values["best"])
        if self.monitor is not None:
            self.monitor.restore(state.values["health"], self.output)

    @property
    def over(self) -> bool:
        """Is this the last iteration: all are done, or a collapse has ended the run?"""
        return self.step >= self.settings.steps or (self.monitor is not None and bool(self.monitor.stopped))


def train(
    model: VideoModel,
    method: Method,
    data: Data,
    settings: Settings,
    output: Path | str,
    *,
    probe: Probe | None = None,
    provenance: dict[str, str] | None = None,
    quiet: bool = False,
) -> VideoModel:
    """Train the method's student and return it; the same call resumes a run that was killed.

    Writes to `output`: `metrics.jsonl`, `tensorboard/`, `previews/`, `checkpoints/`, `health.json`, `health/`, `best/`,
    `student/`. With a probe the returned model is the best by its rule; otherwise the last, or the best so far where the
    last is ill (`settings.health`). `model` becomes the frozen teacher. Raises ValueError when something asked for cannot
    be had, NonFiniteError when a number stops being one, CheckpointError when `output` belongs to another run.
    """
    output = Path(output)
    require(data, method)
    data.check(model)
    run = prepare(model, method, data, settings, output, probe=probe, provenance=provenance or {})
    found = checkpoints(output / "checkpoints")
    if found:
        run.restore(RunState.load(found[-1]))
    with RunLog(output, resume_step=run.step, total=settings.steps, quiet=quiet) as log:
        if found:
            log.say(f"resumed from {found[-1].name}")
        else:
            announce(run, log)
        while not run.over:
            run.iterate()
            after(run, log)
    return finish(run)


def prepare(
    model: VideoModel,
    method: Method,
    data: Data,
    settings: Settings,
    output: Path,
    *,
    probe: Probe | None = None,
    provenance: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Allocate everything a run owns. ValueError names a setting that could not take effect."""
    roles = require_possible(method, settings, model.card, probe)
    identity = {key: provenance[key] for key in WHOSE if key in provenance} | identify(model, method, data, settings)
    model = model.to(settings.device)
    nets = build_nets(model, method, settings.seed)
    average = copy.deepcopy(nets.student) if settings.ema > 0 else None
    optimizers = {role: RoleOptimizer(nets[role], settings.optim_of(role), settings.steps) for role in roles}
    if settings.compile:
        compile_blocks(nets, settings.device)
    source = data.open(model, method.needs)
    rng = Rng(settings.seed, device=settings.device)
    preview = Preview.of(model, source, rng) if settings.preview_every else None
    monitor = watching(model, method, settings, nets, source, partial(autocast, settings))
    return Run(
        model, method, settings, output, nets, source, optimizers, average, identity, dict(provenance), probe, preview,
        monitor,
    )  # fmt: skip


def require_possible(method: Method, settings: Settings, card: Card, probe: Probe | None) -> tuple[str, ...]:
    """The roles that will be trained. Refuse (ValueError) what would silently do nothing, or break in mid-run."""
    name, roles = type(method).__name__, trained_roles(method, settings.steps)
    method.check(settings.steps)
    if "student" not in roles:
        raise ValueError(
            f"{name} does not train the student within settings.steps: {settings.steps} (only {', '.join(roles)}); "
            "give it more steps than its warm-up has"
        )
    if place().world_size > 1:
        raise ValueError(
            f"training runs in one process, and this is one of {place().world_size}; start it without torchrun"
        )
    if "teacher" in roles:
        raise ValueError(f"{name} trains the teacher; train a Copy of it")
    for role in sorted(set(settings.optim) - {*roles, "student"}):
        near = difflib.get_close_matches(role, roles, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"settings.optim.{role} trains nothing; {hint}({name} trains: {', '.join(roles)})")
    if method.part != "denoiser":
        for setting in ("compile", "preview_every"):
            if getattr(settings, setting):
                who = f"{name} trains the {method.part}"
                raise ValueError(f"settings.{setting} is for denoisers, and {who}; leave it out")
    if probe is not None:
        probe.check(card, method.part)
    return roles


def identify(model: VideoModel, method: Method, data: Data, settings: Settings) -> dict[str, str]:
    """What makes a run this run: the weights it starts from, and a digest of everything that decides its numbers."""
    weights = {f"{name} weights": fingerprint(part) for name, part in model.parts.items()}
    trees = {"method": dump(method, Method), "data": dump(data, Data), "settings": dump(settings)}
    return weights | {f"{name} digest": digest(tree) for name, tree in trees.items()}


def compile_blocks(nets: Nets, device: str) -> None:
    """Compile in place. Every role, batch size, grad mode and autocast state is a variant of the one block graph."""
    problem = compile_problem(device)
    if problem:
        raise ValueError(f"settings.compile: {problem}. Install them, or write compile: false")
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for network in nets.values():
        if isinstance(network, Denoiser):
            network.backbone.compile_blocks()


def after(run: Run, log: RunLog) -> None:
    """Check, probe, picture, log and checkpoint, each at its own interval and after the last iteration."""
    step, settings = run.step, run.settings
    examined = run.monitor is not None and run.monitor.due(step)
    if run.monitor is not None and examined:
        examine(run, run.monitor, log)
    last = run.over
    probed = run.probe is not None and (last or step % run.probe.every == 0)
    if run.probe is not None and probed:
        judge(run, run.probe, log)
    if run.preview is not None and (last or step % settings.preview_every == 0):
        run.preview.draw(run.student(), run.output / "previews" / f"{step:06d}.png")
    if probed or examined or last or step % settings.log_every == 0:
        log.write(step, run.figures)
    log.advance(step, " ".join(f"{k[5:]} {v:.3g}" for k, v in run.figures.items() if k.startswith("loss/")))
    if last or (settings.save_every and step % settings.save_every == 0):
        run.state().save(run.output / "checkpoints")
        prune(run.output / "checkpoints", settings.keep_last)


def judge(run: Run, probe: Probe, log: RunLog) -> None:
    """Probe the student, and keep it as the best so far if the probe's rule says so."""
    scores = probe(run.student())
    for name, score in scores.items():
        require_finite(torch.tensor(score), f"step {run.step}, probe figure {name} of student")
    run.figures |= {f"probe/{name}": score for name, score in scores.items()}
    if probe.better(scores, run.best):
        run.best = scores
        with replacing_folder(run.output / "best") as draft:
            run.student().save(draft)
        log.say(f"step {run.step}: best so far, " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))


def finish(run: Run) -> VideoModel:
    """Write `student/`: the best by the probe's rule, or the last, or the best so far where the last is ill."""
    if run.method.part == "codec":
        calibrate(run)
    folder = run.output / "student"
    with replacing_folder(folder) as draft:
        if run.best or (run.monitor is not None and run.monitor.returns_best):
            shutil.copytree(run.output / "best", draft, dirs_exist_ok=True)
        else:
            run.student().save(draft)
    return VideoModel.from_pretrained(folder).to(run.settings.device)


@torch.no_grad()
def calibrate(run: Run, batches: int = 8) -> None:
    """Give a trained codec the mean and deviation of its latents, so that what a denoiser sees is normalised."""
    codec, rng = run.student().codec, Rng(run.settings.seed, device=run.settings.device)
    fresh = [run.source.batch(run.settings.batch, rng.fold(f"calibrate/{i}")).frames for i in range(batches)]
    latents = torch.cat([codec.encode_raw(frames) for frames in fresh if frames is not None])
    codec.set_statistics(latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))


@torch.no_grad()
def blend(target: nn.Module, source: nn.Module, decay: float) -> None:
    """`target <- decay * target + (1 - decay) * source`, parameters and floating-point buffers."""
    for mine, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(theirs, 1 - decay)
        else:
            mine.copy_(theirs)


def autocast(settings: Settings) -> AbstractContextManager[Any]:
    """Without a cache of cast weights: a copy cast under no_grad must not serve the call that carries gradient."""
    return torch.autocast(
        _device_type(settings), dtype=torch.bfloat16, enabled=settings.autocast == "bf16", cache_enabled=False
    )


def _device_type(settings: Settings) -> str:
    return torch.device(settings.device).type
