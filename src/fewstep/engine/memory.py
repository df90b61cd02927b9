"""What a run will hold in memory, before anything is allocated: the arithmetic.

A run holds the same things from its first iteration to its last (weights, optimiser states, averages) and, while a role
is trained, its gradients and the activations of that update. The largest sum over the kinds of update is the peak. The
sizes come from `outline.py`, which runs the method on tensors without values. All sizes are bytes of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

FLOAT = 4
"""Bytes of a master weight, a gradient, an optimiser's moment."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one network keeps for the whole run."""

    role: str
    network: str
    parameters: int
    """Number of its own weights; those it borrows are counted where they belong."""
    trained: int
    """Number of those that an optimiser changes."""
    weights: int
    optimizer: int
    sharded: bool = True
    """Whether sharding cuts it; discriminators, codecs and encoders stay whole on every process."""
    idles: bool = True
    """Whether offload sends it away while nobody asks for it; the model's other parts stay."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One kind of update: who is trained, and what exists only meanwhile."""

    roles: tuple[str, ...]
    reads: frozenset[str]
    """Networks that are called or trained in it; of the others those that idle could wait in main memory."""
    gradients: int
    activations: int
    """Everything else that is alive at its fullest moment: saved for the backward pass, or just being computed."""
    flops: int = 0
    """Of one update as measured: with the shortest rollout."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """What makes a run smaller without making it another network."""

    shard: int = 1
    """Processes that share the denoisers' weights, gradients and optimiser states equally."""
    offload: bool = False
    """Roles that an update does not read wait in main memory."""
    stored_text: bool = False
    """The text encoder has done its work before training and is not resident."""

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise ValueError(f"shard must be at least 1, got {self.shard}")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The fullest moment of a run."""

    phase: Phase
    resident: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's memory and work."""

    holdings: tuple[Holding, ...]
    phases: tuple[Phase, ...]
    flops: int
    """Of one iteration."""
    means: Means = Means()
    shared: bool = False
    """Networks are adapters over the same weights, which can neither wait elsewhere nor be sharded so far."""

    def resident(self, phase: Phase) -> int:
        """Bytes that stay, as this update sees them."""
        kept = [h for h in self.holdings if not (self.means.stored_text and h.role == "text")]
        if self.means.offload:
            kept = [h for h in kept if h.role in phase.reads or not h.idles]
        return sum((h.weights + h.optimizer) // (self.means.shard if h.sharded else 1) for h in kept)

    def total(self, phase: Phase) -> int:
        """Bytes at the fullest moment of an update, which is in its backward pass."""
        return self.resident(phase) + phase.gradients // self.means.shard + phase.activations

    @property
    def peak(self) -> Peak:
        phase = max(self.phases, key=self.total)
        return Peak(phase=phase, resident=self.resident(phase), bytes=self.total(phase))

    def by(self, means: Means) -> Plan:
        return replace(self, means=means)

    def seconds(self, rate: float, steps: int) -> float:
        """Time of `steps` iterations on a machine that does `rate` floating-point operations per second."""
        return self.flops * steps / rate


@dataclass(frozen=True)
class Remedy:
    """A way to fit: what it consists of, in words, and the plan under it."""

    names: tuple[str, ...]
    plan: Plan

    @property
    def bytes(self) -> int:
        return self.plan.peak.bytes


def optimizer_bytes(trained: int, momentum_only: int = 0) -> int:
    """AdamW keeps two moments per weight; `momentum_only` of the weights keep one (Muon)."""
    return FLOAT * (2 * trained - momentum_only)


def remedies(variants: dict[tuple[str, ...], Plan], shard: int, elsewhere: bool) -> list[Remedy]:
    """Every combination of the measured `variants` (by the names of what they change) with what arithmetic can tell.

    `elsewhere`: main memory is another memory than the one that must suffice. What a plan does already is not offered, nor
    what its networks cannot do. Fewest changes first, then the smallest peak.
    """
    changes: dict[str, dict[str, Any]] = {
        "stored text": {"stored_text": True},
        "offload": {"offload": True},
        f"sharding over {shard}": {"shard": shard},
    }
    found = []
    for names, plan in variants.items():
        possible = {
            name: means for name, means in changes.items()
            if (elsewhere or "shard" in means) and not (plan.shared and "stored_text" not in means)
            and plan.means != replace(plan.means, **means)
        }  # fmt: skip
        for count in range(len(possible) + 1):
            for chosen in combinations(possible, count):
                means: dict[str, Any] = {}
                for name in chosen:
                    means |= possible[name]
                found.append(Remedy((*names, *chosen), plan.by(replace(plan.means, **means))))
    return sorted(found, key=lambda remedy: (len(remedy.names), remedy.bytes))


def fitting(found: list[Remedy], limit: int) -> Iterator[Remedy]:
    """Those that fit and of which no smaller part fits already."""
    kept: list[set[str]] = []
    for remedy in found:
        if remedy.bytes <= limit and not any(names <= set(remedy.names) for names in kept):
            kept.append(set(remedy.names))
            yield remedy


def parse_bytes(text: str) -> int:
    """`24GB` to bytes; as makers of memory do, a GB is 2**30, as a GiB is. ValueError for anything else.

    >>> parse_bytes("24GB") == 24 * 2**30
    True
    """
    units = {"GB": 30, "GIB": 30, "MB": 20, "MIB": 20, "TB": 40, "TIB": 40}
    words = text.strip().upper().replace(" ", "")
    unit = next((u for u in sorted(units, key=len, reverse=True) if words.endswith(u)), "")
    number = words.removesuffix(unit)
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not unit or not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is not a size of memory; write it like 24GB or 800MB")
    return round(value * 2 ** units[unit])
