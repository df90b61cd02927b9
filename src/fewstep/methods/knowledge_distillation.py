"""Regress the endpoint of the teacher's ODE from its noise, or from a stored state between them.

Luhman & Luhman, Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed, 2101.02388;
states between noise and endpoint: Yin et al. (CausVid), 2412.07772, section 4.3; of a causal teacher: 2602.02214.

    offline  eps ~ N(0, I); x_{t_0} .. x_{t_N} = teacher's solver, guided; keep the states at the student's times
    1  draw i; input x_{t_i}
    2  minimise d(student(x_{t_i}, t_i, c), x_{t_N})

Not from the papers: d is pseudo-Huber by default (mean square gives blurred clips if the fit is not perfect); i is drawn from
all listed grids, so that one student serves several step counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Positive
from fewstep.methods.base import Method, Nets, Update
from fewstep.methods.rollouts import FromPairs
from fewstep.methods.targets import mse, pseudo_huber
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class KnowledgeDistillation(Method):
    """ODE regression on stored pairs."""

    cite: ClassVar[str] = "Luhman & Luhman, Knowledge Distillation in Iterative Generative Models, 2101.02388"

    rollout: FromPairs = FromPairs()
    """Stored states that are the student's inputs, and how the student will be sampled."""
    huber: Positive | None = 1e-3
    """c of the pseudo-Huber distance; null: the paper's mean square."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts"}) | self.rollout.needs

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        endpoint = batch.require("pairs").states[:, -1]
        x0 = self.rollout(nets.student, batch, rng, grad=True).x0  # 1
        yield {"endpoint": mse(x0, endpoint) if self.huber is None else pseudo_huber(x0, endpoint, self.huber)}  # 2

    def cost(self) -> tuple[Work, ...]:
        return (Work("student", self.rollout.work),)
