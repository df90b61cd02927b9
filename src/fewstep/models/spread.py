"""How a run calls its networks: with which processes, and what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.core import Call
from fewstep.core.call import Place, Runner, S, Sharing
from fewstep.models.backbone import Backbone

Park = Callable[[Tensor], Tensor]
"""A copy that waits somewhere."""


@dataclass(frozen=True)
class Checkpointed:
    """Keeps only what flows between the blocks; each block is computed again in the backward pass."""

    runner: Runner
    park: Park | None = None
    """Where what flows between the blocks waits for the backward pass; None: where it is."""

    def __call__(self, block: Callable[[S], S], state: S, place: Place) -> S:
        if torch.is_grad_enabled():
            block = partial(_again, block) if self.park is None else partial(_parked, self.park, block)
        return self.runner(block, state, place)


def _again(block: Callable[[S], S], state: S) -> S:
    made: S = checkpoint(block, state, use_reentrant=False, preserve_rng_state=False)
    return made


def _parked(park: Park, block: Callable[[S], S], state: S) -> S:
    """As `_again`. The first time the block reads what flows, then a copy of what was parked: gradients take the way of the first
    time, and the second only computes again what they need."""
    streams = state.streams
    kinds = [(x.device, x.requires_grad) for x in streams]
    waiting, first = state.with_streams([park(x.detach()) for x in streams]), [state]

    def run() -> S:
        if first:
            return block(first.pop())
        back = [x.to(device, non_blocking=True) for x, (device, _) in zip(waiting.streams, kinds, strict=True)]
        return block(waiting.with_streams([x.requires_grad_(kind[1]) for x, kind in zip(back, kinds, strict=True)]))

    made: S = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    return made


def to_cpu(x: Tensor) -> Tensor:
    """A copy in the memory of the CPU, pinned if a GPU reads it."""
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
    return copy.copy_(x, non_blocking=True)


@dataclass(frozen=True)
class Spread:
    """What every call of a run's denoisers has besides what its caller says."""

    shared: Sharing | None = None
    """Processes that make each call together."""
    checkpointing: bool = False
    park: Park | None = None
    """As in `Checkpointed`."""

    def __call__(self, call: Call) -> Call:
        runner = Checkpointed(call.runner, self.park) if self.checkpointing else call.runner
        return replace(call, shared=self.shared, runner=runner)

    def check(self, backbone: Backbone) -> None:
        """ValueError if the network cannot be called so."""
        if self.shared is not None:
            backbone.require_sharing()
