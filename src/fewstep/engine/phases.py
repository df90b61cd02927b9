"""Whether the steps that a run trains have an expert of their own, so that the run leaves the other steps as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from fewstep.compress import Experts
from fewstep.diffusion.experts import expert_at
from fewstep.engine.settings import Settings
from fewstep.engine.student import transforms_of
from fewstep.methods.base import Method
from fewstep.methods.rollouts import BackwardSimulation, FromPairs, Rollout, exact
from fewstep.models import Card


def require_experts(method: Method, settings: Settings, card: Card) -> None:
    """Refuse (ValueError) a phase that would change what another phase trains; `card` is the teacher's."""
    boundaries = boundaries_of(replace(card, transforms=transforms_of(card, settings, method)))
    for rollout in phased(method):
        _require_own(rollout, boundaries)
        _require_trained(rollout, boundaries, settings)
        _require_pairs_inside(rollout, method)
        if settings.lora is None and settings.optim_of("student").weight_decay > 0:
            raise ValueError(
                "weight decay moves the experts of other phases, too; write settings.optim.student.weight_decay: 0, or "
                "train adapters (settings.lora)"
            )


def phased(method: Method) -> list[BackwardSimulation]:
    """The method's rollouts that train some steps only."""
    return [each for each in method.rollouts if isinstance(each, BackwardSimulation) and each.phase is not None]


def require_every_step(stages: Sequence[tuple[str, Method, Card]]) -> None:
    """Refuse (ValueError) phases that leave some steps of their student to nobody, so that these stay the teacher's.

    `stages` are names, methods and teachers' cards, in their order, of a student that begins as the first teacher.
    """
    trained = dict[str, list[BackwardSimulation]]()
    for name, method, card in reversed(stages):
        if found := phased(method):
            trained[name] = found
        elif method.part == "denoiser" and method.contract(card.contract).trained:
            return  # this stage, and what comes after it: every step has been trained
    if not trained:
        return
    every = [rollout for found in trained.values() for rollout in found]
    steps = zip(sum(every[0].grids, ()), sum(exact(every[0].grids, every[0].shift), ()), strict=True)
    left = [step for step, t in steps if not any(_inside(rollout, t) for rollout in every)]
    if left:
        listed = ", ".join(f"{name} {list(r.span)}" for name, found in reversed(trained.items()) for r in found)
        raise ValueError(
            f"no stage trains the steps from t = {', '.join(f'{t:g}' for t in left)} (before the shift), which would stay the "
            f"teacher's; the stages have the phases {listed}; give one of them, or one more, the phase of these steps"
        )


def boundaries_of(card: Card) -> tuple[float, ...]:
    """Times at which the experts of a model change, decreasing; empty of a model without."""
    for transform in card.transforms:
        if isinstance(transform, Experts):
            return transform.boundaries
    known = card.parts.get("denoiser")
    return () if known is None else tuple(cast(list[float], known.args.get("boundaries", ())))


def _require_trained(rollout: BackwardSimulation, boundaries: tuple[float, ...], settings: Settings) -> None:
    """Refuse (ValueError) parameters to train (`only`, `frozen`) that leave an expert of the phase as it is."""
    own = {expert_at(boundaries, t) for t in _times(rollout) if _inside(rollout, t)}
    optim = settings.optim_of("student")
    named = [re.search(r"experts\.(\d+)", key) for key in optim.only]
    only = {int(found[1]) for found in named if found} if all(named) and named else own
    frozen = {int(found[1]) for key in optim.frozen if (found := re.search(r"experts\.(\d+)\.?$", key))}
    if idle := sorted(own - (only - frozen)):
        raise ValueError(
            f"the steps of the phase {rollout.span} are those of expert {idle[0]}, and settings.optim.student leaves it as it is "
            f"(only: {list(optim.only)}, frozen: {list(optim.frozen)}); write only: [experts.{idle[0]}.], or leave both out"
        )


def _require_own(rollout: BackwardSimulation, boundaries: tuple[float, ...]) -> None:
    times = _times(rollout)
    inside = {t for t in times if _inside(rollout, t)}
    trained = {expert_at(boundaries, t) for t in inside}
    shared = [t for t in times - inside if expert_at(boundaries, t) in trained]
    if not shared:
        return
    later, earlier = [t for t in times if t < min(inside)], [t for t in times if t > max(inside)]
    between = [(max(later), min(inside))] if later else []
    between += [(max(inside), min(earlier))] if earlier else []
    raise ValueError(
        f"the steps of the phase {rollout.span} share a network with the step from t = {max(shared):g}, which it would change; "
        "give the student experts, settings.transforms: [{type: Experts, boundaries: [...]}], with a boundary "
        + " and one ".join(f"above {below:g} and at most {above:g}" for below, above in between)
    )


def _require_pairs_inside(rollout: BackwardSimulation, method: Method) -> None:
    """Refuse (ValueError) a regression on stored states that are not of the phase (`DMD2.anchor`)."""
    stored = [each for each in method.rollouts if isinstance(each, FromPairs)]
    for t in sorted({t for each in stored for t in _times(each)}, reverse=True):
        if not _inside(rollout, t):
            raise ValueError(
                f"the regression on stored pairs trains the step from t = {t:g}, which is not of the phase {rollout.span}; give "
                "method.anchor_rollout grids of the phase's times alone, or write method.anchor: 0"
            )


def _times(rollout: Rollout) -> set[float]:
    """All times at which a step begins, as the network is told."""
    return {t for grid in exact(rollout.grids, rollout.shift) for t in grid}


def _inside(rollout: BackwardSimulation, t: float) -> bool:
    """Whether a step that begins at `t` is one of the phase."""
    low, high = rollout.shifted_phase
    return low < t <= high
