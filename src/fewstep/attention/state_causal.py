"""Block-causal attention over a window, and a state of fixed size that has seen all before it (VideoSSM, 2512.04519).

    1  local = attention of a chunk over itself, the sink and the window                        (`BlockCausal`)
    2  strength = sigmoid(w_b k + b_b), decay = -exp(A) softplus(w_a k + b_a)    of each token and head, from its key
    3  M = gated delta rule over the tokens that have left the window, oldest first              (`delta_rule`)
    4  out = local + router(n) sigmoid(w_g q + b_g) scale norm(M q)                n: frames that have left the window
       router(n) = 1 - exp(-softplus(r) n / window)

From the paper: window and sink, the rule, its gates, a gated and normalised reading, and a router that grows with time. Its
parameterisation is not public, so these are ours: gates are made of keys and not of the hidden state, and line 4's router. Keys
and queries of the state have no rotary position: its order is the order in which tokens left. A fresh one equals `BlockCausal`,
because `scale` begins at 0. Legend: as in `pattern.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.attention.block_causal import BlockCausal
from fewstep.attention.delta_rule import empty_state, folded
from fewstep.attention.kv.state_memory import StateMemory
from fewstep.attention.pattern import Operation, Pattern, Site
from fewstep.core import KV
from fewstep.core.bounds import Count, Natural

_DECAY = -5.0
"""First b_a: a token forgets 0.7 % of the state."""


@dataclass(frozen=True)
class StateCausal(Pattern):
    """A window with a sink, and beside it a learned state of what has left the window.

    Streams take `memory: {type: StateMemory, window: ..., sink: ...}` with the same numbers. Chunk by chunk they equal one call
    on a whole clip, which trains all parameters (`DiffusionForced`). What a rollout remembers carries no gradient, so there the
    gates that write stay as they are, and those that read are trained.
    """

    folds: ClassVar[bool] = True

    chunk: Count = 1
    """Latent frames per chunk; the last chunk of a clip may be shorter."""
    window: Count = 12
    """Latent frames that a chunk reads, including the sink and its own frames."""
    sink: Natural = 3
    """First frames of the clip that always stay in the window, and never enter the state."""

    def __post_init__(self) -> None:
        self.memory.check(self.chunk)

    @cached_property
    def local(self) -> BlockCausal:
        """Line 1."""
        return BlockCausal(chunk=self.chunk, window=self.window, sink=self.sink)

    @property
    def memory(self) -> StateMemory:
        """What a stream must remember so that it equals this pattern."""
        return StateMemory(window=self.window, sink=self.sink)

    def operation(self, layer: int, heads: int, width: int) -> Operation:
        return _WithState(self, layer, heads, width)

    def check(self, site: Site) -> None:
        self.local.check(site)


class _WithState(Operation):
    def __init__(self, pattern: StateCausal, layer: int, heads: int, width: int) -> None:
        super().__init__()
        self.pattern, self.layer, self.heads = pattern, layer, heads
        self.local = pattern.local.operation(layer, heads, width)
        self.gates = nn.Parameter(torch.zeros(3, heads, width))  # w_b, w_a, w_g
        self.biases = nn.Parameter(torch.tensor([0.0, _DECAY, 0.0])[:, None].repeat(1, heads))
        self.rate = nn.Parameter(torch.zeros(heads))  # A
        self.router = nn.Parameter(torch.zeros(heads))  # r
        self.scale = nn.Parameter(torch.zeros(heads, width))

    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> Tensor | None:
        return self.local.mask(q_BHND, k_BHMD, site)

    def forward(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, site: Site) -> Tensor:
        local: Tensor = self.local(q_BHND, k_BHMD, v_BHMD, site)
        return local

    def finish(self, mixed_BHND: Tensor, qkv: tuple[Tensor, Tensor, Tensor], site: Site) -> tuple[Tensor, KV]:
        (q, k, v), kv = qkv, site.call.kv
        if q.shape[1] != self.heads:
            raise ValueError("a state belongs to all heads of one process; set parallel.sequence: 1")
        if kv is None or kv.states is None:
            return mixed_BHND + self._within(q, k, v, site), (k, v)
        new = k, torch.cat([v, *(gate[..., None].to(v) for gate in self.written(k))], -1)
        if not kv.states or kv.readable is None:
            return mixed_BHND, new
        left = kv.number - kv.readable.sum(-1)
        return mixed_BHND + self.reading(q, kv.states[self.layer], left), new

    def written(self, k_BHND: Tensor) -> tuple[Tensor, Tensor]:
        """Decay and strength of tokens, `[B, H, N]` each."""  # line 2
        strength, decay = (self._gate(index, k_BHND) for index in (0, 1))
        return -self.rate.to(decay).exp()[:, None] * F.softplus(decay), strength.sigmoid()

    def reading(self, q_BHND: Tensor, state_BHVD: Tensor, left: Tensor) -> Tensor:
        """What queries get of the state, of which `left` frames, `[]` or `[B]`, are."""  # line 4
        found = F.normalize(q_BHND.to(state_BHVD), dim=-1) @ state_BHVD.mT
        found = F.rms_norm(found, found.shape[-1:], eps=1e-6) * self.scale.to(found)[:, None]
        share = (left.to(found) / self.pattern.window)[..., None] * F.softplus(self.router.to(found))  # [H] or [B, H]
        gate = self._gate(2, q_BHND).sigmoid() * -torch.expm1(-share)[..., None]
        return (gate[..., None] * found).to(q_BHND)

    def _gate(self, index: int, x_BHND: Tensor) -> Tensor:
        wide = torch.promote_types(x_BHND.dtype, torch.float32)
        return (x_BHND.to(wide) * self.gates[index].to(wide)[:, None]).sum(-1) + self.biases[index].to(wide)[:, None]

    def _within(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The same for each chunk of one call on a whole clip, whose state is of its own frames."""
        per_frame, sink, done, made = site.grid.per_frame, self.pattern.sink, self.pattern.sink, list[Tensor]()
        state = empty_state(k, v.shape[-1])
        for start, stop, first in self._spans(site):
            if first > done:
                own = slice(done * per_frame, first * per_frame)
                decay, strength = self.written(k[:, :, own])
                state = folded(state, k[:, :, own].to(state), v[:, :, own].to(state), decay, strength)
                done = first
            chunk = q[:, :, start * per_frame : stop * per_frame]
            made.append(self.reading(chunk, state, torch.tensor(done - sink)))
        return torch.cat(made, 2)

    def _spans(self, site: Site) -> Iterator[tuple[int, int, int]]:
        """Each chunk of a call, and the first frame that is no sink and is in its window."""
        room = self.pattern.window - self.pattern.sink - self.pattern.chunk
        chunks = [(part.start, part.stop) for part in site.parts]
        for start, stop in chunks or pairwise([*range(0, site.grid.frames, self.pattern.chunk), site.grid.frames]):
            yield start, stop, start - room
