"""Memory plan of a run before anything is allocated: the sums.

A run always holds weights, optimiser states and averages. While it trains a role it also holds that role's gradients and the
activations of the update. Between iterations, checks, pictures and probes generate clips. The largest sum is the peak. The
sizes come from `outline.py`, which runs the method on tensors without values. All sizes are bytes of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

FLOAT = 4
"""Bytes of a master weight, of a gradient, and of an optimiser's moment."""
EIGHT_BIT = ("adamw8bit", "paged_adamw8bit")
"""Types of optimisers whose moments have 8 bits."""
SMALL = 4096
"""Tensors of fewer values than this have moments in float32 there, too."""
BLOCK = 256
"""Values of an 8-bit moment that share one float32 scale."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Memory that one network takes for the whole run."""

    role: str
    network: str
    parameters: int
    """Number of its own weights; borrowed weights are counted for their owner."""
    trained: int
    """Number of these that an optimiser changes."""
    weights: int
    optimizer: int
    gathered: int = 0
    """Bytes of its weights that a process holds whole at one time under sharding: embedding, head and two blocks (one
    runs, the next is being gathered). 0: not sharded; discriminators, codecs, encoders and adapters stay whole."""
    blocks: int = 0
    """Bytes of its frozen blocks, if they can come when they run: processes share them, or they wait in main memory
    (`models.depot`). `gathered` is then the largest block."""
    narrow: int = 0
    """Bytes that its weights would take less with `settings.frozen: bf16`."""
    slack: int = 0
    """Bytes that its optimiser's states would take less with `type: adamw8bit`."""
    idles: bool = True
    """Whether offload moves it to the CPU while it is not used; the model's other parts stay."""

    @property
    def sharded(self) -> bool:
        return self.gathered > 0 and not self.blocks


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One kind of update, or one kind of work between iterations: what it trains, and what exists only during it."""

    reads: frozenset[str]
    """Networks that the phase calls or trains. Others that can idle may wait in main memory."""
    gradients: dict[str, int]
    """Bytes of gradients, by trained role."""
    activations: int
    """Bytes of everything else that is alive at the peak: saved for the backward pass, or being computed."""
    flops: int = 0
    """Floating-point operations of one update as measured, with the longest rollouts."""
    pause: str = ""
    """Name of the phase if nothing is trained in it."""
    parked: int = 0
    """Bytes of the activations that wait in main memory with offload: what flows between recomputed blocks."""
    before: int = 0
    """As `activations`, but at the fullest moment if gradients took nothing: processes that share gradients come near to that. 0:
    the same moment."""
    before_parked: int = 0
    """The part of `before` that waits with offload."""
    merged: int = 0
    """Bytes of the activations that are a network with its adapters merged into it; it is not made if blocks come."""
    copies: frozenset[str] = frozenset()
    """Networks of which a copy is made, with optimiser states."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The trained roles."""
        return tuple(self.gradients)

    @property
    def name(self) -> str:
        return self.pause or f"training of {'+'.join(self.roles)}"


@dataclass(frozen=True, kw_only=True)
class Means:
    """Ways to make a run smaller that do not change its networks."""

    shard: int = 1
    """Processes that share the denoisers' weights, gradients and optimiser states equally."""
    offload: bool = False
    """Move roles that an update does not read, and optimiser states between steps, to main memory."""
    stored_text: bool = False
    """Encode all text before training, so that the text encoder is not resident."""
    narrow: bool = False
    """Keep the matrices of frozen denoisers as bfloat16."""
    eight_bit: bool = False
    """Keep AdamW's moments in 8 bits."""

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise ValueError(f"shard must be at least 1, the number of devices; got {self.shard}")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment of a run that needs most memory."""

    phase: Phase
    resident: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's memory and work."""

    holdings: tuple[Holding, ...]
    phases: tuple[Phase, ...]
    flops: int
    """Floating-point operations per iteration."""
    pauses: tuple[Phase, ...] = ()
    """Phases between iterations, which generate clips for checks and pictures."""
    means: Means = Means()
    shared: bool = False
    """Whether networks are adapters over the same weights. With offload they stay, and the frozen blocks wait."""
    again: bool = False
    """Whether blocks are computed again in the backward pass; only then frozen ones can come when they run."""

    def can(self, means: Means) -> bool:
        """Whether a run can use `means` as it is: frozen blocks come when they run only where they come again for the backward
        pass, and 8-bit moments are of whole weights."""
        narrow = means.narrow or any(h.blocks for h in self.holdings)
        comes = (means.shard > 1 or means.offload) if self.shared else (means.shard > 1 and narrow)
        if means.eight_bit and means.shard > 1 and any(h.sharded for h in self.holdings):
            return False
        return self.again or not comes

    def resident(self, phase: Phase) -> int:
        """Bytes on the device for the whole update."""
        if not self.means.offload:
            return self._everything
        there = [h for h in self._kept if h.role in phase.reads or not h.idles or self._comes(h)]
        return sum(self._own(h, self._weights(h)) - (self._share(h) if self._comes(h) else 0) for h in there)

    def waiting(self, phase: Phase) -> int:
        """Bytes that wait in main memory during the update."""
        return self._everything - self.resident(phase) + (phase.parked if self.means.offload else 0)

    def total(self, phase: Phase) -> int:
        """Bytes at the peak of an update: in its backward pass, or when optimiser states are moved in for a step."""
        trained = {h.role: h for h in self.holdings if h.role in phase.roles}
        gradients = sum(self._own(trained[role], size) for role, size in phase.gradients.items())
        states = max((self._own(h, self._states(h)) for h in trained.values()), default=0) if self.means.offload else 0
        activations = self._activations(phase, sum(phase.gradients.values()) - gradients) + self.copied(phase)
        return self.resident(phase) + gradients + max(activations + self.gathered(phase), states)

    def copied(self, phase: Phase) -> int:
        """Bytes of the copies that one process makes."""
        return sum(self._own(h, h.weights + self._states(h)) for h in self._kept if h.role in phase.copies)

    def _activations(self, phase: Phase, spared: int) -> int:
        """Bytes of activations at the peak, if the process has `spared` bytes of gradients less than there are."""
        less = phase.merged if any(map(self._comes, self.holdings)) else 0
        at_end = phase.activations - less - (phase.parked if self.means.offload else 0)
        before = phase.before - (phase.before_parked if self.means.offload else 0)
        return min(at_end + spared, before) if spared and before else at_end

    def gathered(self, phase: Phase) -> int:
        """Bytes of divided weights that are gathered at one time, and of gradients before they are divided: only one network
        runs at a time."""
        cut = [h for h in self.holdings if h.sharded and self.means.shard > 1 and h.role in phase.reads]
        sizes = [h.gathered * (2 if h.role in phase.roles else 1) for h in cut]
        way = (
            1 / self.means.shard if self.means.offload and self.means.shard > 1 else 0
        )  # of the share that is copied first
        one = {h.role: h.gathered * self._blocks(h) / h.blocks for h in self.holdings if self._comes(h)}
        sizes += [round(size * (1 + way)) for size in one.values()]
        return max(sizes, default=0)

    def _own(self, held: Holding, size: int) -> int:
        """Bytes that one process has of `size` bytes of a network's weights, gradients or states."""
        if self._comes(held):
            return size - self._blocks(held) + self._share(held)
        return size // self.means.shard if held.sharded else size

    def _comes(self, held: Holding) -> bool:
        """Whether a network's blocks come when they run."""
        return held.blocks > 0 and (self.means.shard > 1 or (self.means.offload and self.shared))

    def _share(self, held: Holding) -> int:
        """Bytes of its blocks that one process keeps, on the device or in main memory."""
        return self._blocks(held) // self.means.shard

    def _blocks(self, held: Holding) -> int:
        return held.blocks - (held.narrow if self.means.narrow else 0)

    def _weights(self, held: Holding) -> int:
        return held.weights - (held.narrow if self.means.narrow else 0)

    def _states(self, held: Holding) -> int:
        return held.optimizer - (held.slack if self.means.eight_bit else 0)

    @property
    def _everything(self) -> int:
        """Bytes of weights and optimiser states that one process has, on the device or in main memory."""
        return sum(self._own(h, self._weights(h) + self._states(h)) for h in self._kept)

    @property
    def _kept(self) -> list[Holding]:
        return [h for h in self.holdings if not (self.means.stored_text and h.role == "text")]

    @property
    def peak(self) -> Peak:
        phase = max((*self.phases, *self.pauses), key=self.total)
        return Peak(phase=phase, resident=self.resident(phase), bytes=self.total(phase))

    def by(self, means: Means) -> Plan:
        return replace(self, means=means)

    def seconds(self, rate: float, steps: int) -> float:
        """Time of `steps` iterations on a machine that does `rate` floating-point operations per second."""
        return self.flops * steps / rate


@dataclass(frozen=True)
class Remedy:
    """A way to make a run fit: its changes, in words, and the plan with them."""

    names: tuple[str, ...]
    plan: Plan

    @property
    def bytes(self) -> int:
        return self.plan.peak.bytes


def optimizer_bytes(trained: int, momentum_only: int = 0) -> int:
    """AdamW keeps two moments per weight; `momentum_only` of the weights keep one (Muon)."""
    return FLOAT * (2 * trained - momentum_only)


def eight_bit_bytes(sizes: Iterable[int]) -> int:
    """8-bit AdamW's states of tensors of so many values: two moments of a byte, and a scale for each of their blocks; small
    tensors have float32 moments.

    >>> eight_bit_bytes([4096]), eight_bit_bytes([4095])
    (8320, 32760)
    """
    return sum(2 * (n + FLOAT * -(-n // BLOCK)) if n >= SMALL else optimizer_bytes(n) for n in sizes)


def remedies(variants: dict[tuple[str, ...], Plan], shard: int, elsewhere: bool) -> list[Remedy]:
    """Every combination of the measured `variants` (by the names of their changes) with changes that need no measurement.

    `elsewhere`: the device's memory is not main memory, so networks can be moved to main memory. A change that the plan has
    already, or that its networks cannot use, is not offered. Fewest changes come first, then the smallest peak.
    """
    found = []
    for names, plan in variants.items():
        cut = any(h.sharded or h.blocks for h in plan.holdings)
        changes: dict[str, tuple[bool, dict[str, Any]]] = {
            "stored text": (elsewhere, {"stored_text": True}),
            "frozen in bf16": (any(h.narrow for h in plan.holdings), {"narrow": True}),
            "8-bit optimiser states": (any(h.slack for h in plan.holdings), {"eight_bit": True}),
            "offload": (elsewhere, {"offload": True}),
            f"sharding over {shard}": (cut, {"shard": shard}),
        }
        possible = {
            name: means for name, (can, means) in changes.items() if can and plan.means != replace(plan.means, **means)
        }
        for count in range(len(possible) + 1):
            for chosen in combinations(possible, count):
                means: dict[str, Any] = {}
                for name in chosen:
                    means |= possible[name]
                if plan.can(both := replace(plan.means, **means)):
                    found.append(Remedy((*names, *chosen), plan.by(both)))
    return sorted(found, key=lambda remedy: (len(remedy.names), remedy.bytes))


def fitting(found: list[Remedy], limit: int) -> Iterator[Remedy]:
    """The remedies that fit and that do not contain a smaller remedy that fits."""
    kept: list[set[str]] = []
    for remedy in found:
        if remedy.bytes <= limit and not any(names <= set(remedy.names) for names in kept):
            kept.append(set(remedy.names))
            yield remedy


def parse_bytes(text: str) -> int:
    """Convert `24GB` to bytes. A GB is 2**30 bytes, like a GiB, as is usual for memory. ValueError for other texts.

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
