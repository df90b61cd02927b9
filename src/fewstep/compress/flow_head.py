"""A head of a few blocks that runs several times in each call of a network, and refines a prediction that begins as noise.

Nie et al., Transition Matching Distillation for Fast Video Generation, 2601.09881.

    m = the first L - H blocks of (x_t, t, c);  head(y_s, s, r) = the last H blocks of m + gate(s, r) * embedding of y_s
    y_1 = noise
    for s, r in (1, 1 - 1/N), ..., (1/N, 0):
    1    y_r = y_s - (s - r) u,   u = y_1 - head(y_s, s, r)
    return y_0

y is what the network predicts. Line 1 summed over its runs is `y_r = r y_1 + (1 - r) (mean of the answers so far)`, and is
computed so: with one run, y_0 is the head's answer itself. The paper prints a plus before (s - r), with which the way from y_1
would not end at y_0. A call takes the work of 1 + (N - 1) H / L calls of the network without a head.

Not from the paper, or not known: any kind of prediction, where the paper's is the flow; s and r also reach the modulation of
the head's blocks, as the time does; one linear layer of waves makes this and the gate. It begins at zero, so that every answer is
the teacher's prediction at first, and so is their mean, bit for bit; y_s is embedded by the layers that embed the latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.compress.scalar_input import waves
from fewstep.compress.transform import Transform
from fewstep.core import Call, Cond
from fewstep.core.bounds import Count, require_bounds
from fewstep.diffusion.path import broadcast

_WAVES = 128
_PARTS = 6
"""Vectors that a block's modulation has; one more is the gate."""
_INSIDE = ("inner", "inner_from", "inner_until")
"""Names of y_s, s and r in `Cond.extra`."""


@dataclass(frozen=True, kw_only=True)
class FlowHead(Transform):
    """The last blocks run several times in each call of the network, and refine a prediction that begins as noise."""

    blocks: Count
    """H: number of the last blocks, which are the head."""
    steps: Count
    """N: runs of the head in a call."""

    def __post_init__(self) -> None:
        require_bounds(self)

    @property
    def identity(self) -> bool:
        return True

    def apply(self, network: Any) -> Any:
        if not network.takes_signals:
            raise ValueError(
                f"a {type(network).__name__} has no flow head: the modulation of its blocks is not in reach; take VideoDiT or Wan"
            )
        if network.flow_head is not None:
            raise ValueError(
                "this network has a flow head already; let the transforms and the method name the same one"
            )
        if self.blocks >= len(network.blocks):
            raise ValueError(
                f"a head of {self.blocks} blocks leaves none of the network's {len(network.blocks)} for the backbone; give it "
                f"at most {len(network.blocks) - 1}"
            )
        weight = next(network.parameters())
        network.flow_head = Head(self, network.width, device=weight.device, dtype=weight.dtype)
        return network


def inside(y_s: Tensor, s: Tensor, r: Tensor) -> dict[str, Tensor]:
    """What a condition says besides (`Cond.with_extra`) for one run of the head: from `y_s` at `s` `[B]` to `r` `[B]`. The
    network then gives the head's answer, and draws no noise."""
    return dict(zip(_INSIDE, (y_s, s, r), strict=True))


class Head(nn.Module):
    """The runs of the head, and the layer by which it knows where it is; zero at first."""

    def __init__(self, told: FlowHead, width: int, **place: Any) -> None:
        super().__init__()
        self.told = told
        self.out = nn.utils.skip_init(nn.Linear, 2 * _WAVES, (_PARTS + 1) * width, **place)
        if not self.out.weight.is_meta:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, network: Any, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        """The network's prediction for latents `[B, C, F, H, W]`, as `Backbone.forward` makes it. ValueError for a chunk of a
        stream, and where the call has no random numbers."""
        if call.kv is not None:
            raise ValueError("a network with a flow head makes whole clips; a stream cannot remember what it ran twice")
        first = len(network.blocks) - self.told.blocks
        start = network.divided(network.embed(x, t, cond, call), call)
        *_, m = network.run(range(first), start, call)

        def head(y_s: Tensor, s: Tensor, r: Tensor) -> Tensor:
            embedded = network.divided(network.embed(y_s.to(x), t, cond, call), call)
            *_, state = network.run(range(first, len(network.blocks)), self.fused(m, embedded, s, r), call)
            answer: Tensor = network.head(state.joined)
            return answer

        if _INSIDE[0] in cond.extra:
            return head(*(cond.extra[name] for name in _INSIDE))
        noise = _noise(x, call)
        mean = torch.zeros_like(noise)
        for n, (s, r) in enumerate(self.times(x)):
            y_s = broadcast(1 - s, x) * mean + broadcast(s, x) * noise
            mean = mean + (head(y_s, s, r) - mean) / (n + 1)  # 1
        return mean

    def times(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """s and r of every run, each `[B]`, float32 at least."""
        grid = torch.linspace(
            1, 0, self.told.steps + 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        return pairwise(time.expand(len(x)) for time in grid)

    def fused(self, m: Any, embedded: Any, s: Tensor, r: Tensor) -> Any:
        """What the head's first block reads: the backbone's state, plus tokens of y_s through the gate."""
        tokens = embedded.streams[0]
        exact = torch.promote_types(self.out.weight.dtype, torch.float32)  # 16 bits are too few for a time
        read = torch.cat([waves(time.to(exact), _WAVES) for time in (s, r)], -1)
        with torch.autocast(tokens.device.type, enabled=False):
            *modulation, gate = self.out(read.to(self.out.weight)).unflatten(-1, (_PARTS + 1, -1)).unbind(1)
        context = m.context._replace(modulation_BG6E=m.context.modulation_BG6E + torch.stack(modulation, 1)[:, None])
        return replace(m, context=context).with_streams([m.streams[0] + gate[:, None] * tokens])


def _noise(x: Tensor, call: Call) -> Tensor:
    """y_1 of every clip; both branches of guidance have the same."""
    if call.rng is None:
        raise ValueError(
            "a network with a flow head draws noise in every call, and this call has no random numbers; sample it "
            "(VideoModel.latents), or train it by a rollout that samples so (BackwardSimulation)"
        )
    clips = len(x) // 2 if call.branch == "both" else len(x)
    noise = call.rng.randn((clips, *x.shape[1:]), f"inner/{call.step}").to(x)
    return noise.repeat(len(x) // clips, *[1] * (x.ndim - 1))
