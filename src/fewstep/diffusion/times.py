"""Times: densities for training, the shift, and the numbers of the usual sampling grids."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise

import torch
from torch import Tensor


def shifted(t: Tensor, shift: float) -> Tensor:
    """`shift t / (1 + (shift - 1) t)`: shift > 1 spends more time at high noise; 1 is the identity.

    The denominator is written so that 1 goes to exactly 1 for every shift, and 0 to 0.
    """
    return shift * t / (shift * t + (1 - t))


def uniform_grid(steps: int, shift: float = 1.0, terminal: float = 0.0) -> tuple[float, ...]:
    """`steps + 1` decreasing times from 1 to 0; with `terminal` all but the last are stretched to end at that time.

    >>> uniform_grid(4, shift=5.0)
    (1.0, 0.9375, 0.8333333333333334, 0.625, 0.0)
    """
    if steps < 1:
        raise ValueError(f"a sampling grid needs at least 1 step, got {steps}")
    times = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    if terminal and steps > 1:
        times[:-1] = 1 - (1 - times[:-1]) * (1 - terminal) / (1 - times[-2])
    return tuple(map(float, times))


def linear_quadratic_grid(steps: int, threshold: float) -> tuple[float, ...]:
    """`steps + 1` decreasing times from 1 to 0: half of the steps go down to `1 - threshold`, the rest ever faster (2410.13720).

    >>> [round(t, 3) for t in linear_quadratic_grid(4, threshold=0.025)]
    [1.0, 0.987, 0.975, 0.725, 0.0]
    """
    slow = steps // 2
    if not slow:
        return uniform_grid(steps)
    pace, fast = threshold / slow, steps - slow
    bend = (1 - threshold - pace * fast) / fast**2
    after = [max(i - slow, 0) for i in range(steps)]
    return (*(1 - pace * i - bend * k * k for i, k in enumerate(after)), 0.0)


def check_grid(times: tuple[float, ...]) -> tuple[float, ...]:
    """Return `times` if they decrease strictly from 1 to 0; ValueError otherwise."""
    ok = len(times) >= 2 and times[0] == 1.0 and times[-1] == 0.0 and all(a > b for a, b in pairwise(times))
    if not ok:
        raise ValueError(f"a time grid decreases strictly from 1.0 to 0.0, got {list(times)}")
    return times


def apart(times: Iterable[float], known: Collection[float], distance: float) -> tuple[float, ...]:
    """Those of `times` that lie further than `distance` from every time that is `known`.

    >>> apart((1.0, 0.5), known=(0.98,), distance=0.05)
    (0.5,)
    """
    return tuple(t for t in times if all(abs(t - k) > distance for k in known))


def timestep(t: Tensor, num_train_timesteps: int) -> Tensor:
    """What a network trained on integer timesteps is told at time `t`: `k = T t - 1`, float32, never below 0.

    Whole where `t` is `(k + 1) / T` in float32; in between, the same line, which derivatives follow everywhere.
    """
    k = num_train_timesteps * t.double() - 1
    whole = k.round()
    rounding = torch.where((k - whole).abs() < 1e-3, whole - k, torch.zeros_like(k))
    return (k + rounding.detach()).clamp_min(0).float()


def in_steps(count: int) -> str:
    """A number of steps in words.

    >>> in_steps(1), in_steps(4)
    ('1 step', '4 steps')
    """
    return f"{count} {'step' if count == 1 else 'steps'}"
