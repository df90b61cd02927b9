"""Attention whose tokens lie on several processes: heads are exchanged for tokens and back (Ulysses, 2309.14509).

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

from fewstep.attention.kernels import attend


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
        shared: Tensor = _Split.apply(x, dim, self.group)
        return shared

    def join(self, x: Tensor, dim: int) -> Tensor:
        """All runs, in every process."""
        joined: Tensor = _Join.apply(x, dim, self.group)
        return joined

    def attend(self, q_BHnD: Tensor, k_BHnD: Tensor, v_BHnD: Tensor, mask_NN: Tensor | None) -> Tensor:
        """Attention of this process' queries to the keys of all, `[B, H, n, D]`. H must be a multiple of P."""
        q_BhND, k_BhND, v_BhND = (self._to_heads(x) for x in (q_BHnD, k_BHnD, v_BHnD))
        return self._to_tokens(attend(q_BhND, k_BhND, v_BhND, mask_NN))

    def attend_beside(self, q_BHmD: Tensor, k_BHmD: Tensor, v_BHmD: Tensor, alike: int) -> Tensor:
        """The same where the first `alike` tokens are no share of the clip's but the same in every process, such as text."""
        heads = [
            torch.cat([self.split(x[:, :, :alike], 1), self._to_heads(x[:, :, alike:])], 2)
            for x in (q_BHmD, k_BHmD, v_BHmD)
        ]
        q_BhMD, k_BhMD, v_BhMD = heads
        y_BhMD = attend(q_BhMD, k_BhMD, v_BhMD)
        return torch.cat([self.join(y_BhMD[:, :, :alike], 1), self._to_tokens(y_BhMD[:, :, alike:])], 2)

    def _to_tokens(self, y_BhND: Tensor) -> Tensor:
        """All heads of this process' tokens, `[B, H, n, D]`."""
        received_PBhnD = _Exchange.apply(y_BhND.unflatten(2, (self.size, -1)).movedim(2, 0), self.group)
        return received_PBhnD.movedim(0, 1).flatten(1, 2)

    def _to_heads(self, x_BHnD: Tensor) -> Tensor:
        """All tokens of this process' share of the heads, `[B, H / P, N, D]`."""
        if x_BHnD.shape[1] % self.size:
            raise ValueError(
                f"{x_BHnD.shape[1]} attention heads cannot be shared evenly by {self.size} processes; "
                "let settings.parallel.sequence be a divisor of them"
            )
        received_PBhnD = _Exchange.apply(x_BHnD.unflatten(1, (self.size, -1)).movedim(1, 0), self.group)
        return received_PBhnD.movedim(0, 2).flatten(2, 3)


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
    """Entry i of the first axis goes to process i, and comes from it."""

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
