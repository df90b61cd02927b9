"""The networks whose scores a method compares: the real one, which stays frozen, and the critic, which learns the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.core.bounds import Part, require_bounds
from fewstep.methods.roles import Copy, Other, Role, Weak
from fewstep.models.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Scorers:
    """Where the real score comes from, and what the critic starts as. Neither must have the student's size.

    The student starts as the run's model. Its text encoder and autoencoder serve all networks, so another model must have been
    trained with them, on the same noise path.
    """

    real: ModelSource | None = None
    """Model whose score is the real one, such as a larger one of the same family. null: the run's model."""
    critic: ModelSource | Literal["real"] | None = None
    """What the critic starts as: `real` (a copy of it), or another model, such as a smaller one. null: a copy of the run's
    model, which has the student's size, also where `real` is larger (Self-Forcing, 2506.08009: 14B beside 1.3B)."""
    weak: Part = 0.0
    """Share of the critic's adapters added to the run's model for the real score (MagicDistillation: 0.25); 0: none. It needs
    LoRA."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.weak > 0 and (self.real is not None or self.critic is not None):
            raise ValueError(
                "weak weighs adapters of a critic that is a copy of the run's model, which then gives the real score; write "
                "real: null and critic: null, or weak: 0"
            )
        if self.critic == "real" and self.real is None:
            raise ValueError(
                "critic: real is a copy of another model, and real is null; give real a model, or write critic: null"
            )

    @property
    def role(self) -> str:
        """The role whose score is the real one."""
        return "teacher" if self.real is None and self.weak == 0 else "real"

    @property
    def roles(self) -> dict[str, Role]:
        """`critic`, and `real` where that is not the teacher, in an order in which they can be made."""
        if self.weak > 0:
            return {"critic": Copy("teacher"), "real": Weak("critic", self.weak)}
        real: dict[str, Role] = {} if self.real is None else {"real": Other(self.real)}
        return real | {"critic": self._critic()}

    def _critic(self) -> Role:
        match self.critic:
            case None:
                return Copy("teacher")
            case "real":
                return Copy("real")
            case model:
                return Other(model, frozen=False)
