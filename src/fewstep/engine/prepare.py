"""Allocate everything a run needs; refuse every setting that would have no effect."""

from __future__ import annotations

import copy
import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fewstep.attention import Ulysses
from fewstep.core import Rng, dump
from fewstep.core.bounds import require_bounds
from fewstep.core.build import digest
from fewstep.core.devices import require_device, require_device_name
from fewstep.core.env import place
from fewstep.core.held import held_objects
from fewstep.data.base import Data, Source
from fewstep.engine.begun import require_same
from fewstep.engine.compared import require_batch, require_judged
from fewstep.engine.effective import in_effect
from fewstep.engine.health.monitor import watching
from fewstep.engine.heap import keep_freed_memory
from fewstep.engine.memory import EIGHT_BIT
from fewstep.engine.mesh import Processes, join, require_mesh
from fewstep.engine.nets import build_for, lenders, origin, require_alike, require_clean, sources, starts, trained_roles
from fewstep.engine.offload import Shelf
from fewstep.engine.optim import RoleOptimizer
from fewstep.engine.phases import require_experts
from fewstep.engine.precision import autocast
from fewstep.engine.preview import Preview, Reconstructions
from fewstep.engine.probe import Probe
from fewstep.engine.run import Run
from fewstep.engine.settings import Parallel, Settings
from fewstep.engine.shard import hollow, shard
from fewstep.engine.student import equipped, require_features, require_transformable, with_student
from fewstep.engine.views import Views
from fewstep.methods.base import Method, Nets
from fewstep.models import Card, Denoiser, VideoModel
from fewstep.models.depot import Depot, deposit, depot_of
from fewstep.models.lora import duplicate
from fewstep.models.spread import Spread, to_cpu

WHOSE = ("recipe", "method", "cite", "teacher", "data", "partition")
"""Provenance entries that identify a run; the others (machine, versions) may change when the run is resumed."""


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
    """Allocate everything a run owns. ValueError names a setting that cannot take effect."""
    settings = equipped(settings, method, model.card)
    roles = require_possible(method, settings, model.card, probe)
    require_processes(settings)
    trees = describe(method, data, settings)
    processes = join(settings)
    if settings.device == "cpu":
        keep_freed_memory()
    others = load_others(method, settings, processes)
    identity = {key: provenance[key] for key in WHOSE if key in provenance} | identify(model, trees, others)
    held = Networks.allocate(model, method, settings, processes, others)
    model, nets = held.model, held.nets
    rest = settings.parallel.offload
    optimizers = {
        role: RoleOptimizer(nets.roles[role], settings.optim_of(role), settings.steps, rest=rest) for role in roles
    }
    effective = in_effect(model, method, settings, nets, shell=held.shell, processes=processes, identity=identity)
    if effective.compiles:
        compile_blocks(nets)
    source = open_data(data, model, method, processes)
    rng = Rng(settings.seed, device=settings.device)
    preview = picture_of(model, method, source, rng, held.spread) if settings.preview_every else None
    monitor = watching(
        model, method, settings, Views(nets, held.spread), processes, source, partial(autocast, settings)
    )
    return Run(
        model=model, method=method, settings=settings, output=output, processes=processes, nets=nets, source=source,
        optimizers=optimizers, average=held.average, base=held.base, shell=held.shell, exact=held.exact, spread=held.spread,
        identity=identity, trees=trees, effective=effective, probe=probe, preview=preview, monitor=monitor,
        provenance=dict(provenance) | told(others) | effective.provenance,
    )  # fmt: skip


def picture_of(
    model: VideoModel, method: Method, source: Source, rng: Rng, spread: Spread
) -> Preview | Reconstructions:
    """What a run draws at intervals: clips of a denoiser, or reconstructions of a codec."""
    return Reconstructions.of(source, rng) if method.part == "codec" else Preview.of(model, source, rng, spread.shared)


def load_others(method: Method, settings: Settings, processes: Processes) -> dict[str, VideoModel]:
    """Other models whose denoisers a run uses, by role. Weights that will be divided are not loaded yet."""
    divides = processes.weights is not None or settings.brings()
    leave, others = ("denoiser",) if divides else (), {**sources(method), **starts(settings)}
    return {
        role: source.load(leave=() if role == "student" and settings.transforms else leave, parts=("denoiser",))
        for role, source in others.items()
    }


def depot_for(settings: Settings, processes: Processes) -> Depot:
    """An empty depot for a run's frozen blocks: divided over the processes that share weights, on the CPU with offload."""
    group = None if processes.weights is None else processes.weights["shard"].get_group()
    return Depot(torch.empty(0, device=settings.device).device, group, settings.parallel.offload)


def told(others: Mapping[str, VideoModel]) -> dict[str, str]:
    """Entries for the student's card about the other models it was made with: name, fingerprint and their own provenance."""
    names = {role: f"{other.card.name} {other.fingerprint('denoiser')}" for role, other in others.items()}
    return names | {f"{role}.{key}": v for role, other in others.items() for key, v in other.card.provenance.items()}


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Every network of a run, on the device where it computes."""

    model: VideoModel
    """Model that the run starts from; its trained part is the teacher."""
    nets: Nets
    """Networks by role."""
    base: nn.Module
    """What the student begins as: with adapters, the frozen network that they belong to."""
    average: nn.Module | None
    """Averaged student."""
    shell: nn.Module
    """Structure of the student without its weights."""
    exact: Mapping[str, Tensor] | None
    """As in `Run`."""
    spread: Spread
    """How its denoisers are called."""

    @classmethod
    def allocate(
        cls,
        model: VideoModel,
        method: Method,
        settings: Settings,
        processes: Processes,
        others: Mapping[str, VideoModel],
    ) -> Networks:
        """Make the networks that a model and a method need, on the run's device or spread over its processes.

        If a network will be divided, only its structure is copied. Each role then takes its shards of the weights it starts
        with: the teacher's, or another model's. What adapters borrow, and narrow frozen blocks, are kept by a depot.
        """
        part, others = method.part, with_student(model, settings, others)
        weights, shell = {"teacher": model.weights(part)}, hollow(others.get("student", model).part(part))
        weights |= {role: other.weights("denoiser") for role, other in others.items()}
        depot = depot_for(settings, processes) if settings.brings(processes.world) else None
        sharded = (processes.weights is not None or depot is not None) and isinstance(shell, Denoiser)
        exact = None  # what adapters will be merged into, on the CPU
        if settings.frozen == "bf16" and settings.lora is not None and depot is None:
            exact = copy.deepcopy(others.get("student", model).part(part))
        if sharded:
            model = VideoModel(model.card, {**model.parts, part: hollow(model.part(part))})
            others = {role: VideoModel(o.card, {"denoiser": hollow(o.denoiser)}) for role, o in others.items()}
        for name, network in model.parts.items():
            if not sharded or name != part:
                network.to(settings.device)
        if not sharded:
            for other in others.values():
                other.denoiser.to(settings.device)

        def settle(role: str, denoiser: Denoiser) -> None:
            if depot is not None:
                deposit(denoiser, weights[role], depot)

        nets = build_for(settings, model, method, others, settings.device, settle)
        average = duplicate(nets.student) if settings.ema > 0 else None
        shared = None if processes.tokens is None else Ulysses(processes.tokens)
        spread = Spread(shared, settings.parallel.checkpointing, to_cpu if settings.parallel.offload else None)
        for role, denoiser in {**nets, "ema": average}.items():
            if isinstance(denoiser, Denoiser):
                if processes.weights is not None and depot_of(denoiser) is None:
                    shard(denoiser, weights[origin(method, role, weights)], processes.weights)
                spread.check(denoiser.backbone)
        if settings.parallel.offload and settings.lora is None:
            nets = Shelf(nets.roles, settings.device, [role for role in nets if depot_of(nets.roles[role]) is not None])
        base = others.get("student", model).part(part) if exact is None else exact
        kept = weights[origin(method, "student", weights)] if depot is not None and settings.lora is not None else None
        return cls(model=model, nets=nets, base=base, average=average, shell=shell, exact=kept, spread=spread)


def require_possible(
    method: Method, settings: Settings, card: Card, probe: Probe | None, begun: Card | None = None
) -> tuple[str, ...]:
    """The roles that will be trained. Refuse (ValueError) a setting that would do nothing, or would fail during the run.

    `begun` is the card of the student at `settings.start`, if it is known before that folder exists.
    """
    require_sound(method, card)
    settings = equipped(settings, method, card)
    require_device_name(settings.device, "settings.device")
    name, roles = type(method).__name__, trained_roles(method, settings.steps)
    method.check(settings.steps)
    if "student" not in roles:
        raise ValueError(
            f"{name} does not train the student within settings.steps: {settings.steps} (it trains only "
            f"{', '.join(roles)}); write more steps than the method's warm-up has"
        )
    require_alike(method, card)
    require_same(method, settings, card, begun)
    require_clips(method, card)
    require_going_on(method, settings)
    require_batch(method, settings)
    require_judged(method, card)
    for role in set(lenders(method)).intersection(roles):
        raise ValueError(
            f"{name} trains the {role}, which stays frozen; make a role that is a Copy of it and train that"
        )
    for role in sorted(set(settings.optim) - {*roles, "student"}):
        near = difflib.get_close_matches(role, roles, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"settings.optim.{role}: no such role is trained; {hint}({name} trains: {', '.join(roles)})")
    require_eight_bit_possible(method, settings)
    for made in method.aux().values():
        made.check(settings.lora)
    if method.part == "denoiser":
        require_transformable(method, settings, card)
        require_features(method, settings, card)
        require_experts(method, settings, card)
        require_again(settings)
    if settings.frozen == "bf16" and settings.autocast != "bf16":
        raise ValueError(
            "settings.frozen: bf16 keeps what autocast casts in every call; write autocast: bf16, or leave frozen out"
        )
    if method.part != "denoiser":
        who = f"{name} trains the {method.part}"
        if settings.frozen != "float32":
            raise ValueError(f"settings.frozen is for denoisers, and {who}; leave it out")
        for setting in ("compile", "preview_every", "lora", "transforms"):
            if getattr(settings, setting) and (setting, method.part) != ("preview_every", "codec"):
                raise ValueError(f"settings.{setting} is for denoisers, and {who}; leave it out")
        for field in ("shard", "replicate", "sequence", "checkpointing"):
            if getattr(settings.parallel, field) != getattr(Parallel(), field):
                raise ValueError(
                    f"settings.parallel.{field} is for denoisers, and {who}, which every process holds whole; leave it out"
                )
    if probe is not None:
        probe.check(card, method.part)
        if method.contract(card.contract).grid.video_noise is not None:
            raise ValueError("probe: a probe samples from noise, and this student begins with a video; leave probe out")
    return roles


def require_again(settings: Settings, world: int = 1) -> None:
    """Refuse (ValueError) frozen blocks that come when they run, and would all stay until the backward pass."""
    if settings.brings(world) and not settings.parallel.checkpointing:
        raise ValueError(
            "settings.parallel: frozen blocks that processes share (shard, replicate) or that wait on the CPU (offload) come "
            "when they run, and the backward pass would keep them all; write checkpointing: true, so that each comes again"
        )


def require_eight_bit_possible(method: Method, settings: Settings) -> None:
    """Refuse (ValueError) 8-bit moments that are paged in vain, or whose weights processes divide."""
    parallel = settings.parallel
    for role, kind in _eight_bit(settings).items():
        if kind.startswith("paged") and (settings.device.startswith("cpu") or parallel.offload):
            why = (
                "settings.parallel.offload moves them already"
                if parallel.offload
                else "this device has no other memory"
            )
            raise ValueError(
                f"settings.optim.{role}: {kind} pages a GPU's optimiser states to main memory, and {why}; write adamw8bit"
            )
        processes = parallel.replicate * max(parallel.shard, 1) * parallel.sequence
        if method.part == "denoiser" and settings.lora is None and processes > 1:
            raise ValueError(
                f"settings.optim.{role}: {kind} keeps blocks of whole weights, and settings.parallel divides them; write "
                "type: adamw, which divides its states, or train adapters (settings.lora: {}), which stay whole"
            )


def require_eight_bit(settings: Settings) -> None:
    """Refuse (ValueError) 8-bit moments where bitsandbytes is missing."""
    for role, kind in _eight_bit(settings).items():
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                f'settings.optim.{role}: {kind} needs bitsandbytes, which is not installed: pip install "fewstep[eightbit]", '
                "or write type: adamw"
            )


def _eight_bit(settings: Settings) -> dict[str, str]:
    return {role: optim.type for role, optim in settings.optim.items() if optim.type in EIGHT_BIT}


def require_sound(method: Method, card: Card) -> None:
    """Refuse (ValueError) numbers out of bounds, which files cannot hold and Python can, and a model that tells no clean clip."""
    for part in held_objects(method):
        require_bounds(part, type(part).__name__)
    if method.part == "denoiser":
        require_clean(card)


def require_going_on(method: Method, settings: Settings) -> None:
    """Refuse (ValueError) streams that go on from update to update where nobody can go on with them."""
    name = type(method).__name__
    for rollout in method.rollouts:
        if not (rollout.whole or method.continues):
            raise ValueError(
                f"{type(rollout).__name__} makes clips with a past or prompts of their own, and {name} would show its networks "
                "neither; use DMD2 or AdversarialDistillation, or a rollout of whole clips (SelfForced with overlap: 0)"
            )
    if method.carries and settings.parallel.sequence > 1:
        raise ValueError(
            f"{name} carries clips from one update to the next, and processes that share a clip would each carry a part of it; "
            "write settings.parallel.sequence: 1"
        )


def require_clips(method: Method, card: Card) -> None:
    """Refuse (ValueError) a method that shows single frames to an image-to-video network, which takes whole clips."""
    others = sources(method)
    shown = [work.role for work in method.cost() if work.frames]
    refused = [role for role in shown if origin(method, role, {"teacher", *others}) == "teacher"]
    if "image" in card.parts and refused:
        raise ValueError(
            f"{type(method).__name__} shows single frames to the {refused[0]}, and {card.name!r} is an image-to-video model, "
            "which takes whole clips; choose another method, or settings of this one that use whole clips"
        )


def require_processes(settings: Settings) -> None:
    """Refuse (ValueError) what the processes that are there now cannot do; a recipe may be right for other machines."""
    require_device(settings.device, "settings.device")
    require_mesh(settings.parallel, settings.accumulate, settings.device)
    require_again(settings, place().world_size)
    require_eight_bit(settings)
    if place().world_size == 1:
        return
    if settings.compile and settings.parallel.sequence > 1:
        raise ValueError(
            "settings.compile cannot compile the communication between processes that share a clip; write compile: false, "
            "or settings.parallel.sequence: 1"
        )


def describe(method: Method, data: Data, settings: Settings) -> dict[str, Any]:
    """Everything except the weights that decides a run's numbers, as plain values with every default written out."""
    return {
        "method": dump(method, Method),
        "data": dump(data, Data),
        "settings": {key: value for key, value in dump(settings).items() if key != "parallel"},
    }


def identify(model: VideoModel, trees: Mapping[str, Any], others: Mapping[str, VideoModel]) -> dict[str, str]:
    """The identity of a run: the weights it starts from, and a digest of everything that decides its numbers."""
    weights = {f"{name} weights": model.fingerprint(name) for name in model.parts}
    weights |= {f"{role} weights": other.fingerprint("denoiser") for role, other in others.items()}
    return weights | {f"{name} digest": digest(tree) for name, tree in trees.items()}


def open_data(data: Data, model: VideoModel, method: Method, processes: Processes) -> Source:
    """Open the data. The leader opens them first and stores text states, which the other processes then find."""
    with processes.in_turn():
        source = data.open(model, method.needs)
    if data.text_cache:
        model.part("text").to("cpu")  # its work is done; for pictures and probes it encodes on the CPU
    return source


def compile_blocks(nets: Nets) -> None:
    """Compile in place. Each role, batch size, grad mode and autocast state is one more variant of the same block graph."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for network in nets.roles.values():
        if isinstance(network, Denoiser):
            network.backbone.compile_blocks(hooked=isinstance(network, FSDPModule))
