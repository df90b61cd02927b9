"""Attention over tokens on several processes: heads are exchanged for tokens and back (Ulysses, 2309.14509).

Legend: P processes, n tokens here, N = P n tokens of the clip, B batch, H heads, D head dimension.

Gradients follow one rule: what every process computes alike (embedding, head, loss) carries 1/P of the gradient in each,
what each computes for its own tokens carries the whole. So the sum over processes is right for every weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ulysses:
    """The processes that share a clip. Each holds an equal run of its tokens, in the order of ranks."""

    group: dist.ProcessGroup

    def __deepcopy__(self, memo: dict[int, Any]) -> Ulysses:
        """A copy of a network that shares its clips shares them with the same processes."""
        return self

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This process' run of what every process has whole. ValueError where `dim` has no equal runs."""
        if x.shape[dim] % self.size:
            raise ValueError(
                f"{x.shape[dim]} tokens cannot be shared evenly by {self.size} processes (settings.parallel.sequence); "
                "choose a divisor, or another number of frames or size"
            )
        return self.own(x, dim)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process' part of `x`, which has equal ones."""
        shared: Tensor = _Split.apply(x, dim, self.group)
        return shared

    def join(self, x: Tensor, dim: int) -> Tensor:
        """All runs, in every process."""
        joined: Tensor = _Join.apply(x, dim, self.group)
        return joined

    def exchange(self, x: Tensor) -> Tensor:
        """Entry i of the first axis goes to process i, and comes from it."""
        received: Tensor = _Exchange.apply(x, self.group)
        return received

    def to_heads(self, x_BHmD: Tensor, beside: int = 0) -> Tensor:
        """All tokens of this process' share of the heads, `[B, H / P, M, D]`. H must be a multiple of P.

        The first `beside` tokens are no share of the clip's but the same in every process, such as text.
        """
        if x_BHmD.shape[1] % self.size:
            raise ValueError(
                f"{x_BHmD.shape[1]} attention heads cannot be shared evenly by {self.size} processes; "
                "let settings.parallel.sequence be a divisor of them"
            )
        x_BHnD = x_BHmD[:, :, beside:]
        received_PBhnD = self.exchange(x_BHnD.unflatten(1, (self.size, -1)).movedim(1, 0))
        x_BhND = received_PBhnD.movedim(0, 2).flatten(2, 3)
        return torch.cat([self.split(x_BHmD[:, :, :beside], 1), x_BhND], 2) if beside else x_BhND

    def to_tokens(self, y_BhMD: Tensor, beside: int = 0) -> Tensor:
        """All heads of this process' tokens, `[B, H, m, D]`; and of the first `beside`, which every process has."""
        y_BhND = y_BhMD[:, :, beside:]
        received_PBhnD = self.exchange(y_BhND.unflatten(2, (self.size, -1)).movedim(2, 0))
        y_BHnD = received_PBhnD.movedim(0, 1).flatten(1, 2)
        return torch.cat([self.join(y_BhMD[:, :, :beside], 1), y_BHnD], 2) if beside else y_BHnD

    def own_heads(self, table: Tensor) -> Tensor:
        """This process' share of a table `[..., H, M, D]` that has something for every head; any other as it is."""
        return self.split(table, table.ndim - 3) if table.ndim > 3 and table.shape[-3] > 1 else table


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _own(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all(grads[0], ctx.dim, ctx.group) / dist.get_world_size(ctx.group), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _own(grads[0], ctx.dim, ctx.group) * dist.get_world_size(ctx.group), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grads[0], ctx.group), None


def _own(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def _all(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim)
