"""Forward-mode derivatives of attention (`jvp`), in blocks of queries; fused kernels do not support them.

Legend: B batch, H heads, N queries, n queries of one block, M keys, D head dimension; d before a name: its derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

SCORES = 2**24
"""Scores of one block, at most: 64 MiB in float32, of which about five are alive at one time."""


@contextmanager
def forward_mode(scores: int = SCORES) -> Iterator[None]:
    """Inside, whoever calls `scaled_dot_product_attention` on dual tensors (`torch.autograd.forward_ad`) gets dual ones.

    The value is that of the kernel which would have run; its derivative is exact, and made of at most `scores` scores at a
    time, so that memory does not grow with N x M. The derivative carries no gradient.
    """
    with _Attention(scores):
        yield


class _Attention(TorchFunctionMode):
    def __init__(self, scores: int) -> None:
        super().__init__()
        self.scores = scores

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = partial(_attend, scores=self.scores) if func is F.scaled_dot_product_attention else func
        return run(*args, **(kwargs or {}))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False, scores: int = SCORES,
) -> Tensor:  # fmt: skip
    """The arguments are those of `scaled_dot_product_attention`."""
    (q, dq), (k, dk), (v, dv) = (forward_ad.unpack_dual(x) for x in (query, key, value))
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, **options)
    if dq is None and dk is None and dv is None:
        return out
    if dropout_p or is_causal or enable_gqa:
        asked = {name: value for name, value in options.items() if value}
        raise ValueError(f"forward-mode attention knows masks and a scale, and was asked for {asked}")
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        tangent = _derivative((q, k, v), (dq, dk, dv), attn_mask, scale or q.shape[-1] ** -0.5, scores)
    return forward_ad.make_dual(out, tangent.to(out.dtype))


Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def _derivative(
    primals: tuple[Tensor, Tensor, Tensor], tangents: Three, mask: Tensor | None, scale: float, scores: int
) -> Tensor:
    """Derivative of the output, `[B, H, N, D]`, in float32 or better.

    With `s = scale q k^T + mask` and `p = softmax(s)`: `dp = p (ds - sum(p ds))`, and `dout = dp v + p dv`.
    """
    exact = torch.promote_types(primals[0].dtype, torch.float32)
    q, k, v = (x.to(exact) for x in primals)
    dq, dk, dv = (None if x is None else x.to(exact) for x in tangents)
    rows, keys = q.shape[-2], k.shape[-2]
    step = max(1, scores // max(1, keys * q[..., 0, 0].numel()))
    made = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=exact, device=q.device)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        q_n, dq_n = scale * q[..., part, :], None if dq is None else scale * dq[..., part, :]
        p = _masked(q_n @ k.mT, mask, part).softmax(-1)
        if dv is not None:
            made[..., part, :] += p @ dv
        if dq_n is not None or dk is not None:
            ds = dq_n @ k.mT if dq_n is not None else torch.zeros_like(p)
            if dk is not None:
                ds += q_n @ dk.mT
            ds -= (p * ds).sum(-1, keepdim=True)
            made[..., part, :] += p.mul_(ds) @ v
    return made


def _masked(scores: Tensor, mask: Tensor | None, part: slice) -> Tensor:
    """A mask is bool, True = may look, or is added; its second axis from the end is the queries' or has length 1."""
    if mask is None:
        return scores
    mask = mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., part, :]
    return scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
