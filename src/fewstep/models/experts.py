"""Networks that take turns in time: one for noisy times, another for the rest.

A batch is routed: block i of all experts is one block here, and each sees the samples that have frames at its times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from fewstep.attention import Grid3, Pattern, Ulysses
from fewstep.core import KV, Call, Cond
from fewstep.core.call import Constants
from fewstep.core.finite import has_values
from fewstep.diffusion.experts import expert_at, require_boundaries
from fewstep.models.backbone import Backbone, Context, Original, State, Words

E = TypeVar("E", bound=Backbone)


@dataclass(frozen=True)
class _Routed(State):
    """The states of all experts."""

    parts: tuple[State | None, ...]
    """State of each expert for its own samples; None if it has none."""
    places: tuple[Tensor, ...]
    """For each expert, the index of each sample in its part, `[B]`; undefined for samples of other experts."""
    chosen_BG: Tensor
    """Expert of each frame, or one for all frames."""
    cached: bool
    """Whether every expert processes every sample, so that a cache holds what each may read later."""
    rows: tuple[tuple[int, ...], ...]
    """For each expert the numbers of its samples."""

    @property
    def volume(self) -> Tensor:
        return self.together([None if part is None else part.volume for part in self.parts])

    @property
    def streams(self) -> tuple[Tensor, ...]:
        return tuple(x for part in self.parts if part for x in part.streams)

    def with_streams(self, streams: Sequence[Tensor]) -> _Routed:
        flowing = iter(streams)
        return self._each(lambda part: part.with_streams([next(flowing) for _ in part.streams]))

    @property
    def route(self) -> Hashable:
        return self.rows

    @property
    def context(self) -> tuple[Context | None, ...]:
        """That of each expert with samples."""
        return tuple(None if part is None else cast(Any, part).context for part in self.parts)

    def split(self, processes: Ulysses) -> _Routed:
        return self._each(lambda part: part.split(processes))

    @property
    def joined(self) -> _Routed:
        return self._each(lambda part: part.joined)

    def together(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One `[B, C, F, H, W]` of those of the parts: each frame is its own expert's."""
        made: Tensor | None = None
        for index, (tensor, places) in enumerate(zip(tensors, self.places, strict=True)):
            if tensor is not None:
                own = (self.chosen_BG == index)[:, None, :, None, None]
                made = tensor[places] if made is None else torch.where(own, tensor[places], made)
        assert made is not None
        return made

    def _each(self, change: Callable[[State], State]) -> _Routed:
        return replace(self, parts=tuple(part and change(part) for part in self.parts))


class Experts(Backbone, Generic[E]):
    """Expert 0 is for times from `boundaries[0]` to 1, expert 1 for those from `boundaries[1]` to there, the last from 0.

    All are of one class, with the same arguments. A frame is denoised by the expert of its time, which reads the other frames
    with its own keys: a clip whose frames have times on both sides is seen by both experts. With a causal pattern and a cache
    view it is a causal model. An expert cannot read the keys of another, so a cache has those of all, their heads side by side,
    and a call with a view costs as much as all experts do: whichever denoises the next frames finds the past there.
    """

    shares = True
    text_first = True
    unmixes = True
    pattern: Pattern

    def __init__(self, experts: Sequence[E], boundaries: Sequence[float]) -> None:
        """Of `experts`, whose blocks become this network's, and the times at which they change, decreasing."""
        super().__init__()
        require_boundaries(boundaries)
        if len(boundaries) != len(experts) - 1:
            raise ValueError(f"{len(experts)} experts have {len(experts) - 1} boundaries; got {list(boundaries)}")
        self.boundaries = tuple(boundaries)
        self.args, self.pattern = experts[0].args, cast(Any, experts[0]).pattern
        self.hold(experts)

    @property
    def named(self) -> Backbone:
        return cast(Backbone, self.experts[0])

    @property
    def scalars(self) -> nn.ModuleDict:  # type: ignore[override]
        """Inputs that the experts were given before they were experts: all have the same."""
        return cast(Backbone, self.experts[0]).scalars

    @property
    def signals(self) -> nn.ModuleList:  # type: ignore[override]
        return cast(Backbone, self.experts[0]).signals

    def hold(self, experts: Sequence[E]) -> None:
        """Become these networks, which lose their blocks."""
        self.width, self.heads, self.rotary = experts[0].width, cast(Any, experts[0]).heads, experts[0].rotary
        columns = [list(expert.blocks) for expert in experts]
        self.blocks = nn.ModuleList(_Block(row) for row in zip(*columns, strict=True))
        for expert in experts:
            expert.blocks = nn.ModuleList()
        self.experts = nn.ModuleList(experts)
        self.by_age = any(expert.by_age for expert in experts)

    def expert(self, index: int) -> E:
        """One expert as a network of its own, around the same tensors."""
        alone: E = copy.copy(self.experts[index])  # type: ignore[assignment]
        blocks = nn.ModuleList(block.experts[index] for block in self.blocks)  # type: ignore[union-attr, index, misc]
        alone._modules = {**alone._modules, "blocks": blocks}
        return alone

    def embed(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> _Routed:
        chosen, parts, places = self._chosen(t), [], []
        samples = range(len(x))
        route = tuple(
            tuple(row for row in samples if index in chosen[row] or call.kv is not None)
            for index, _ in enumerate(self.experts)
        )
        kept = None if call.constants is None else call.constants.during(route)
        for index, (expert, own) in enumerate(zip(self.experts, route, strict=True)):
            rows = torch.tensor(own, device=x.device, dtype=torch.long)
            its = replace(
                call,
                constants=None if kept is None else kept.get(("expert", index), Constants),
                negative=None if call.negative is None else call.negative.of(rows),
            )
            parts.append(expert.embed(x[rows], t[rows], cond[rows], its) if own else None)
            place = [own.index(row) if row in own else 0 for row in samples]
            places.append(torch.tensor(place, device=x.device))
        chosen_BG = torch.tensor(chosen, device=x.device)
        state = _Routed(tuple(parts), tuple(places), chosen_BG, call.kv is not None, route)
        return _reaching_idle(self.experts, state)

    def grid(self, x: Tensor) -> Grid3:
        return self.experts[0].grid(x)  # type: ignore[operator]

    def head(self, state: _Routed) -> Tensor:
        experts = zip(self.experts, state.parts, strict=True)
        return state.together([None if part is None else expert.head(part) for expert, part in experts])  # type: ignore[operator]

    def original(self) -> Original | None:
        """ValueError, because no other library has such a network."""
        self.require_plain()
        return None

    def _chosen(self, t: Tensor) -> list[list[int]]:
        """The expert of each sample's frames, or of all of them if `t` is `[B]`."""
        if not has_values(t):  # either expert costs the same
            return [[0]] * len(t)
        frames = t if t.ndim == 2 else t[:, None]
        chosen: list[list[int]] = expert_at(self.boundaries, frames).tolist()
        return chosen


class _Block(nn.Module):
    """The same block of every expert."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, state: _Routed) -> _Routed:
        pasts: Sequence[KV | None] = [None] * len(self.experts)
        if state.past is not None:  # heads of all experts side by side
            pasts = list(zip(*(x.chunk(len(self.experts), 1) for x in state.past), strict=True))
        each = zip(self.experts, state.parts, pasts, state.text or [None] * len(self.experts), strict=True)
        parts = tuple(
            part and expert(replace(part, past=past, place=state.place, text=text, unmixed=state.unmixed))
            for expert, part, past, text in each
        )
        new = None
        if state.cached:
            k, v = (torch.cat(x, 1) for x in zip(*(part.new for part in parts if part), strict=True))
            new = k, v
        return _reaching_idle(self.experts, replace(state, parts=parts, new=new))

    def reads(self, contexts: Sequence[Context | None]) -> tuple[Words | None, ...]:
        """Keys and values of each expert with samples."""
        each = zip(self.experts, contexts, strict=True)
        return tuple(context and expert.reads(context) for expert, context in each)  # type: ignore[operator]


def _reaching_idle(experts: nn.ModuleList, state: _Routed) -> _Routed:
    """The same state, from which a gradient of zero reaches the experts without samples.

    Processes that train together must have gradients of the same parameters, whatever times each of them has drawn.
    """
    idle = [expert for expert, part in zip(experts, state.parts, strict=True) if part is None]
    trained = [p for expert in idle for p in expert.parameters() if p.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        return state
    nothing = 0 * torch.stack([p.flatten()[0] for p in trained]).sum()
    return state._each(lambda part: part.with_streams([x + nothing for x in part.streams]))
