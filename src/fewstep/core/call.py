"""Options of one network call, in addition to latents, time and condition.

Whoever samples makes a `Call`; guidance, denoiser and backbone hand it on. The default is a call on its own: no past, and
every block is run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fewstep.core.rng import Noise
from fewstep.core.types import KV, Cond

Branch = Literal["cond", "uncond", "both", "perturbed"]
"""Which condition the samples of a call have; `both`: the first half the prompt's, the second half the negative one's;
`perturbed`: the prompt's, by a network that is made worse (`unmixed`)."""


class Flow(Protocol):
    """What a runner may know of the state that goes from block to block (`models.backbone.State`)."""

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """The tensors that blocks change."""
        ...

    def with_streams(self, streams: Sequence[Tensor]) -> Self:
        """The same state with other tensors flowing."""
        ...

    @property
    def route(self) -> Hashable:
        """Which of several networks in one it goes through."""
        ...


S = TypeVar("S", bound=Flow)
T = TypeVar("T")


@dataclass(frozen=True)
class KVView:
    """What a call may read of the past, as a network's `recall` makes it of a memory: once for all calls of a chunk.

    A view without layers asks for keys and values but offers none. What is said of positions lies on the CPU, so that nobody
    waits for a device to learn it.
    """

    layers: tuple[KV, ...]
    """Keys and values `(k_BHMD, v_BHMD)` per block, keys with rotary position; empty at the start of a stream."""
    positions: Tensor
    """Position of each remembered frame, int64 `[S]`, or `[B, S]` if streams differ in age."""
    start: Tensor
    """Position of the call's first frame, int64, `[]` or `[B]`."""
    readable: Tensor | None = None
    """False for slots without a frame, same shape as `positions`; None: every slot holds a frame."""
    frame: Tensor | None = None
    """Number of the call's first frame in its stream, like `start`; None: `start`, which is it where positions are absolute."""
    weight: float = 1.0
    """How much a token of the past counts in attention, where one of the call counts 1. The oldest frame counts 1, too."""
    states: tuple[Tensor, ...] | None = None
    """What has left the memory, folded into a matrix `[B, H, V, D]` per block, where operations read and write it
    (`Pattern.folds`): () before anything has left. None: what has left is lost."""
    compresses: int = 0
    """Tokens that one learned token stands for (`Pattern.compresses`), where such tokens are remembered behind those of a frame;
    0: they are not."""

    @property
    def number(self) -> Tensor:
        """Number of the call's first frame in its stream, from 0."""
        return self.start if self.frame is None else self.frame

    def layer(self, index: int) -> KV | None:
        return self.layers[index] if self.layers else None

    @property
    def slots(self) -> int:
        """Frames that are remembered, places for frames included."""
        return self.positions.shape[-1] if self.layers else 0


@dataclass(frozen=True)
class Causal:
    """The frames of a call are chunks, each of which reads itself and what came before: one call in place of one per chunk.

    A chunk reads each earlier frame once: from the past of the call, if it is there, otherwise from the call itself.
    """

    chunks: tuple[int, ...]
    """Latent frames of each chunk."""
    recent: int | None = None
    """So many frames right before its own are read, and the sink; None: all."""
    sink: int = 0
    """First frames of the stream, which every chunk reads."""


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


@dataclass(frozen=True, eq=False)
class Constants:
    """Values that are the same in all calls of one run of sampling, such as keys of the text: each is computed once.

    Made for one run, with one network and fixed conditions.
    """

    kept: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when `key` was asked for first."""
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found

    def during(self, route: Hashable) -> Constants:
        """Values for one route through several networks in one (`Flow.route`); None: there is one network. Networks take turns,
        so those of another route are forgotten.
        """
        if route is None:
            return self
        known: tuple[Hashable, Constants] | None = self.kept.get(_ROUTE)
        if known is None or known[0] != route:
            known = self.kept[_ROUTE] = (route, Constants())
        return known[1]


_ROUTE = "route"


@dataclass(frozen=True, eq=False)
class Negative:
    """A negative prompt that attention to the prompt is pushed away from inside a call (`attention.NAG`)."""

    cond: Cond
    """Its conditions: one for each sample with the prompt's, which come first in a call."""
    push: Callable[[Tensor, Tensor], Tensor]
    """From what queries read of the prompt, and of the negative one, to what they get; all `[B, H, N, D]`."""

    def of(self, rows: Tensor) -> Negative:
        """That of these samples of the call, in increasing order."""
        return Negative(self.cond[rows[rows < len(self.cond)]], self.push)


@dataclass(frozen=True)
class Call:
    """One call among those that make a clip."""

    step: int = 0
    """Number of the sampler's step, from 0."""
    steps: int = 1
    """Total number of steps."""
    branch: Branch = "cond"
    kv: KVView | None = None
    """Past that the call may read. If the branch is `both`, the condition's samples come first, then the negative ones."""
    causal: Causal | None = None
    """Chunks of the call, if the later ones may not be read by the earlier; None: all its frames read each other."""
    mutual: bool = False
    """Whether the call is a window of chunks that must read each other in both directions (`streaming.rolling`), which a causal
    pattern refuses."""
    runner: Runner = every_block
    shared: Sharing | None = None
    """Processes that make this call together, each with its share of the tokens; None: this process alone."""
    constants: Constants | None = None
    """Values that the run of sampling keeps from call to call; None: every call computes its own."""
    negative: Negative | None = None
    """Negative prompt for the attention to the prompt; None: it reads the prompt alone."""
    unmixed: tuple[int, ...] = ()
    """Blocks, counted from 0, whose self-attention mixes nothing: each token gets its own values (`diffusion.STG`)."""
    rng: Noise | None = None
    """Random numbers of the run, for networks that draw noise of their own (`compress.FlowHead`); None: there are none."""

    def constant(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, if it gives the same in all calls of this branch."""
        return make() if self.constants is None else self.constants.get((self.branch, key), make)

    def positions(self, frames: int) -> Tensor:
        """Where so many frames of the call itself stand in their stream, int64 `[F]` or `[B, F]`."""
        here = torch.arange(frames)
        return here if self.kv is None else self.kv.start[..., None] + here
