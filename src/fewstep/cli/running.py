"""How a command runs its models: what `auto` chooses, and `sample --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Unpack

import torch

from fewstep.cli.command import Runs
from fewstep.cli.plan import size
from fewstep.cli.screen import screen, table
from fewstep.core.env import place
from fewstep.engine.memory import parse_bytes
from fewstep.models.bundle import read_card
from fewstep.models.card import Card
from fewstep.models.needs import Needs, Plan, Way, needs, placements, stored_dtype, ways
from fewstep.models.runtime import Runtime

if TYPE_CHECKING:
    from fewstep.cli.generation import Sample

SHARE = 0.9
"""Share of a GPU's free memory that `auto` plans with: kernels and the allocator take some."""


def own_device(name: str) -> str:
    """The device of this process; processes on one machine share its devices evenly. ValueError for a missing device."""
    from fewstep.core.devices import require_device

    require_device(name, "--device")
    if name.startswith("cpu") or ":" in name:
        return name
    return f"{name}:{place().local_rank % torch.accelerator.device_count()}"


def runtime_of(
    options: Runs, source: str, *, device: str | None = None, card: Card | None = None, **plan: Unpack[Plan]
) -> Runtime:
    """How the options run the model `source`, with `auto` chosen for this machine. ValueError for what it cannot do.

    Another `device` is one that need not be there; then nothing is offloaded by itself. `card` is the model's if it is sampled
    in another way than the source's own says, and `plan` is what else `needs` takes.
    """
    card, here = card or read_card(source), device or own_device(options.device)
    given = {field.name: getattr(options, field.name) for field in fields(Runtime)} | {"device": here}
    gpu, automatic = here.startswith("cuda"), {"offload": "none", "guidance_calls": "one"}
    if options.dtype == "auto":
        given["dtype"] = stored_dtype(card, source) if gpu else "float32"
    chosen = {name: value for name, value in automatic.items() if given[name] == "auto"}
    runtime = Runtime(**given | chosen)
    return runtime if device or not gpu or not chosen else _fitted(card, runtime, frozenset(chosen), plan)


def _fitted(card: Card, runtime: Runtime, automatic: frozenset[str], plan: Plan) -> Runtime:
    """With what the GPU's free memory asks for of these fields; with as much as possible where nothing fits by calculation."""
    free, _ = torch.cuda.mem_get_info(runtime.device)
    fixed = [name for name in ("offload", "guidance_calls") if name not in automatic]
    asked, known = [getattr(runtime, name) for name in fixed], dict[str, Needs]()
    for offload, calls in placements(card, runtime):
        made = replace(runtime, offload=offload, guidance_calls=calls)
        if [getattr(made, name) for name in fixed] != asked:
            continue
        if calls not in known:
            known[calls] = needs(card, replace(made, offload=runtime.offload), **plan)
        found = made
        if known[calls].peak(offload) <= SHARE * free:
            break
    return found


def show(options: Sample, card: Card, **plan: Unpack[Plan]) -> int:
    """`sample --dry-run`: what one batch of clips needs, whether it fits, and the simplest ways to make it fit."""
    out, limit = screen(), None if options.memory is None else parse_bytes(options.memory)
    runtime = runtime_of(options, options.student, device=options.device, card=card)
    every = ways(card, runtime, **plan)
    first = next(every)
    out.print(
        f"{card.name}: {plan['clips']} clips of {card.num_frames} frames of {card.height} x {card.width} at once, "
        f"{runtime.dtype} on {options.device}", markup=False, soft_wrap=True,
    )  # fmt: skip
    out.print(table(("\nweights", ""), ((name, size(held)) for name, held in first.needs.weights.items())))
    if first.needs.alone:
        out.print(
            f"\ntext encoder {size(first.needs.alone)}, loaded alone and left before the others are", markup=False
        )
    out.print(table(("\nphase", "weights on the device", "tensors besides", "together"), _phases(first.needs, runtime)))
    out.print(f"\npeak {size(first.peak)}, without the program itself", markup=False)
    if limit is not None:
        _verdict(every, first, limit)
    out.print("dry run: nothing was loaded or written")
    return 0


def _phases(needs: Needs, runtime: Runtime) -> Iterator[tuple[str, ...]]:
    for phase, working in needs.working.items():
        sizes = (needs.resident(phase, runtime.offload), working, needs.total(phase, runtime.offload))
        yield phase, *map(size, sizes)


def _verdict(others: Iterator[Way], first: Way, limit: int) -> None:
    out = screen()
    if first.peak <= limit:
        out.print(f"fits in {size(limit)}: {size(limit - first.peak)} are left for the program and the kernels")
        return
    out.print(f"does not fit in {size(limit)}: {size(first.peak - limit)} too much", markup=False)
    tried: list[tuple[str, str, str]] = []
    for way in others:
        fits = way.peak <= limit
        tried.append((_changes(first.runtime, way.runtime), size(way.peak), "yes" if fits else "no"))
        if fits:
            break
    out.print(table(("\nwith", "peak", "fits"), tried))
    if not tried or tried[-1][2] == "no":
        out.print("\nnone of these fits: make fewer or smaller clips (--batch 1, --num-frames)")


def _changes(first: Runtime, other: Runtime) -> str:
    """The options that make the one the other."""
    names = [field.name for field in fields(Runtime) if getattr(first, field.name) != getattr(other, field.name)]
    return " ".join(f"--{name.replace('_', '-')} {getattr(other, name)}" for name in names)
