"""Counts arithmetic, attention included: torch's own counter misses the attention kernel of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(fn: Callable[[], Any]) -> int:
    """Floating-point operations of one call of `fn` (a multiply-add is two), in matrix products, convolutions,
    attention.

    Attention counts `2 B H N M (D + Dv)`: the products q k^T and (weights) v over all pairs, also those a mask forbids,
    since the kernel computes them. Softmax, norms and other element-wise work are not counted. `fn` really runs, once.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        fn()
    return counter.get_total_flops()


def attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
    """`2 B H N M (D + Dv)` for shapes q `[B, H, N, D]`, k `[B, H', M, D]`, v `[B, H', M, Dv]` (leading sizes are free)."""
    outer = 1
    for size in q[:-2]:
        outer *= size
    return 2 * outer * q[-2] * k[-2] * (q[-1] + v[-1])


def attention_backward_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
    """Two and a half times the forward pass: q k^T again, and the four products of the gradients."""
    return 5 * attention_flops(q, k, v) // 2


def _attention(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    return attention_flops(q, k, v)


def _backward(
    grad: tuple[int, ...], q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any
) -> int:
    return attention_backward_flops(q, k, v)


# Which operator carries attention depends on the mode: the composite one under inference_mode, else a kernel's own.
# Torch counts the CUDA kernels itself; the one of the CPU it takes for free.
FORMULAS = {
    torch.ops.aten.scaled_dot_product_attention: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
