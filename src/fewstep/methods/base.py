"""The interface of a method: which roles are trained, and with which losses. The engine does everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from fewstep.compress import Transform
from fewstep.core import Batch, Losses, Rng
from fewstep.diffusion import CFG, Contract
from fewstep.methods.roles import Role
from fewstep.methods.rollouts import Rolled, Rollout
from fewstep.methods.rollouts.context import Context
from fewstep.methods.work import Work


class Nets(Mapping[str, Any]):
    """The networks of a run by role, as attributes too: `nets.student` is `nets["student"]`.

    A method may use a denoiser only through the interface `models.denoiser.Predictor`.
    """

    def __init__(self, roles: Mapping[str, nn.Module]) -> None:
        self._roles = dict(roles)

    def __getitem__(self, role: str) -> Any:
        return self._roles[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def __getattr__(self, role: str) -> Any:
        if role.startswith("_"):
            raise AttributeError(role)
        try:
            return self[role]
        except KeyError:
            raise AttributeError(f"this run has no role {role!r}; it has {', '.join(self._roles)}") from None

    @property
    def roles(self) -> Mapping[str, nn.Module]:
        """All networks, on whatever device they are, for code that does not run them."""
        return self._roles

    def begin(self, roles: tuple[str, ...]) -> None:
        """Prepare for an update of `roles`."""

    def bring(self, *roles: str) -> None:
        """Prepare `roles` for use by code that already holds these networks."""


@dataclass(frozen=True)
class Update:
    """One optimiser step of `roles`. `losses` yields one graph at a time; the engine runs backward as they come."""

    roles: tuple[str, ...]
    losses: Callable[[Nets, Batch, Rng], Iterator[Losses]]


@dataclass(frozen=True)
class Sync:
    """`target <- decay * target + (1 - decay) * source`, without gradient. Decay 0 copies."""

    target: str
    source: str
    decay: float = 0.0


class _Judges(Nets):
    """The networks of a run as they judge a clip: with what its chunks have read of earlier frames."""

    def __init__(self, nets: Nets, context: Context) -> None:
        super().__init__(nets.roles)
        self._nets, self._context = nets, context

    def __getitem__(self, role: str) -> Any:
        return self._context.over(self._nets[role])


def judged(rolled: Rolled, batch: Batch, nets: Nets) -> tuple[Tensor, Tensor | None, Batch, Nets]:
    """What teacher and critic see of a rollout, if the method `continues` streams: the clip `[B, C, F, H, W]` with its past, the
    weights of its frames in losses (None: all alike), and the batch with the clip's own conditions; and the networks that judge
    it, which read its context."""
    judges = nets if rolled.context is None else _Judges(nets, rolled.context)
    return rolled.clip, rolled.keep, rolled.of(batch), judges


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """An algorithm as a frozen object: its fields are the paper's hyper-parameters, its methods the algorithm box.

    Roles `teacher` (frozen, the model a run starts from) and `student` (trained, a copy of it) always exist.
    """

    cite: ClassVar[str]
    """Authors, title and arXiv id, as printed by `fewstep list methods`."""

    continues: ClassVar[bool] = False
    """Whether it trains on clips that have a past or conditions of their own: rollouts that are not `whole`."""

    reinforces: ClassVar[bool] = False
    """Whether it improves a student that has been distilled, which it must then sample as that distillation did."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of Batch that the method reads. They are compared with the data before any weight is loaded."""
        return frozenset({"prompts"})

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """Changes of the student's network that the method needs. A network that does not have them yet is changed so."""
        return ()

    @property
    def part(self) -> str:
        """The part of the model that is trained: `denoiser`, `codec`, `text` or `features`."""
        return "denoiser"

    @property
    def guidance(self) -> CFG | None:
        """Guidance distilled into the student (a field of that name); None if unused."""
        return None

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """Fields that are rollouts, which make student samples, less those whose data the method does not need, as it is set."""
        return tuple(value for value in vars(self).values() if isinstance(value, Rollout) and value.needs <= self.needs)

    @property
    def carries(self) -> bool:
        """Whether updates leave something for later ones (`Batch.carried`)."""
        return any(rollout.carries for rollout in self.rollouts)

    def aux(self) -> Mapping[str, Role]:
        """Roles besides student and teacher."""
        return {}

    @property
    def critic(self) -> str | None:
        """The role that learns the student's distribution: a denoiser that was trained before, and is trained beside it. None: no
        such role."""
        trained = {role for event in self.updates(0) if isinstance(event, Update) for role in event.roles}
        started = (role for role, made in self.aux().items() if made.origin is not None or made.source is not None)
        return next((role for role in started if role in trained), None)

    @abstractmethod
    def updates(self, step: int) -> Iterator[Update | Sync]:
        """The updates of iteration `step`, counted from 0, in the paper's order."""

    def check(self, steps: int) -> None:  # noqa: B027 - most methods accept any length
        """Refuse (ValueError) a run of `steps` iterations if its student could not do what `contract` says."""

    def contract(self, teacher: Contract) -> Contract:
        """How the student must be sampled. Default: like the first rollout; without a rollout, like the teacher."""
        return self.rollouts[0].contract(teacher) if self.rollouts else teacher

    def contract_at(self, teacher: Contract, step: int) -> Contract:
        """How to sample the student of iteration `step`, for figures during the run. Default: the final `contract`."""
        return self.contract(teacher)

    def lengthened(self, factor: float) -> Self:
        """The method for a run of `factor` times as many iterations. Fields that count iterations grow with it; default: none."""
        return self

    def shown(self, role: str) -> int:
        """Number of single frames per clip that `role` reads; 0: it reads whole clips."""
        return next((work.frames for work in self.cost() if work.role == role), 0)

    def cost(self) -> tuple[Work, ...]:
        """Work per clip in one iteration, for plans. Discriminator heads, at most a per cent at scale, are left out."""
        return (Work("student", 3),)
