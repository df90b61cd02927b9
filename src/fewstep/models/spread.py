"""How a run calls its networks: with which processes, and what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from fewstep.core import Call
from fewstep.core.call import Place, Runner, S, Sharing
from fewstep.models.backbone import Backbone


@dataclass(frozen=True)
class Checkpointed:
    """Keeps only what flows between the blocks; each block is computed again in the backward pass."""

    runner: Runner

    def __call__(self, block: Callable[[S], S], state: S, place: Place) -> S:
        if torch.is_grad_enabled():
            block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        return self.runner(block, state, place)


@dataclass(frozen=True)
class Spread:
    """What every call of a run's denoisers has besides what its caller says."""

    shared: Sharing | None = None
    """Processes that make each call together."""
    checkpointing: bool = False

    def __call__(self, call: Call) -> Call:
        runner = Checkpointed(call.runner) if self.checkpointing else call.runner
        return replace(call, shared=self.shared, runner=runner)

    def check(self, backbone: Backbone) -> None:
        """ValueError if the network cannot be called so."""
        if self.shared is not None:
            backbone.require_sharing()
