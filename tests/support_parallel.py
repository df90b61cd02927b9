"""What tests run under several processes: `torchrun ... tests/support_parallel.py FOLDER NAME ...` runs what is named, in order.

The same functions, called in one process, are what the results are compared with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fewstep import distill
from fewstep.attention import KVCache, Ulysses
from fewstep.compress import FlowHead, Int8, Pruned, StepScales, Transform
from fewstep.core import Batch, Call, Cond, Losses, Rng
from fewstep.core.env import place
from fewstep.core.ledger import Ledger
from fewstep.engine import Health, Optim, Parallel, Settings
from fewstep.engine.optim import RoleOptimizer, begin
from fewstep.engine.outline import Drawn
from fewstep.engine.prepare import prepare
from fewstep.engine.run import Run
from fewstep.engine.shard import hollow, shard
from fewstep.engine.views import Views
from fewstep.methods import DMD2, BackwardSimulation, Method, Nets, Scorers, Update
from fewstep.methods.roles import Other, Role
from fewstep.methods.targets import mse
from fewstep.models import Card, Lora, VideoModel
from fewstep.models.card import PARTS
from fewstep.models.depot import Depot, depot_of
from fewstep.models.fingerprint import fingerprint
from fewstep.models.source import ModelSource
from support_engine import CASES, Everything, Sized, small, stored_card, tiny_model

ROOT = Path(__file__).parent.parent
STEPS = 2
WHOLE = Settings(**vars(small(STEPS, ema=0.5, accumulate=4, batch=1)))


@dataclass(frozen=True, kw_only=True)
class EightBits(ModelSource):
    """Another tiny model, with eight bits."""

    def card(self) -> Card:
        return stored_card(self.load())

    def load(self, leave: Collection[str] = (), parts: Collection[str] = PARTS) -> VideoModel:
        return tiny_model(7).transformed(Int8())


@dataclass(frozen=True, kw_only=True)
class Imitation(Method):
    """The student predicts what another, frozen model predicts."""

    cite = "nobody"
    needs = frozenset({"prompts", "x0"})

    def aux(self) -> dict[str, Role]:
        return {"guide": Other(EightBits())}

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        x0 = batch.require("x0")
        t = rng.rand((len(x0),), "t")
        x_t = nets.student.path.add_noise(x0, rng.randn(x0.shape, "eps"), t)
        yield {"imitation": mse(nets.student(x_t, t, batch.cond).x0, nets.guide(x_t, t, batch.cond).x0.detach())}


METHODS: Mapping[str, Method] = {
    "DMD2-pruned": replace(CASES["DMD2"], warmup=1),  # type: ignore[type-var]
    "DMD2-scorers": DMD2(
        critic_updates=1,
        rollout=BackwardSimulation(grids=((1.0, 0.5),)),
        scorers=Scorers(real=Sized(width=36), critic=Sized(width=12)),
    ),
    "DMD2-steps": DMD2(critic_updates=1, rollout=BackwardSimulation(grids=((1.0, 0.5),))),
    "DMD2-head": DMD2(critic_updates=1, rollout=BackwardSimulation(grids=((1.0, 0.5),))),
    "DMD2-eight-bits-adapters": replace(CASES["DMD2"], warmup=1),  # type: ignore[type-var]
    "Imitation": Imitation(),
    "DMD2": replace(CASES["DMD2"], warmup=1),  # type: ignore[type-var]
    "DMD2-muon": replace(CASES["DMD2"], warmup=1),  # type: ignore[type-var]
    "DMD2-everything": CASES["DMD2-everything"],
    "AVDM2": CASES["AVDM2"],
    "Consistency": CASES["Consistency"],
    "KnowledgeDistillation": CASES["KnowledgeDistillation"],
    "Reconstruction": CASES["Reconstruction"],
    "DMD2-adapters": replace(CASES["DMD2"], warmup=1, scorers=Scorers(weak=0.25)),  # type: ignore[type-var]
    "KnowledgeDistillation-adapters": CASES["KnowledgeDistillation"],
}
OWN: Mapping[str, tuple[Transform, ...]] = {
    "DMD2-pruned": (Pruned(blocks=(0,)),),
    "DMD2-steps": (StepScales(steps=2),),
    "DMD2-head": (FlowHead(blocks=1, steps=2),),
    "DMD2-eight-bits-adapters": (Int8(),),
}
"""Transforms of the student."""
LORA = Lora(rank=2)
"""Adapters of the cases above whose names end in `-adapters`."""
PLANNED = small(3, batch=4, accumulate=2, lora=LORA)
EXAMINED = small(4, save_every=2, ema=0.9, accumulate=2, batch=1, health=Health(every=2, prompts=1))
SPREADS: Mapping[str, Parallel] = {
    "shard": Parallel(),
    "whole": Parallel(),
    "replicate": Parallel(replicate=2),
    "sequence": Parallel(sequence=2),
    "checkpointing": Parallel(checkpointing=True),
    "clips": Parallel(shard=1, sequence=2, checkpointing=True),
    "divided": Parallel(shard=2, checkpointing=True),
    "divided_twice": Parallel(shard=2, replicate=2, checkpointing=True),
    "divided_clips": Parallel(shard=2, sequence=2, checkpointing=True),
}


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def watched(
    method: str, spread: str, autocast: str = "off", backend: str = "", folder: Path = Path()
) -> dict[str, Any]:
    """Two iterations: figures, whole gradients, whole networks at the end, calls of the student; bytes of
    frozen weights that this process holds, and the largest number of blocks that a depot brought at the same time.

    With `narrow` in place of a type of arithmetic, frozen matrices are bfloat16, too. With a `backend` blocks are compiled by
    it: one that traces and generates no code takes seconds in place of minutes.
    """
    lora, frozen = LORA if method.endswith("-adapters") else None, "float32"
    if autocast == "narrow":
        autocast = frozen = "bf16"
    settings = replace(WHOLE, parallel=SPREADS[spread], autocast=autocast, compile=bool(backend), lora=lora)
    settings = replace(settings, transforms=OWN.get(method, ()), frozen=frozen)
    if method.endswith("-muon"):
        settings = replace(settings, optim={"student": Optim(type="muon", lr=1e-3)})
    compiler = partial(torch.compile, backend=backend) if backend else torch.compile
    with patch.object(torch, "compile", compiler):
        run = prepare(tiny_model(), METHODS[method], Everything(), settings, folder)
    calls, gradients = [0], {}
    run.nets.student.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    watch_gradients(run, gradients)
    rows, counts = [], []
    with brought_blocks() as brought:
        for _ in range(STEPS):
            run.iterate()
            rows.append(run.figures)
            counts.append(calls[0])
            assert brought.wait(), "weights stay after the iteration"
    weights = {f"{name}.{key}": full(t) for name, net in run.changing.items() for key, t in net.state_dict().items()}
    assert all(t.dtype == torch.float32 for t in weights.values())
    found = {"rows": rows, "calls": counts, "gradients": gradients, "weights": weights}
    return found | {"frozen": frozen_bytes(run), "brought": brought.most}


def frozen_bytes(run: Run) -> int:
    """Bytes of the weights of this process that no optimiser changes and that are no average: shared ones count once."""
    kept: dict[int, int] = {}
    for role in run.nets.roles.keys() - run.optimizers.keys() | {"student"}:
        network, trained = (
            run.nets.roles[role],
            {id(p) for o in run.optimizers.values() for p in o.network.parameters()},
        )
        for tensor in (*network.parameters(), *network.buffers()):
            if id(tensor) not in trained and not tensor.is_meta and role != "ema":
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                kept[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    depots = {id(depot): depot.held for net in run.nets.roles.values() if (depot := depot_of(net)) is not None}
    return sum(kept.values()) + sum(depots.values())


class Brought:
    """The blocks that depots have brought and that somebody holds, now and at most."""

    def __init__(self) -> None:
        self.most, self.count, self._alive = 0, 0, list[weakref.ref[Any]]()

    @property
    def here(self) -> int:
        self._alive = [block for block in self._alive if block() is not None]
        return len(self._alive)

    def wait(self) -> bool:
        """Is none left, after the threads of gloo have let go of what they sent?"""
        for _ in range(50):
            if dist.is_initialized() and self.here:
                time.sleep(0.01)
        return not self.here

    def note(self, block: Tensor) -> Tensor:
        self.wait()
        self.count += 1
        self._alive.append(weakref.ref(block.untyped_storage()))
        self.most = max(self.most, self.here)
        return block


@contextmanager
def brought_blocks() -> Iterator[Brought]:
    """What depots bring in the meantime."""
    brought, fetched = Brought(), Depot._fetched
    with patch.object(Depot, "_fetched", lambda self, share: brought.note(fetched(self, share))):
        yield brought


def peaks(spread: str, folder: Path) -> dict[str, Any]:
    """The most bytes that each update of adapters holds besides what the run holds all the time, in one of its processes."""
    settings = replace(PLANNED, parallel=SPREADS[spread])
    run, draws = prepare(tiny_model(), METHODS["DMD2-adapters"], Everything(), settings, folder), {"exit": 9, "grid": 9}
    batch, found = run.source.batch(settings.batch, Drawn(settings.seed, draws=draws)), {}
    for step in (0, 1):
        for update in run.method.updates(step):
            assert isinstance(update, Update)
            if "+".join(update.roles) in found:
                continue
            for role, network in run.nets.items():
                begin(network, settings.optim_of(role) if role in update.roles else None)
            ledger = Ledger({**run.nets, **run.model.parts})
            spread_ = run.spread if run.spread.park is None else replace(run.spread, park=partial(aside, ledger))
            ledger.watch("flows")
            with ledger:
                for terms in update.losses(Views(run.nets, spread_), batch, Drawn(settings.seed, draws=draws)):
                    torch.stack(list(terms.values())).sum().backward()
            found["+".join(update.roles)] = ledger.left("flows")
            for network in run.nets.values():
                network.zero_grad(set_to_none=True)
    return {"peaks": json.dumps(found)}


def aside(ledger: Ledger, x: Tensor) -> Tensor:
    return ledger.aside(x.clone(), "flows")


def watch_gradients(run: Run, into: dict[str, Tensor]) -> None:
    for role, optimizer in run.optimizers.items():

        def spy(role: str = role, optimizer: RoleOptimizer = optimizer, clip: Any = optimizer.clip) -> Tensor:
            named = optimizer.network.named_parameters()
            into.update({f"{run.step}.{role}.{name}": full(p.grad) for name, p in named if p.grad is not None})
            return clip()

        optimizer.clip = spy  # type: ignore[method-assign]


def per_frame(spread: str, chunk: int = 4) -> dict[str, Tensor]:
    """The reference network with a time of its own for every frame: its output, and gradients of input and weights.

    Clips of 4 frames are made in chunks, each of which reads those before it.
    """
    network, generator = tiny_model().denoiser, torch.Generator().manual_seed(0)
    size, call = place().world_size if spread == "sequence" else 1, Call()
    if size > 1:
        if not dist.is_initialized():
            dist.init_process_group()
        call = Call(shared=Ulysses(dist.group.WORLD))
    x = torch.randn(2, 4, 4, 8, 8, generator=generator).requires_grad_()
    t, text = torch.rand(2, 4, generator=generator), torch.randn(2, 5, 16, generator=generator)
    memory, made, cond = KVCache.empty(), [], Cond(text, torch.ones(2, 5, dtype=torch.bool))
    for part, times in zip(x.split(chunk, 2), t.split(chunk, 1), strict=True):
        prediction = network(part, times, cond, replace(call, kv=network.recall(memory, part, call)))
        memory = memory.commit(prediction.kv, chunk)
        made.append(prediction.raw)
    output = torch.cat(made, 2)
    (output.square().mean() / size).backward()
    found = {"input": x.grad, **{name: p.grad for name, p in network.named_parameters()}}
    gradients = {name: grad for name, grad in found.items() if grad is not None}
    if size > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return {"output": output.detach(), **gradients}


def derivative(spread: str) -> dict[str, Tensor]:
    """A denoiser's output and derivative, with gradients of a loss of both; cut over the processes if asked for."""
    network, generator = tiny_model().denoiser, torch.Generator().manual_seed(0)
    size = place().world_size if spread == "shard" else 1
    if size > 1:
        if not dist.is_initialized():
            dist.init_process_group()
        weights, network = network.state_dict(), hollow(network)
        shard(network, weights, init_device_mesh("cpu", (size,)))
    network.requires_grad_(True)
    x, dx = torch.randn(2, 2, 4, 4, 8, 8, generator=generator)
    t, text = torch.rand(2, generator=generator), torch.randn(2, 5, 16, generator=generator)
    cond = Cond(text, torch.ones(2, 5, dtype=torch.bool))
    found = {}
    for kept in (True, False):
        with torch.set_grad_enabled(kept):
            prediction, tangent = network.jvp(x, t, cond, dx, torch.ones(2))
        found |= {
            f"{kept} output": prediction.raw.detach(),
            f"{kept} derivative": tangent.raw,
            f"{kept} x0": tangent.x0,
        }
        if kept:
            ((prediction.raw - tangent.raw).square().mean() / size).backward()
    return found | {name: full(p.grad) for name, p in network.named_parameters() if p.grad is not None}


def whole_run(output: Path, **others: Any) -> None:
    """A short DMD2 run with an average, from the teacher's folder beside `output`, saved at every second step."""
    teacher, settings = output.parent / "teacher", replace(EXAMINED, **others)
    distill(method=CASES["DMD2"], settings=settings, output=output, model=teacher, data=Everything(), quiet=True)


def adapters_run(output: Path) -> None:
    """As `whole_run`, but of adapters, and all processes share every clip."""
    whole_run(output, lora=LORA, parallel=Parallel(sequence=place().world_size))


def divided_run(output: Path) -> None:
    """As `whole_run`, but of adapters over frozen blocks in bfloat16, which all processes share."""
    parallel = Parallel(shard=place().world_size, checkpointing=True)
    whole_run(output, lora=LORA, autocast="bf16", frozen="bf16", parallel=parallel)


def pruned_run(output: Path) -> None:
    """As `whole_run`, but the student has one block less than its teacher."""
    whole_run(output, transforms=(Pruned(blocks=(1,)),))


def begun(folder: Path) -> dict[str, Any]:
    """What a check takes for the untrained student of a run that has trained a transformed one: its fingerprint."""
    settings = replace(EXAMINED, transforms=(Pruned(blocks=(1,)),))
    run = prepare(tiny_model(), METHODS["DMD2-pruned"], Everything(), settings, folder)
    run.iterate()
    assert run.monitor is not None
    return {"print": fingerprint(run.monitor._begun().denoiser)}


def killed_run(output: Path) -> None:
    """As `whole_run`, but in the first attempt of torchrun the second process kills itself in iteration 4."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and place().rank == 1:
        step, calls = RoleOptimizer.step, count(1)

        def fatal(self: RoleOptimizer, number: int) -> float:
            if number == 3 and next(calls) == 2:
                (output.parent / "was_killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, number)

        RoleOptimizer.step = fatal  # type: ignore[method-assign]
    whole_run(output)


def raising_run(output: Path) -> None:
    """As `whole_run`, but the second process meets an error that the first one does not."""
    if place().rank == 1:

        def broken(self: Run) -> None:
            raise OSError("this disk is gone")

        Run.iterate = broken  # type: ignore[method-assign]
    whole_run(output)


PER_FRAME: Mapping[str, int] = {"per_frame": 4, "streamed": 2}
"""Frames of a chunk, by name."""
WHOLE_RUNS: Mapping[str, Callable[[Path], None]] = {
    "whole_run": whole_run, "adapters_run": adapters_run, "divided_run": divided_run, "pruned_run": pruned_run,
    "killed_run": killed_run, "raising_run": raising_run,
}  # fmt: skip


def launch(processes: int, folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """What is named, by torchrun as a program."""
    paths = [str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, "--monitor-interval=0.1", str(Path(__file__)), str(folder), *names]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


def results(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """What `name` found in one process."""
    stem = folder / f"{name}.{rank}"
    found = json.loads(Path(f"{stem}.json").read_text())
    return found | {kind: load_file(f"{stem}.{kind}.safetensors") for kind in found.pop("tensors")}


def keep(folder: Path, name: str, found: dict[str, Any]) -> None:
    stem = folder / f"{name}.{place().rank}"
    tensors = {kind: value for kind, value in found.items() if isinstance(value, dict)}
    for kind, value in tensors.items():
        save_file({key: t.contiguous() for key, t in value.items()}, f"{stem}.{kind}.safetensors")
    plain = {kind: value for kind, value in found.items() if kind not in tensors} | {"tensors": list(tensors)}
    Path(f"{stem}.json").write_text(json.dumps(plain))


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        if name in WHOLE_RUNS:
            WHOLE_RUNS[name](folder / name)
        elif name in PER_FRAME:
            keep(folder, name, {"found": per_frame("sequence", PER_FRAME[name])})
        elif name == "begun":
            keep(folder, name, begun(folder))
        elif name.startswith("peaks."):
            keep(folder, name, peaks(name.removeprefix("peaks."), folder))
        elif name == "derivative":
            keep(folder, name, {"found": derivative("shard")})
        else:
            keep(folder, name, watched(*name.split("."), folder=folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
    if dist.is_initialized():
        dist.destroy_process_group()
