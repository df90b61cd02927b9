"""Processes that were started together: the rank of this one, and a barrier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fewstep.core.env import place

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """This process among those that do some work together. `Peers()` is alone."""

    rank: int = 0
    world: int = 1
    talk: dist.ProcessGroup | None = None
    """Group for waiting on each other; None: the default group of all processes."""

    @property
    def leads(self) -> bool:
        """Whether this one does what is done once."""
        return self.rank == 0

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """The parts that are this one's: every `world`-th."""
        return parts[self.rank :: self.world]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(self.talk)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The leader first, then the others: what it writes in this block, they find."""
        if not self.leads:
            self.barrier()
        yield
        if self.leads:
            self.barrier()


def meet_peers(patience: timedelta = timedelta(days=30)) -> Peers:
    """Meet those that `torchrun` started with this one; a program of one meets nobody.

    `patience` is how long one waits at a barrier for the slowest.
    """
    here = place()
    if here.world_size > 1 and not dist.is_initialized():
        meet("gloo", patience)
    return Peers(here.rank, here.world_size)


def meet(backend: str | None = None, patience: timedelta | None = None) -> None:
    """Open the way between all processes that `torchrun` started."""
    here = place()
    store, rank, world = next(rendezvous("env://"))
    # torchrun keeps its store when it starts a run again, with the addresses of the processes that are gone.
    store = dist.PrefixStore(f"attempt {here.attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def part_company() -> None:
    """The end of a program whose processes met: tell the libraries between them. A program of one does nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
