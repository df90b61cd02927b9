"""`fewstep doctor`: what this machine has, what fewstep will use, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys

import torch

from fewstep import __version__
from fewstep.attention import backends, pick
from fewstep.cli.screen import screen, table
from fewstep.core.compiling import compile_problem
from fewstep.core.devices import has_bfloat16
from fewstep.core.env import cpu_count
from fewstep.evaluate.machine import describe_machine, speed

ARITHMETIC = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def show() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = screen()
    out.print(table(("this machine", ""), facts(device)))
    kinds = (torch.float32, torch.bfloat16)
    rows = [
        (f"{str(kind).removeprefix('torch.')}  {b.name}", "yes" if b.available else "no", b.why)
        for kind in kinds
        for b in backends(device, kind)
    ]
    out.print(table(("\nattention", "", "why"), rows))
    for kind in kinds:
        chosen = pick(device, kind)
        out.print(f"used on {device} in {str(kind).removeprefix('torch.')}: {chosen.name} ({chosen.why})", markup=False)
    return 0


def facts(device: str) -> list[tuple[str, str]]:
    """Facts about this machine, by name."""
    here = describe_machine(device)
    memory = f"{here.memory_gb} GB" if here.memory_gb is not None else "unknown"
    return [
        ("fewstep", __version__),
        ("python", f"{sys.version.split()[0]} ({sys.executable})"),
        ("torch", f"{torch.__version__}, built for {torch.version.cuda or 'CPU'}"),
        ("system", platform.platform()),
        ("processor", f"{here.cpu}: {cpu_count()} cores for this process, {here.threads} torch threads"),
        ("capability", torch.backends.cpu.get_cpu_capability()),
        (
            "speed of one core",
            ", ".join(f"{speed(kind) / 1e9:.0f} GFLOP/s in {name}" for name, kind in ARITHMETIC.items()),
        ),
        ("settings.autocast", _autocast(device)),
        ("settings.compile", compile_problem(device) or "works: a function was compiled and run"),
        ("memory", memory),
        ("gpu", _gpu()),
        ("settings.device", f"write {device!r} in the recipe; fewstep does not choose a device by itself"),
        ("video files", _package("av", "read and written", "pip install av")),
        (
            "8-bit optimisers",
            _package("bitsandbytes", "settings.optim may have type: adamw8bit", 'pip install "fewstep[eightbit]"'),
        ),
        (
            "tensorboard",
            _package("tensorboard", "runs log to it besides metrics.jsonl", 'pip install "fewstep[track]"'),
        ),
    ]


def _autocast(device: str) -> str:
    if device != "cpu" or has_bfloat16():
        return "bf16 is faster here"
    return "write 'off' in the recipe: this processor has no bfloat16 arithmetic, and bf16 is slower than float32"


def _gpu() -> str:
    if torch.cuda.is_available():
        found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
        return "; ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GB, sm_{p.major}{p.minor}" for p in found)
    return "none that torch can use" if torch.version.cuda else "none: this torch was built for the CPU"


def _package(name: str, use: str, remedy: str) -> str:
    if importlib.util.find_spec(name) is None:
        return f"not installed ({remedy})"
    return f"{name} {importlib.metadata.version(name)}: {use}"
