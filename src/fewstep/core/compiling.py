"""Test whether this machine can compile networks: a compiler alone is not enough (Python's headers, OpenMP)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def compile_problem(device: str = "cpu") -> str:
    """Why `torch.compile` does not work here, in one line; empty if it works. The first call takes a few seconds."""

    def double_sine(x: Tensor) -> Tensor:
        return 2 * x.sin()

    try:
        torch.compile(double_sine)(torch.ones(8, device=device))
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile fails on this machine ({first[0][:200]}); it needs a C++ compiler, OpenMP and Python's headers"
    return ""
