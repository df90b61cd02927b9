"""Whether the steps that a run trains have an expert of their own, so that the run leaves the other steps as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from fewstep.compress import Experts
from fewstep.diffusion.experts import expert_at
from fewstep.engine.settings import Settings
from fewstep.engine.student import transforms_of
from fewstep.methods.base import Method
from fewstep.methods.rollouts import BackwardSimulation, exact
from fewstep.models import Card


def require_experts(method: Method, settings: Settings, card: Card) -> None:
    """Refuse (ValueError) a phase that would change what another phase trains; `card` is the teacher's."""
    boundaries = boundaries_of(replace(card, transforms=transforms_of(card, settings, method)))
    for rollout in method.rollouts:
        if isinstance(rollout, BackwardSimulation) and rollout.phase is not None:
            _require_own(rollout, boundaries)
            if settings.lora is None and settings.optim_of("student").weight_decay > 0:
                raise ValueError(
                    "weight decay moves the experts of other phases, too; write settings.optim.student.weight_decay: 0, or "
                    "train adapters (settings.lora)"
                )


def boundaries_of(card: Card) -> tuple[float, ...]:
    """Times at which the experts of a model change, decreasing; empty of a model without."""
    for transform in card.transforms:
        if isinstance(transform, Experts):
            return transform.boundaries
    known = card.parts.get("denoiser")
    return () if known is None else tuple(cast(list[float], known.args.get("boundaries", ())))


def _require_own(rollout: BackwardSimulation, boundaries: tuple[float, ...]) -> None:
    low, high = rollout.shifted_phase
    times = {t for grid in exact(rollout.grids, rollout.shift) for t in grid}
    inside = {t for t in times if low < t <= high}
    trained = {expert_at(boundaries, t) for t in inside}
    shared = [t for t in times - inside if expert_at(boundaries, t) in trained]
    if not shared:
        return
    later, earlier = [t for t in times if t <= low], [t for t in times if t > high]
    between = [(max(later), min(inside))] if later else []
    between += [(max(inside), min(earlier))] if earlier else []
    raise ValueError(
        f"the steps of the phase {rollout.span} share a network with the step from t = {max(shared):g}, which it would change; "
        "give the student experts, settings.transforms: [{type: Experts, boundaries: [...]}], with a boundary "
        + " and one ".join(f"above {below:g} and at most {above:g}" for below, above in between)
    )
