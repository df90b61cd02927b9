"""What one call of a network may know besides its latents, their time and the condition.

Whoever samples makes a `Call`; guidance, denoiser and backbone hand it on. The default is a call on its own: no past, and
every block is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from fewstep.core.types import KV

Branch = Literal["cond", "uncond", "both"]
"""Which condition the samples of a call have; `both`: the first half the prompt's, the second half the negative one's."""
S = TypeVar("S")


@dataclass(frozen=True)
class KVView:
    """What a call may read of the past. An empty view asks for keys and values but offers none."""

    layers: tuple[KV, ...]
    """One `(k_BHMD, v_BHMD)` per block; empty at the start of a stream."""
    frames: int
    """How many frames they cover: the first frame of the call has this index."""

    def layer(self, index: int) -> KV | None:
        return self.layers[index] if self.layers else None


@dataclass(frozen=True)
class Place:
    """Where in a network, and in which call, a block is run."""

    layer: int
    layers: int
    call: Call


class Sharing(Protocol):
    """Processes that hold the tokens of a clip together (`attention.Ulysses`)."""

    def split(self, x: Tensor, dim: int) -> Tensor: ...

    def join(self, x: Tensor, dim: int) -> Tensor: ...


class Runner(Protocol):
    """Who runs the blocks of a network, one after the other: what caches replay and pruned networks leave out.

    A runner that remembers belongs to one run of sampling and one network.
    """

    def __call__(self, block: Callable[[S], S], state: S, place: Place) -> S:
        """The state after `block`, run or not. A block that is not run leaves no keys and values (`state.new`)."""
        ...


def every_block(block: Callable[[S], S], state: S, place: Place) -> S:
    """The plain runner."""
    return block(state)


@dataclass(frozen=True)
class Call:
    """One call among those that make a clip."""

    step: int = 0
    """Which step of the sampler, 0-based."""
    steps: int = 1
    """Of how many."""
    branch: Branch = "cond"
    kv: KVView | None = None
    """The past that it may read; of `both` branches the samples are the condition's, then the negative one's."""
    runner: Runner = every_block
    shared: Sharing | None = None
    """The processes that make this call together, each with its share of the tokens; None: this one alone."""
