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
"""Times at which paths differ clearly; at the ends all of them are data or noise."""
APART = 0.1
"""Times must lie as far apart for noise and what was noised to be told from each other."""
FEW = 32
"""Inputs below which their mean says nothing."""
ENOUGH = 200
"""Calls after which a time that was not seen is not trained: a rare exit of a rollout comes up once in a dozen."""
NEAR = 0.05
"""Distance in time within which a network generalises."""
TAIL = 8
"""Gradients of loss terms are compared on so many of the student's last weight tensors: their backward is short."""


class Heard:
    """What the student was called with, as plain numbers: per time, how often and with which sum of mean squares."""

    def __init__(self) -> None:
        self.notes: list[tuple[Tensor, Tensor]] = []
        self.recent: dict[str, list[float]] = {}
        """Time with three decimals -> [count, sum of mean squares], since the last check."""
        self.times: list[float] = []
        """Every time since the run began."""
        self.calls = 0

    @torch.no_grad()
    def hear(self, role: str, x_t: Tensor, t: Tensor) -> None:
        """Note times and mean squares, of whole clips or frame by frame; nothing is waited for."""
        if role == "student":
            over = [d for d in range(1, x_t.ndim) if not (d == 2 and t.ndim == 2)]
            self.notes.append((t.detach().float(), x_t.detach().float().square().mean(over)))

    def drain(self) -> None:
        """Turn the notes into numbers."""
        for t, square in self.notes:
            self.calls += 1
            for time, value in zip(t.flatten().tolist(), square.flatten().tolist(), strict=True):
                entry = self.recent.setdefault(f"{time:.3f}", [0, 0.0])
                entry[0] += 1
                entry[1] += value
        self.notes.clear()

    def forget(self) -> None:
        """Begin a new interval: the times stay, the squares go."""
        self.times = sorted({*self.times, *map(float, self.recent)})
        self.recent = {}

    def noise(self, path: NoisePath) -> float | None:
        """How much noise the inputs hold, relative to what `path` puts there at their times; None with too few to tell.

        Fits `mean square = a^2 P + s^2 N` over the middle of the times and returns N. What was noised, dull or garish, is P.
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
        """Those of the `visited` times that training has not come near, once it has had the time to."""
        if self.calls < ENOUGH:
            return ()
        return apart(visited, {*self.times, *map(float, self.recent)}, NEAR)

    def state(self) -> dict[str, Any]:
        self.drain()
        return {"recent": self.recent, "times": self.times, "calls": self.calls}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.recent, self.times, self.calls = dict(state["recent"]), list(state["times"]), state["calls"]


class Terms:
    """Gradients of the loss terms of one update, added up over micro-batches."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def add(self, terms: Losses, network: nn.Module) -> None:
        """To be called before backward; the graph stays."""
        tail = [p for p in network.parameters() if p.requires_grad][-TAIL:]
        for name, term in terms.items():
            grads = torch.autograd.grad(term, tail, retain_graph=True, allow_unused=True)
            flat = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, tail)])
            self.gradients[name] = self.gradients[name] + flat if name in self.gradients else flat

    def cosine(self) -> float | None:
        """The smallest between two terms; None with fewer than two."""
        return min(self._cosines(), default=None)

    def _cosines(self) -> Iterator[float]:
        for a, b in combinations(self.gradients.values(), 2):
            yield float(cosine_similarity(a.double(), b.double(), dim=0))
