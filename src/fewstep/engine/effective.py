"""What is in effect in a run, as opposed to what was requested: printed at the start, stored as `effective.json`.

These facts are observed, not derived from the settings, wherever observing is cheap: the kernel that each attention layer
uses, the types of the weights, the number of compiled graphs and graph breaks, the times at which each network was called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.compress.stepwise import knows_steps
from fewstep.core import Call
from fewstep.core.atomic import write_text
from fewstep.core.call import Place
from fewstep.core.compiling import compile_problem
from fewstep.core.devices import emulated
from fewstep.diffusion.times import apart
from fewstep.engine.mesh import Processes
from fewstep.engine.nets import trained_roles
from fewstep.engine.precision import autocast
from fewstep.engine.settings import Optim, Settings
from fewstep.engine.shard import hollow
from fewstep.methods.base import Method, Nets
from fewstep.models import Denoiser
from fewstep.models.bundle import VideoModel
from fewstep.models.runtime import types_of

FILE = "effective.json"
WATCHED = 20
"""Number of first iterations in which the times of all calls are recorded."""
SAME = 1e-6
"""Two times that differ by less than this are the same time in float32."""
LISTED = 64
"""Largest number of distinct times that are listed; if there are more, their range is given."""
LONG = 1024
"""Number of keys from which attention without a fused kernel counts as a fallback on a GPU: it stores all N x N weights."""


class FallbackError(ValueError):
    """A requested feature is not available, and `allow_fallback` is off."""


@dataclass(frozen=True)
class Times:
    """Times at which a network was called: a list of all, or their number and range."""

    count: int = 0
    listed: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def __str__(self) -> str:
        if self.listed:
            return ", ".join(f"{t:.6g}" for t in self.listed)
        return f"{self.count} between {self.low:.6g} and {self.high:.6g}" if self.count else "none"


@dataclass(frozen=True, kw_only=True)
class Effective:
    """What is in effect, as plain values."""

    identity: dict[str, str]
    """Digests of what the run starts from and is made of."""
    device: str
    attention: tuple[str, ...]
    """Attention kernels of the student's blocks, in the order they run; empty if no denoiser is trained."""
    weights: dict[str, str]
    """Types of all weights in the run, by role or by part of the model."""
    arithmetic: str
    """Type of the networks' matrix products."""
    optimizers: dict[str, str]
    spread: str
    """Processes of the run, and which of `settings.parallel` each of them uses."""
    compiles: bool
    """Whether blocks are compiled."""
    graphs: str
    """Graphs and graph breaks found by the compiler."""
    average: str
    """Average of the student that the run returns."""
    adapters: str
    transforms: dict[str, tuple[str, ...]]
    """Transforms of the denoisers that have any, by role."""
    evaluation_times: dict[str, tuple[float, ...]]
    """Times that sampling visits, per step count."""
    training_times: dict[str, Times] = field(default_factory=dict)
    """Times at which each role was called in the first iterations."""
    fallbacks: tuple[str, ...] = ()
    """Requested features that are not in effect."""

    def lines(self) -> list[str]:
        """One line per fact, to be printed."""
        kinds = sorted(set(self.attention))
        shown = ", ".join(f"{self.attention.count(k)} x ({k})" for k in kinds) or "none"
        roles = ", ".join(f"{role} {what}" for role, what in self.optimizers.items())
        slow = emulated(self.arithmetic, self.device)
        facts = [
            f"on {self.device}, {self.spread}; {self.graphs}",
            f"attention by block: {shown}",
            f"weights {', '.join(sorted(set(self.weights.values())))}, arithmetic {self.arithmetic}{slow}",
            f"trained: {roles}; {self.adapters}",
            f"returned: {self.average}",
        ]
        facts += [f"{role} transformed: {', '.join(names)}" for role, names in self.transforms.items()]
        for steps, times in self.evaluation_times.items():
            facts.append(f"sampled in {steps} steps at {', '.join(f'{t:.6g}' for t in times)}")
        return facts + [f"FALLBACK: {what}" for what in self.fallbacks]

    def uncalled(self) -> tuple[float, ...]:
        """Times at which the student will be sampled, but was not called in the watched iterations.

        This concerns the first iterations only: a rollout may reach a rare time later. The health checks judge whether the
        run trains such times, or times so near that a network generalises to them (`Vitals.unseen`).
        """
        seen = self.training_times.get("student", Times())
        if not seen.listed:
            return ()
        wanted = sorted({t for times in self.evaluation_times.values() for t in times if t > 0}, reverse=True)
        return apart(wanted, seen.listed, SAME)

    @property
    def provenance(self) -> dict[str, str]:
        """Entries for the student's card: everything that is not as it was requested."""
        return {"fallbacks": "; ".join(self.fallbacks)} if self.fallbacks else {}

    def with_seen(self, watch: Watch) -> Effective:
        """The same, with what the first iterations showed."""
        return replace(self, training_times=watch.times, graphs=graphs(self.compiles))

    def seen(self) -> list[str]:
        """What the first iterations showed, to be printed."""
        facts = [f"student called at t = {self.training_times.get('student', Times())}"]
        facts += [self.graphs] * self.compiles
        if missed := self.uncalled():
            facts.append(f"not yet called at {', '.join(f'{t:.6g}' for t in missed)}, where it will be sampled")
        return facts

    def tree(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))

    def save(self, folder: Path) -> Path:
        """Write `effective.json` into the run's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, json.dumps(self.tree(), indent=2) + "\n")
        return folder / FILE


class Watch:
    """Records the times at which each denoiser of a run is called (a Listener)."""

    def __init__(self) -> None:
        self.seen: dict[str, set[float]] = {}

    def hear(self, role: str, x_t: Tensor, t: Tensor) -> None:
        self.seen.setdefault(role, set()).update(t.detach().flatten().tolist())

    @property
    def times(self) -> dict[str, Times]:
        found = {}
        for role, seen in sorted(self.seen.items()):
            ordered = tuple(sorted(seen, reverse=True))
            listed = ordered if len(ordered) <= LISTED else ()
            found[role] = Times(len(ordered), listed, ordered[-1], ordered[0])
        return found


class Kernels(TorchDispatchMode):
    """Records the attention kernels that run in a `with` block, in order, and the most keys that an unfused one had."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.unfused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name == "_softmax" or name == "_safe_softmax":
            self.names.append("matmul")
            self.unfused = max(self.unfused, args[0].shape[-1])
        elif name.startswith(_FUSED) and "backward" not in name:
            self.names.append(
                "sdpa-" + name.removeprefix(_FUSED).removesuffix("_attention_for_cpu").removesuffix("_attention")
            )
        return func(*args, **(kwargs or {}))


_FUSED = "_scaled_dot_product_"


def attention_of(
    network: nn.Module, model: VideoModel, settings: Settings, call: Call = Call()
) -> tuple[tuple[str, ...], int]:
    """The attention kernels of every block for one clip of the model's size, and the most keys that an unfused one has.

    A copy of the network is run, one block at a time in memory, so it does not matter where the network's weights are.
    """
    if not isinstance(network, Denoiser) or "codec" not in model.parts:
        return (), 0
    shape, found, unfused = model.latent_shape(), list[str](), 0
    device = torch.empty(0, device=settings.device).device
    backbone = hollow(network.backbone)
    blocks, backbone.blocks = list(backbone.blocks), nn.ModuleList()  # type: ignore[arg-type]
    solid(backbone, device)
    cond = model.blank_cond(1).to(device)
    with torch.enable_grad(), autocast(settings):
        x = torch.zeros(1, *shape, device=device, requires_grad=True)
        state = backbone.embed(x, torch.full((1,), 0.5, device=device), cond, call)  # type: ignore[operator]
        while blocks:
            place = Place(len(found), len(found) + len(blocks), call)
            with Kernels() as kernels:
                state = solid(blocks.pop(0), device)(replace(state, past=None, place=place, new=None))
            state = state.detached  # keep the graph of one block only
            found.append(", ".join(kernels.names) or "none")
            unfused = max(unfused, kernels.unfused)
    return tuple(found), unfused


def solid(network: nn.Module, device: torch.device) -> nn.Module:
    """Give a hollow network weights of zero, in place."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
    return network.to(device)


def in_effect(
    model: VideoModel, method: Method, settings: Settings, nets: Nets, *,
    shell: nn.Module, processes: Processes, identity: Mapping[str, str],
) -> Effective:  # fmt: skip
    """What is in effect for these networks, before the first iteration. FallbackError if this is not what was requested and
    settings.allow_fallback is false. `shell` is the trained network before it was spread over `processes`.
    """
    roles = trained_roles(method, settings.steps)
    contract = method.contract(model.card.contract) if "denoiser" in model.parts else None
    kernels, unfused = attention_of(shell, model, settings, Call(steps=contract.steps if contract else 1))
    compiling = (steps_problem(nets) or compile_problem(settings.device)) if settings.compile else ""
    fallbacks = settle({"compile": compiling, "device": unfused_problem(settings.device, unfused)}, settings)
    compiles, lora = settings.compile and not compiling, settings.lora
    optims = {role: settings.optim_of(role) for role in roles}
    return Effective(
        identity=dict(identity),
        device=str(torch.empty(0, device=settings.device).device),
        attention=kernels,
        weights=types_of({**{part: net for part, net in model.parts.items() if part != method.part}, **nets.roles}),
        arithmetic="bfloat16" if settings.autocast == "bf16" else "float32",
        optimizers={role: told(optim) for role, optim in optims.items()},
        spread=spread_of(settings, processes),
        compiles=compiles,
        graphs="compiled at the first call" if compiles else "not compiled",
        average=f"average of the student, decay {settings.ema:g}" if settings.ema else "the student itself",
        adapters="whole networks"
        if lora is None
        else f"adapters of rank {lora.rank}, strength {lora.alpha / lora.rank:g}",
        transforms=transforms_of(nets),
        evaluation_times={str(n): times for n, times in contract.trained.items()} if contract else {},
        fallbacks=fallbacks,
    )


def told(optim: Optim) -> str:
    """All settings of an optimiser, in one line."""
    rates = ", ".join([f"{optim.lr:g}", *(f"{rate:g} for {key}" for key, rate in optim.lr_of.items())])
    betas = " and ".join(f"{beta:g}" for beta in optim.betas)
    facts = [f"{optim.type} lr {rates} {optim.decay}", f"betas {betas}", f"clip {optim.clip:g}"]
    facts += [f"weight decay {optim.weight_decay:g}"] * bool(optim.weight_decay)
    facts += [f"warm-up {optim.warmup}"] * bool(optim.warmup)
    facts += [f"only {' and '.join(optim.only)}"] * bool(optim.only)
    facts += [f"without {' and '.join(optim.frozen)}"] * bool(optim.frozen)
    return ", ".join(facts)


def spread_of(settings: Settings, processes: Processes) -> str:
    """How the run is spread over processes and memories."""
    parallel, world, sequence = settings.parallel, processes.world, processes.sequence
    waiting = "idle networks on the CPU" if settings.lora is None else "frozen blocks on the CPU"
    facts = ["one process"]
    if world > 1:
        groups = world // sequence if processes.weights is None else parallel.replicate
        shards = world // (groups * sequence)
        facts = [f"{world} processes: replicate {groups} x shard {shards} x sequence {sequence}"]
    facts += ["blocks computed again in the backward pass"] * parallel.checkpointing
    facts += [waiting] * parallel.offload
    return ", ".join(facts)


def unfused_problem(device: str, keys: int) -> str:
    """The problem of attention that would store all N x N weights on a GPU; empty if there is none."""
    if torch.device(device).type != "cuda" or keys <= LONG:
        return ""
    return f"attention over {keys} keys runs as plain matrix products on {device}: no fused kernel takes these shapes"


def steps_problem(nets: Nets) -> str:
    """Why blocks cannot be compiled whose layers know the step; empty where there are none."""
    found = [role for role, network in nets.roles.items() if knows_steps(network)]
    return f"layers of the {found[0]} depend on the step, and such blocks cannot be compiled" if found else ""


def settle(problems: Mapping[str, str], settings: Settings) -> tuple[str, ...]:
    """The fallbacks of a run: the `problems` (by setting) that are not empty. FallbackError if fallbacks are not allowed."""
    found = tuple(f"{setting}: {problem}" for setting, problem in problems.items() if problem)
    if found and not settings.allow_fallback:
        raise FallbackError(
            f"settings.{'; settings.'.join(found)}. Change the setting, or run without it: --allow-fallback"
        )
    return found


def graphs(compiles: bool) -> str:
    """What torch.compile has done so far in this process."""
    if not compiles:
        return "not compiled"
    counters = torch._dynamo.utils.counters
    made, broken = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return f"blocks compiled: {made} graphs, {broken} graph breaks"


def transforms_of(nets: Nets) -> dict[str, tuple[str, ...]]:
    """The transforms of every denoiser, with their arguments; one that has none is left out."""
    found = {role: net.backbone.transforms for role, net in nets.roles.items() if isinstance(net, Denoiser)}
    return {role: tuple(map(repr, transforms)) for role, transforms in found.items() if transforms}
