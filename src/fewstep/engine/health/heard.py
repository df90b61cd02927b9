"""Listener to the student's training: times, mean squares of inputs, and gradients of loss terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fewstep.core import Losses
from fewstep.diffusion import NoisePath
from fewstep.diffusion.times import apart

MIDDLE = (0.2, 0.85)
"""Range of times at which noise paths differ clearly; at both ends all paths are the same, data or noise."""
APART = 0.1
"""Least spread of the times. With less, the fit cannot separate noise from clips."""
FEW = 32
"""Least number of inputs; the mean of fewer says nothing."""
ENOUGH = 200
"""Number of calls after which an unseen time counts as not trained. Even a rare exit of a rollout comes once in a dozen."""
NEAR = 0.05
"""Distance in time within which a network generalises."""
TAIL = 8
"""Number of the student's last weight tensors on which gradients are compared, because their backward pass is short."""


class Heard:
    """What the student was called with, as plain numbers: for each time, how often, and the sum of mean squares."""

    def __init__(self) -> None:
        self.notes: list[tuple[Tensor, Tensor]] = []
        self.recent: dict[str, list[float]] = {}
        """Time with three decimals -> [count, sum of mean squares], since the last check."""
        self.times: list[float] = []
        """Every time since the run began."""
        self.calls = 0

    @torch.no_grad()
    def hear(self, role: str, x_t: Tensor, t: Tensor) -> None:
        """Record times and mean squares, per clip or per frame. Does not wait for the device."""
        if role == "student":
            over = [d for d in range(1, x_t.ndim) if not (d == 2 and t.ndim == 2)]
            self.notes.append((t.detach().float(), x_t.detach().float().square().mean(over)))

    def drain(self) -> None:
        """Turn the recorded tensors into numbers."""
        for t, square in self.notes:
            self.calls += 1
            for time, value in zip(t.flatten().tolist(), square.flatten().tolist(), strict=True):
                entry = self.recent.setdefault(f"{time:.3f}", [0, 0.0])
                entry[0] += 1
                entry[1] += value
        self.notes.clear()

    def forget(self) -> None:
        """Begin a new interval: keep the times, drop the mean squares."""
        self.times = sorted({*self.times, *map(float, self.recent)})
        self.recent = {}

    def noise(self, path: NoisePath) -> float | None:
        """Noise power of the inputs relative to that of `path` at the same times; None if there are too few inputs.

        Fits `mean square = a^2 P + s^2 N` over the middle of the times and returns N; P is the power of the clips themselves.
        """
        found = {float(time): entry for time, entry in self.recent.items() if MIDDLE[0] < float(time) < MIDDLE[1]}
        counts = torch.tensor([count for count, _ in found.values()], dtype=torch.float64)
        if counts.sum() < FEW or max(found) - min(found) < APART:
            return None
        c = path.coeffs(torch.tensor(list(found), dtype=torch.float64))
        means = torch.tensor([total for _, total in found.values()], dtype=torch.float64) / counts
        weight = counts.sqrt()[:, None]
        powers = torch.stack([c.a.square(), c.s.square()], 1)
        return float(torch.linalg.lstsq(weight * powers, weight * means[:, None]).solution[1])

    def unseen(self, visited: tuple[float, ...]) -> tuple[float, ...]:
        """The `visited` times that training has not come near; empty while there were too few calls to tell."""
        if self.calls < ENOUGH:
            return ()
        return apart(visited, {*self.times, *map(float, self.recent)}, NEAR)

    def state(self) -> dict[str, Any]:
        self.drain()
        return {"recent": self.recent, "times": self.times, "calls": self.calls}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.recent, self.times, self.calls = dict(state["recent"]), list(state["times"]), state["calls"]


class Terms:
    """Gradients of the loss terms of one update, summed over micro-batches."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def add(self, terms: Losses, network: nn.Module) -> None:
        """Add the gradients of `terms`. Call it before the backward pass; it keeps the graph."""
        tail = [p for p in network.parameters() if p.requires_grad][-TAIL:]
        for name, term in terms.items():
            grads = torch.autograd.grad(term, tail, retain_graph=True, allow_unused=True)
            flat = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, tail)])
            self.gradients[name] = self.gradients[name] + flat if name in self.gradients else flat

    def cosine(self) -> float | None:
        """The smallest cosine between the gradients of two terms; None with fewer than two terms."""
        return min(self._cosines(), default=None)

    def _cosines(self) -> Iterator[float]:
        for a, b in combinations(self.gradients.values(), 2):
            yield float(cosine_similarity(a.double(), b.double(), dim=0))
