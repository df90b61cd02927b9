"""Whether a run can begin with an earlier student: a network of the same model, which the method may sample as it does."""

from __future__ import annotations

from fewstep.diffusion import Contract
from fewstep.engine.nets import starts
from fewstep.engine.settings import Settings
from fewstep.engine.student import transforms_of
from fewstep.methods.base import Method
from fewstep.models import Card


def require_same(method: Method, settings: Settings, card: Card, begun: Card | None = None) -> None:
    """Refuse (ValueError) a `settings.start` whose denoiser differs from the teacher's, or what `require_sampled_alike` refuses.
    `begun` is the card of the start, if it is known before the folder exists."""
    if settings.start is None:
        require_sampled_alike(method, card, card)
        return
    if method.part != "denoiser":
        raise ValueError(f"settings.start is for a denoiser, and this method trains the {method.part}; leave it out")
    begun = begun or starts(settings)["student"].card()
    if "denoiser" not in begun.parts:
        raise ValueError(f"settings.start: {settings.start} has no denoiser; it has {', '.join(begun.parts)}")
    pairs = {
        "denoiser": (begun.parts["denoiser"], card.parts.get("denoiser", begun.parts["denoiser"])),
        "path": (begun.path, card.path),
        "kind": (begun.kind, card.kind),
    }
    for what, (theirs, own) in pairs.items():
        if theirs != own:
            raise ValueError(
                f"settings.start: {settings.start} does not match this teacher: its {what} is {theirs}, and the teacher's is "
                f"{own}; give a student of the same model"
            )
    wanted = transforms_of(card, settings, method)
    if begun.transforms != wanted[: max(len(card.transforms), len(begun.transforms))]:
        raise ValueError(
            f"settings.start: {settings.start} is no student of this teacher: it has the transforms {list(begun.transforms)}, "
            f"and this run's student {list(wanted)}; write those that it has besides the teacher's in settings.transforms"
        )
    require_sampled_alike(method, card, begun)


def require_sampled_alike(method: Method, card: Card, begun: Card) -> None:
    """Refuse (ValueError) to reinforce a student of few steps that the method would sample in another way than it was distilled
    for; `card` is the teacher's, `begun` that of the student."""
    if not (method.reinforces and begun.contract.trained):
        return
    mine, its = method.contract(card.contract), begun.contract
    random = max(its.counts) > 1  # in one step all samplers do the same
    guided = max(mine.guidance.passes, its.guidance.passes) > 1
    facts: dict[str, tuple[object, object]] = {
        "grid": (_rounded(its), _rounded(mine)),
        "sampler": (its.sampler, mine.sampler) if random else (None, None),
        "stream": (its.stream, mine.stream),
        "guidance": (its.guidance, mine.guidance) if guided else (None, None),
    }
    for what, (theirs, own) in facts.items():
        if theirs != own:
            raise ValueError(
                f"{type(method).__name__} improves a student at its own steps, and its rollout has another {what} ({own}) than "
                f"the student was distilled with ({theirs}); give the rollout the grids, shift and mode of the distillation"
            )


def _rounded(contract: Contract) -> list[list[float]]:
    return [[round(t, 6) for t in times] for times in contract.trained.values()]
