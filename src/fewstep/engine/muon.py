"""Muon: momentum whose matrices are orthogonalised before they are added to the weights.

Jordan and others 2024 (kellerjordan.github.io/posts/muon); the size of the update is that of Moonlight (2502.16982). torch's own
multiplies in bfloat16 everywhere. A processor without bfloat16 arithmetic needs 30 to 100 times as long for that as for float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from fewstep.core.devices import has_bfloat16

MOMENTUM = 0.95

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of the iteration x -> a x + b x^3 + c x^5 of the singular values: steep at 0, so that five iterations lift
small ones too; large ones end between 0.7 and 1.2 instead of at 1 (Jordan)."""

ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made nearly orthogonal, and scaled to the root mean square of AdamW's updates: 0.2 of the learning rate.

    For matrices only. The state of a parameter is `momentum_buffer`, of its shape and type. Every process must call `step`.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the engine computes gradients before
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        direction = _of_the_whole(gradient.lerp(momentum, MOMENTUM))
        parameter.mul_(1 - lr * weight_decay)
        # an orthogonal matrix of A x B has entries of root mean square max(A, B) ** -0.5
        parameter.add_(direction, alpha=-lr * 0.2 * math.sqrt(max(parameter.shape)))


def _of_the_whole(matrix: Tensor) -> Tensor:
    """`matrix`, orthogonalised. A sharded one is gathered by every process, which keeps its share of the result."""
    if not isinstance(matrix, DTensor):
        return orthogonalised(matrix)
    made = orthogonalised(matrix.full_tensor())
    return distribute_tensor(made, matrix.device_mesh, matrix.placements, src_data_rank=None)


def orthogonalised(matrix: Tensor) -> Tensor:
    """`matrix` with all singular values near 1, by five Newton-Schulz iterations: in bfloat16, or in float32 on a processor that
    has no bfloat16 arithmetic."""
    a, b, c = QUINTIC
    narrow = matrix.device.type != "cpu" or has_bfloat16()
    x = matrix.to(torch.bfloat16 if narrow else torch.float32)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T  # the smaller of the two products
    x = x / x.norm().clamp(min=1e-7)  # the largest singular value is 1 at most
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
