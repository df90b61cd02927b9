"""Memory plan of a run before anything is allocated: the measurement.

It runs the method's own updates once through the networks' own code, with tensors that have a shape and a device but no
values, and counts every tensor for as long as it lives. So a new method, network or attention pattern needs no second
description to be measured. Compiled blocks need less memory than this measurement says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.core import Batch, Call, Carried, Later, Losses, Pairs, Rng
from fewstep.core.ledger import Ledger
from fewstep.engine.health.measure import decode
from fewstep.engine.health.monitor import judge_of, unexamined
from fewstep.engine.memory import FLOAT, Holding, Phase, Plan
from fewstep.engine.nets import build_for, lenders, looked_at, origin, sources, starts, trained_roles
from fewstep.engine.optim import begin, chosen, require_named, state_bytes
from fewstep.engine.precision import autocast, float32
from fewstep.engine.preview import CLIPS
from fewstep.engine.settings import Health, Optim, Settings
from fewstep.engine.student import equipped, with_student
from fewstep.engine.views import Views
from fewstep.methods.base import Method, Nets, Update
from fewstep.methods.frames import fold_frames
from fewstep.models import Card, Denoiser, VideoModel
from fewstep.models.hollow import Absent, imagine
from fewstep.models.runtime import matrices
from fewstep.models.source import outline
from fewstep.models.spread import Park, Spread


@dataclass(frozen=True)
class Drawn(Rng):
    """Random numbers whose shared integers are given, so that a rollout can be measured at its longest."""

    draws: Mapping[str, int] = field(default_factory=dict)

    def integer(self, name: str, high: int) -> int:
        return min(self.draws.get(name, 0), high - 1)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A run that exists in shapes only."""

    model: VideoModel
    method: Method
    settings: Settings
    nets: Nets
    frames: int
    bases: Mapping[str, nn.Module]
    """What the student, and trained roles of other models, begin as: with adapters, the frozen networks that they belong to."""
    probed: int
    """Clips that a probe generates at once; 0: no probe."""
    mode: FakeTensorMode = field(repr=False)

    @classmethod
    def of(cls, card: Card, method: Method, settings: Settings, frames: int | None = None, probed: int = 0) -> Outline:
        mode, settings = FakeTensorMode(allow_non_fake_inputs=True), equipped(settings, method, card)
        model = outline(card)
        others = {role: outline(source.card()) for role, source in {**sources(method), **starts(settings)}.items()}
        others = {**with_student(model, settings, others)}
        bases = {"student": others.get("student", model).part(method.part)}
        bases |= {role: others[role].denoiser for role in sources(method)}
        nets = build_for(settings, model, method, others)
        for role in trained_roles(method, settings.steps):
            require_named(nets[role], settings.optim_of(role))
        for network in {
            id(network): network for network in (*model.parts.values(), *nets.values(), *bases.values())
        }.values():
            imagine(network, mode)
        return cls(
            model=model, method=method, settings=settings, nets=nets, bases=bases, frames=frames or card.num_frames,
            probed=probed, mode=mode,
        )  # fmt: skip

    def plan(self) -> Plan:
        """Memory and work of one process that has the whole run to itself."""
        phases = tuple(self._phase(update) for update in self._kinds())
        shared, again = self.settings.lora is not None, self.settings.parallel.checkpointing
        holdings, pauses = (*self._holdings(), *self._kept()), tuple(self._pauses())
        flops = self._flops(phases)
        return Plan(holdings=holdings, phases=phases, flops=flops, pauses=pauses, shared=shared, again=again)

    def _holdings(self) -> Iterator[Holding]:
        trained = trained_roles(self.method, self.settings.steps)
        for role, network in self.nets.items():
            optim = self.settings.optim_of(role) if role in trained else None
            whole = self.settings.lora is None
            gathered = _gathered(network) if whole else 0
            held = replace(_holding(role, network, optim), gathered=gathered, idles=whole)
            yield self._lent(held, network) if role in lenders(self.method) else held
            if role == "student" and self.settings.ema > 0:
                average = _holding("student average", network)
                yield replace(average, gathered=gathered, idles=whole)
        for role, base in self.bases.items():
            if not any(base is network for network in self.nets.values()):
                yield self._lent(replace(_holding(f"{role}'s base", base), idles=False), base)
        for name, part in self.model.parts.items():
            if name != self.method.part:
                yield replace(_holding(name, part), idles=False)

    def _lent(self, held: Holding, network: nn.Module) -> Holding:
        """A frozen network, which can be narrow; its blocks can come when they run with adapters, or if they are narrow."""
        settings = self.settings
        if not isinstance(network, Denoiser):
            return held
        if settings.frozen == "float32" and settings.autocast == "bf16":
            held = replace(held, narrow=_narrower(network))
        if settings.lora is None and settings.frozen == "float32":
            return held
        blocks = [_bytes(block) for block in network.backbone.blocks]
        return replace(held, blocks=sum(blocks), gathered=max(blocks))

    def _kinds(self) -> Iterator[Update]:
        """The first update of every set of roles with every loss: methods that take turns train one role in several ways."""
        seen = set[tuple[tuple[str, ...], str]]()
        for step in looked_at(self.settings.steps):
            for event in self.method.updates(step):
                if isinstance(event, Update) and (kind := (event.roles, _loss_of(event))) not in seen:
                    seen.add(kind)
                    yield event

    def _phase(self, update: Update) -> Phase:
        """The update with its rollouts at their longest: each rollout of the method in turn, the largest result."""
        draws = [rollout.fullest for rollout in self.method.rollouts if rollout.fullest] or [{}]
        return max((self.phase(update, each) for each in draws), key=lambda phase: phase.activations)

    def phase(self, update: Update, draws: Mapping[str, int]) -> Phase:
        """What the update holds in memory if its rollouts draw these integers (`Rollout.fullest`)."""
        for role, network in self.nets.items():
            begin(network, self.settings.optim_of(role) if role in update.roles else None)
        ledger = Ledger({**self.nets, **{n: p for n, p in self.model.parts.items() if n != self.method.part}})
        flows = [0]

        def park(x: Tensor) -> Tensor:
            flows.append(x.nbytes)
            return ledger.aside(x, "flows")

        for kinds in (("flows",), ("gradients",), ("flows", "gradients")):
            ledger.watch(*kinds)
        trained = [p for role in update.roles for p in self.nets[role].parameters() if p.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(partial(_apart, ledger)) for parameter in trained]
        batch, nets = self.batch(), Views(self.nets, self._spread(park))

        def losses() -> Iterator[Losses]:
            return update.losses(nets, batch, Drawn(self.settings.seed, draws=draws))

        if self.method.carries:  # measured as it goes on with what an update before it has left
            with autocast(self.settings, "cpu"):
                for _ in losses():
                    pass
        with ledger:
            for leaf in _tensors(batch):
                ledger.note(leaf)
            with autocast(self.settings, "cpu"):
                for terms in losses():
                    with float32(self.settings, "cpu"):
                        torch.stack(list(terms.values())).sum().backward()
        gradients = {}
        for role in update.roles:
            parameters = list(self.nets[role].parameters())
            gradients[role] = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            for parameter in parameters:
                parameter.grad = None
        for hook in hooks:
            hook.remove()
        activations = max(0, ledger.peak - sum(gradients.values()))
        before, own = ledger.left("gradients"), max(flows)  # one of the flows is there, where its block runs
        parked = max(0, ledger.peak - ledger.left("flows") - own)
        before_parked = max(0, before - ledger.left("flows", "gradients") - own)
        lent = lenders(self.method) if self.settings.lora is not None else ()
        reads = frozenset(ledger.reads | {*update.roles, *lent})
        return Phase(
            reads=reads, gradients=gradients, activations=activations, parked=parked, before=before,
            before_parked=before_parked, flops=ledger.flops,
        )  # fmt: skip

    def _spread(self, park: Park | None = None) -> Spread:
        """How networks are called: with the processes that share clips."""
        parallel = self.settings.parallel
        shared = Absent(count=parallel.sequence) if parallel.sequence > 1 else None
        return Spread(shared, parallel.checkpointing, park)

    @property
    def _examined(self) -> Health | None:
        return None if unexamined(self.model, self.method, self.settings) else self.settings.health

    def _kept(self) -> Iterator[Holding]:
        """Clips that health checks keep between two checks: the teacher's, the untrained student's, and the last ones."""
        if (health := self._examined) is not None:
            size = self._clips(health) * (1 + 2 * self._counts)
            yield Holding(
                role="clips of checks", network="-", parameters=0, trained=0, weights=size, optimizer=0, idles=False
            )

    @property
    def _counts(self) -> int:
        """Numbers of steps that the student serves; a check makes clips at each."""
        return len(self.method.contract(self.model.card.contract).counts)

    def _clips(self, health: Health) -> int:
        """Bytes that checks keep for one clip per prompt and seed: its latents, and its frames at a small size."""
        with self.mode:
            latents = torch.empty(1, *self.model.latent_shape(self.frames))
            size = latents.nbytes + decode(self.model, latents).nbytes
        return size * health.prompts * health.seeds

    def _pauses(self) -> Iterator[Phase]:
        """The work between iterations: checks, pictures and probes if the settings ask for them, checkpoints."""
        student, critic = "student average" if self.settings.ema > 0 else "student", self.method.critic
        if (health := self._examined) is not None:
            clips, new = min(self.settings.batch, health.prompts * health.seeds), self._clips(health) * self._counts
            check = self._making("health check", clips, {student, judge_of(self.method), critic or student})
            yield replace(check, activations=check.activations + new)  # beside those that are kept
        if self.settings.preview_every and self.method.part == "denoiser":  # reconstructions need less than an update
            yield self._making("picture", CLIPS, {student, "student"})
        if self.probed:
            yield self._making("probe", self.probed, {student}, asks_teacher=False)
        if self.settings.device == "cpu":  # elsewhere its copies are in main memory
            saved = {*trained_roles(self.method, self.settings.steps), student}
            yield Phase(
                pause="checkpoint", reads=frozenset(saved), gradients={}, activations=0, copies=frozenset(saved)
            )

    def _making(self, what: str, clips: int, reads: set[str], *, asks_teacher: bool = True) -> Phase:
        """Memory to make `clips` clips at once: the larger of one network call, which stands for all calls, and decoding.

        `reads` names the networks in memory besides the teacher. With `asks_teacher` the teacher is called too, with guidance.
        """
        batch, teacher = self.batch(clips), self.model.card.contract
        guidance = (teacher if asks_teacher else self.method.contract(teacher)).guidance
        with torch.no_grad(), Ledger(self.model.parts) as ledger, self.mode:
            for leaf in (*batch.cond.tensors, *batch.uncond.tensors):
                ledger.note(leaf)
            x_t = torch.empty(batch.noise_shape)
            with autocast(self.settings, "cpu"):
                call = Call(shared=self._spread().shared if asks_teacher else None)  # of a probe each makes its own
                x0 = guidance(self.nets["teacher"], x_t, torch.ones(clips), batch.cond, batch.uncond, call).x0.float()
            _ = self.model.codec.decode(x0).clamp(-1, 1)
        merged = 0  # a student of adapters is merged into a whole network before it is judged
        if self.settings.lora is not None:
            merged = FLOAT * sum(parameter.numel() for parameter in self.nets["teacher"].parameters())
        reads = {"teacher", "codec"} | reads
        activations = ledger.peak + merged
        return Phase(pause=what, reads=frozenset(reads), gradients={}, activations=activations, merged=merged)

    def batch(self, size: int | None = None) -> Batch:
        """One batch without values: all fields that the method needs, with prompts of the greatest length. The default
        size is the run's."""
        model, card, size = self.model, self.model.card, size or self.settings.batch
        needs = self.method.needs
        frames = (self.frames, card.height, card.width)
        shape = model.codec.latent_shape(*frames) if "codec" in model.parts else (3, *frames)
        grids = [grid for rollout in self.method.rollouts for grid in rollout.contract(card.contract).trained.values()]
        times = tuple(sorted({1.0, 0.0, *(t for grid in grids for t in grid)}, reverse=True))
        with self.mode:
            cond, uncond = model.blank_cond(size, self.frames), model.blank_cond(1, self.frames).expand(size)
            return Batch(
                cond, uncond, shape,
                prompts=("word " * cond.text.shape[1],) * size if "prompts" in needs else (),
                x0=torch.empty(size, *shape) if "x0" in needs else None,
                low=torch.empty(size, *shape) if "low" in needs else None,
                pairs=Pairs(torch.empty(size, len(times), *shape), times) if "pairs" in needs else None,
                frames=torch.empty(size, 3, *frames) if "frames" in needs else None,
                labels=torch.zeros(size, 6, dtype=torch.long) if "labels" in needs else None,
                later=Later(cond, 0) if "later" in needs else None,
                carried=Carried(),
            )  # fmt: skip

    def _flops(self, phases: tuple[Phase, ...]) -> int:
        """Operations of one iteration. For a denoiser they follow from `Method.cost`, which knows the mean rollout length."""
        times = self.settings.accumulate
        if self.method.part != "denoiser":
            return times * sum(phase.flops for phase in phases)
        own = {"student"} if self.settings.transforms else set()
        cost, others = self.method.cost(), {*own, *sources(self.method)}  # a role costs what it is a copy of
        kinds = [(origin(self.method, work.role, others), work.frames, work.layers) for work in cost]
        forward = {kind: self._forward(*kind) for kind in set(kinds)}
        return round(times * sum(work.forwards * forward[kind] for work, kind in zip(cost, kinds, strict=True)))

    def _forward(self, role: str, frames: int, layers: tuple[int, ...]) -> int:
        """Floating-point operations of one forward pass on a batch; the arguments are fields of `Work`."""
        network: Denoiser = self.nets[role]  # type: ignore[assignment]
        steps = self.method.contract(self.model.card.contract).steps
        batch, call = self.batch(), Call(steps=steps, rng=Rng(self.settings.seed))
        with torch.no_grad(), Ledger() as ledger, self.mode:
            x_t, cond = torch.empty(batch.noise_shape), batch.cond
            if frames:
                stills = fold_frames(x_t, frames, Rng(self.settings.seed))
                x_t, cond = stills.clips, stills.of(cond)
            t = torch.ones(len(x_t))
            _ = network.features(x_t, t, cond, layers, call) if layers else network(x_t, t, cond, call)
        return ledger.flops


def _loss_of(update: Update) -> str:
    """Name of the function that computes an update's losses, whatever arguments it is given first."""
    losses = update.losses.func if isinstance(update.losses, partial) else update.losses
    return str(getattr(losses, "__qualname__", ""))


def _apart(ledger: Ledger, parameter: Tensor) -> None:
    if parameter.grad is not None:
        ledger.aside(parameter.grad, "gradients")


def _holding(role: str, network: nn.Module, optim: Optim | None = None) -> Holding:
    """A network, with its optimiser if it is trained."""
    own = list(network.parameters())
    count = sum(p.numel() for p in own)
    borrowed = {name for module in network.modules() for name in module._non_persistent_buffers_set}
    buffers = [b for name, b in network.named_buffers() if name.rpartition(".")[2] not in borrowed]
    return Holding(
        role=role,
        network=_named(network),
        parameters=count,
        trained=sum(p.numel() for p in chosen(network, optim).values()) if optim else 0,
        weights=sum(tensor.nbytes for tensor in (*own, *buffers)),
        optimizer=state_bytes(network, optim) if optim else 0,
        slack=0 if optim is None or optim.type != "adamw" else state_bytes(network, optim) - _least(network, optim),
    )


def _least(network: nn.Module, optim: Optim) -> int:
    """Bytes of the moments that AdamW in 8 bits would keep."""
    return state_bytes(network, replace(optim, type="adamw8bit"))


def _named(network: nn.Module) -> str:
    """Its class, and what was done to it: `VideoDiT, Pruned`."""
    inner = getattr(network, "backbone", network)
    return ", ".join(type(x).__name__ for x in (inner, *getattr(inner, "transforms", ())))


def _gathered(network: nn.Module) -> int:
    """Bytes of the layers that `engine.shard` does not cut, plus the two largest blocks."""
    if not isinstance(network, Denoiser):
        return 0
    blocks = sorted(sum(p.nbytes for p in block.parameters()) for block in network.backbone.blocks)
    return sum(p.nbytes for p in network.parameters()) - sum(blocks[:-2])


def _narrower(denoiser: Denoiser) -> int:
    """Bytes that the matrices of its blocks would take less as bfloat16."""
    tensors = {p for layer in matrices(denoiser) for p in layer.parameters() if p.dtype == torch.float32}
    return sum(tensor.nbytes // 2 for tensor in tensors)


def _bytes(block: nn.Module) -> int:
    """Bytes of what a block has in its state."""
    return sum(tensor.nbytes for tensor in block.state_dict().values())


def _tensors(batch: Batch) -> Iterator[Tensor]:
    states = batch.pairs.states if batch.pairs is not None else None
    every = (*batch.cond.tensors, batch.x0, batch.low, states, batch.frames, batch.labels)
    return (tensor for tensor in every if tensor is not None)
