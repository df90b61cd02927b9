"""`--dry-run`: what a recipe trains, and the memory and cost that it needs, from networks without values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fewstep.cli.command import UsageError
from fewstep.cli.screen import screen, table
from fewstep.core.bounds import Bounds
from fewstep.core.env import place
from fewstep.engine.memory import Means, Plan, Remedy, fitting, parse_bytes, remedies
from fewstep.engine.outline import Outline
from fewstep.engine.settings import Settings
from fewstep.engine.student import equipped
from fewstep.methods import in_forwards
from fewstep.models import Lora
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card
from fewstep.pipeline import Pipeline
from fewstep.recipe import Recipe

if TYPE_CHECKING:
    from fewstep.cli.arguments import Train

TRIED = 6
"""Largest number of shown ways to make a run fit."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device that a run is compared with; None for what the user did not give."""

    memory: int | None = None
    flops: float | None = None
    """Floating-point operations per second."""
    price: float | None = None
    """Price of one hour."""
    shard: int = 8

    @classmethod
    def of(cls, options: Train) -> Device:
        if options.price is not None and options.flops is None:
            raise UsageError("--price needs --flops, because the cost depends on the time; add --flops")
        for option in ("flops", "price"):
            value = getattr(options, option)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"--{option} must be a positive number, got {value}")
        if options.shard is not None and (wrong := Bounds(1, 65_536).problem(options.shard)):
            raise UsageError(f"--shard {wrong}")
        if options.shard is not None and options.memory is None:
            raise UsageError("--shard needs --memory, the memory that the run must fit into; add --memory")
        memory = None if options.memory is None else parse_bytes(options.memory)
        return cls(memory=memory, flops=options.flops, price=options.price, shard=options.shard or 8)


def show(recipe: Recipe | Pipeline, output: Path, device: Device = Device()) -> int:
    out = screen()
    if isinstance(recipe, Pipeline):
        recipe.check()
        for number, stage in enumerate(recipe.plan(output), 1):
            out.print(f"stage {number} of {len(recipe.stages)}, {stage.name}, of recipe {recipe.hash}", markup=False)
            _show(out, stage.alone, stage.card, stage.folder, device)
            out.print()
    else:
        out.print(f"recipe {recipe.hash}", markup=False)
        _show(out, recipe, recipe.check(), output, device)
    out.print("dry run: nothing was loaded or written")
    return 0


def _show(out: Console, recipe: Recipe, card: Card, output: Path, device: Device) -> None:
    """One recipe, or one stage of several."""
    plan = planned(recipe, recipe.settings, card)
    out.print(f"{type(recipe.method).__name__} on {card.name}, would write {output}", markup=False)
    out.print(table(("held all the time", "network", "parameters", "trained", "weights", "optimiser"), holdings(plan)))
    out.print(table(("\nmeanwhile", "gradients", "activations", "with all that is held"), phases(plan)))
    out.print(table(("\nshapes", ""), shapes(recipe, card)))
    out.print()
    for line in work(recipe, plan, device):
        out.print(line, markup=False)
    if device.memory is not None:
        verdict(out, recipe, card, plan, device)


def planned(recipe: Recipe, settings: Settings, card: Card) -> Plan:
    """The plan of a recipe with other `settings`; it includes what data and `settings.parallel` already do to save memory."""
    parallel = settings.parallel
    shard = parallel.shard * parallel.sequence or max(1, place().world_size // parallel.replicate)
    shard = 1 if settings.lora is not None and parallel.whole else shard
    stored = bool(recipe.data.text_cache) and settings.device != "cpu"
    probed = recipe.probe.clips if recipe.probe is not None else 0
    plan = Outline.of(card, recipe.method, settings, recipe.data.num_frames, probed).plan()
    return plan.by(Means(shard=shard, offload=parallel.offload, stored_text=stored))


def holdings(plan: Plan) -> Iterator[tuple[str, ...]]:
    """One row per network."""
    for held in plan.holdings:
        trained = f"{held.trained:,}" if held.trained else "no"
        sizes = (size(held.weights), size(held.optimizer) if held.optimizer else "-")
        yield held.role, held.network, f"{held.parameters:,}", trained, *sizes


def phases(plan: Plan) -> Iterator[tuple[str, ...]]:
    """One row per kind of update, and per kind of work between iterations."""
    for phase in (*plan.phases, *plan.pauses):
        yield (
            phase.name,
            size(sum(phase.gradients.values())) if phase.gradients else "-",
            size(phase.activations + plan.copied(phase)),
            size(plan.total(phase)),
        )


def shapes(recipe: Recipe, card: Card) -> list[tuple[str, str]]:
    """Shapes of the tensors in a run, by name."""
    from fewstep.models.source import outline as sketch

    model: VideoModel = sketch(card)
    batch = recipe.settings.batch
    frames = recipe.data.num_frames or card.num_frames
    rows = [("frames [B, 3, F, H, W]", str([batch, 3, frames, card.height, card.width]))]
    if "codec" in model.parts:
        latents = [batch, *model.codec.latent_shape(frames, card.height, card.width)]
        rows.append(("latents [B, C, F, h, w]", str(latents)))
    if "text" in model.parts:
        rows.append(("text states [B, L, D]", str([batch, model.text.length, model.text.width])))
    if "denoiser" in model.parts:
        contract = recipe.method.contract(card.contract)
        grids = {steps: [round(t, 4) for t in times] for steps, times in contract.trained.items()}
        how = (
            f"{type(contract.sampler).__name__}, guidance {contract.guidance.scale:g}, times {grids or 'of any number'}"
        )
        rows.append(("sampled with", how))
    return rows


def work(recipe: Recipe, plan: Plan, device: Device) -> Iterator[str]:
    """Peak memory, length, time and cost, one line each."""
    settings, peak = recipe.settings, plan.peak
    yield f"peak {size(peak.bytes)} ({peak.phase.name}), without the program itself"
    if plan.means.offload:
        yield f"{size(max(map(plan.waiting, (*plan.phases, *plan.pauses))))} wait in main memory"
    clips = settings.batch * settings.accumulate
    cost = in_forwards(recipe.method.cost())
    yield f"{settings.steps} iterations of {clips} clips, {cost} forward-equivalents per clip and iteration"
    yield f"{plan.flops / 1e12:.3g} TFLOP per iteration"
    if device.flops is not None:
        hours = plan.seconds(device.flops, 1000) / 3600
        cost = f", costs {device.price * hours:,.2f}" if device.price is not None else ""
        yield f"1000 iterations take {duration(hours)} at {device.flops:.3g} FLOP/s{cost}"


def verdict(out: Console, recipe: Recipe, card: Card, plan: Plan, device: Device) -> None:
    """Whether the run fits, and the simplest ways to make it fit."""
    limit = device.memory or 0
    if plan.peak.bytes <= limit:
        out.print(f"fits in {size(limit)}: {size(limit - plan.peak.bytes)} are left for the program and the kernels")
        return
    out.print(f"does not fit in {size(limit)}: {size(plan.peak.bytes - limit)} too much")
    found = remedies(variants(recipe, card, plan, device.shard), device.shard, recipe.settings.device != "cpu")
    single = [remedy for remedy in found if len(remedy.names) == 1]
    out.print(table(("\nalone", "peak", "fits"), (_row(remedy, limit) for remedy in single)))
    ways = list(fitting([remedy for remedy in found if remedy.names], limit))
    if not ways:
        out.print(
            "\nnone of these makes the run fit, not even all together: use a smaller settings.batch, clip or network"
        )
        return
    if any(len(remedy.names) > 1 for remedy in ways):
        shown = [remedy for remedy in ways if len(remedy.names) > 1][:TRIED]
        out.print(table(("\ntogether", "peak", "fits"), (_row(remedy, limit) for remedy in shown)))
    out.print(f"\nnearest: {'; '.join(how(name, device.shard) for name in ways[0].names)}", markup=False)


def how(name: str, processes: int) -> str:
    """What to write to have a way to make a run fit."""
    start = f"torchrun --nproc-per-node {processes}"
    return {
        "LoRA": "settings.lora: {}",
        "checkpointing": "settings.parallel.checkpointing: true",
        "stored text": "data.text_cache: FOLDER",
        "frozen in bf16": "settings.frozen: bf16",
        "8-bit optimiser states": "settings.optim: {student: {type: adamw8bit}}, and so for each role with an entry of its own",
        "offload": "settings.parallel.offload: true",
        f"sharding over {processes}": f"settings.parallel.shard: {processes} ({start})",
        f"clips shared by {processes}": f"settings.parallel: {{shard: 1, sequence: {processes}}} ({start})",
    }[name]


def variants(recipe: Recipe, card: Card, plan: Plan, processes: int = 1) -> dict[tuple[str, ...], Plan]:
    """The plan of the run, and measured plans with each setting that changes its activations. With several `processes` they
    may share every clip, besides the weights, where a clip has equal parts."""
    settings, parallel = equipped(recipe.settings, recipe.method, card), recipe.settings.parallel
    if recipe.method.part != "denoiser":
        return {(): plan}
    ways: dict[tuple[str, ...], Settings] = {(): settings}
    idle = any(transform.identity for transform in settings.transforms)  # adapters would leave them so
    if settings.lora is None and not idle:
        ways["LoRA",] = replace(settings, lora=Lora())
    if not parallel.checkpointing:
        again = replace(parallel, checkpointing=True)
        ways |= {(*names, "checkpointing"): replace(way, parallel=again) for names, way in ways.items()}
    if processes > 1 and (parallel.replicate, parallel.sequence) == (1, 1) and not settings.compile:
        ways |= {
            (*names, f"clips shared by {processes}"): replace(
                way, parallel=replace(way.parallel, shard=1, sequence=processes)
            )
            for names, way in ways.items()
            if way.parallel.checkpointing
        }
    found: dict[tuple[str, ...], Plan] = {(): plan}
    for names, way in ways.items():
        if names and (way.parallel.checkpointing or not way.brings()):
            with suppress(ValueError):  # clips without equal parts, or a network that cannot share them
                found[names] = planned(recipe, way, card)
    return found


def _row(remedy: Remedy, limit: int) -> tuple[str, str, str]:
    return " + ".join(remedy.names), size(remedy.bytes), "yes" if remedy.bytes <= limit else "no"


def size(amount: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{amount / 2**30:,.1f} GiB" if amount >= 10 * 2**30 else f"{amount / 2**20:,.1f} MiB"


def duration(hours: float) -> str:
    return (
        f"{hours:.1f} hours"
        if hours >= 1
        else f"{60 * hours:.1f} minutes"
        if hours >= 1 / 60
        else f"{3600 * hours:.1f} s"
    )
