"""What a run's student begins as: the teacher's or an earlier student's network, with transforms of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fewstep.compress import FrameInput, ScalarInput, Transform
from fewstep.engine.nets import origin, sources, synced, trained_roles
from fewstep.engine.settings import Settings
from fewstep.engine.shard import divided, gathered
from fewstep.methods.base import Method
from fewstep.methods.roles import require_blocks
from fewstep.models import Card, Denoiser, VideoModel
from fewstep.models.card import allocate, sketch
from fewstep.models.fingerprint import describe


def with_student(model: VideoModel, settings: Settings, others: Mapping[str, VideoModel]) -> Mapping[str, VideoModel]:
    """`others`, and under `student` the model whose denoiser the student begins as, if that is no copy of the teacher."""
    if not settings.transforms:
        return others
    return {**others, "student": _changed(others.get("student", model), model, settings)}


def equipped(settings: Settings, method: Method, card: Card) -> Settings:
    """`settings` with the transforms that the method needs, where the student does not have them yet. ValueError with adapters,
    which could not train them."""
    own = transforms_of(card, settings, method)[len(card.transforms) :]
    more = [str(_what(each)) for each in own[len(settings.transforms) :]]
    if more and settings.lora is not None:
        raise ValueError(
            f"{type(method).__name__} needs a student that has {' and '.join(more)}; this model does "
            "not, and adapters cannot teach it; leave out settings.lora, or give a model with these transforms"
        )
    return replace(settings, transforms=own)


def untrained(model: VideoModel, settings: Settings, begun: VideoModel | None) -> VideoModel:
    """The model with the student as it was before training; `begun` is the model of `settings.start`.

    Every process gathers the whole of a divided teacher that is changed, so all must call.
    """
    before = begun or model
    if settings.transforms and divided(before.denoiser):
        before = VideoModel(model.card, {"denoiser": _whole(model.denoiser)})
    denoiser = _changed(before, model, settings).denoiser.to(model.device)
    return VideoModel(model.card, {**model.parts, "denoiser": denoiser})


def transforms_of(card: Card, settings: Settings, method: Method) -> tuple[Transform, ...]:
    """All transforms of the student of a teacher with that card: the teacher's, those of the settings, and those that the method
    needs besides."""
    own = (*card.transforms, *settings.transforms)
    has = {_what(each) for each in own}
    return (*own, *(each for each in method.transforms if _what(each) not in has))


def _what(transform: Transform) -> Transform | str:
    """What a method that needs this transform needs: of a scalar only that it is read, whatever its scale and default."""
    return f"ScalarInput(name={transform.name!r})" if isinstance(transform, ScalarInput) else transform


def require_transformable(method: Method, settings: Settings, card: Card) -> None:
    """Refuse (ValueError) transforms that the student cannot have, or with which it could not be trained or sampled."""
    every, name, others = transforms_of(card, settings, method), type(method).__name__, sources(method)
    cards = {"teacher": card, "student": replace(card, transforms=every)}
    cards |= {role: source.card() for role, source in others.items()}
    for role in trained_roles(method, settings.steps):
        begun = cards[origin(method, role, {"student", *others})]
        fixed = [type(transform).__name__ for transform in begun.transforms if not transform.trainable]
        if fixed and settings.lora is None:
            raise ValueError(
                f"{name} would train a {role} whose layers are {fixed[0]} and cannot be trained; set settings.lora, whose "
                "adapters are trained over them, or train first and transform the student"
            )
    idle = [type(transform).__name__ for transform in settings.transforms if transform.identity]
    if idle and settings.lora is not None:
        raise ValueError(
            f"settings.transforms: {idle[0]} begins without effect, and with settings.lora nothing but adapters is trained; "
            "leave out one of the two"
        )
    own = {"student"} if settings.transforms else set()
    for target, source in synced(method, settings.steps):
        if origin(method, target, {*own, *others}) != origin(method, source, {*own, *others}):
            what = "has the student's transforms" if own else "is another model"
            raise ValueError(
                f"{name} copies weights of the {source} into the {target}, and only one of them {what}; make the one a Copy of "
                "the other"
            )
    if not settings.transforms:
        return
    counts = method.contract(card.contract).counts
    for transform in settings.transforms:
        if isinstance(transform, (ScalarInput, FrameInput)) and transform.default is None:
            what = "scalar" if isinstance(transform, ScalarInput) else "input"
            raise ValueError(
                f"settings.transforms: checks, pictures and probes make clips without the {what} {transform.name!r}; give "
                f"{type(transform).__name__} a default"
            )
        transform.check(counts)
    if "denoiser" in card.parts:
        try:
            sketch("denoiser", replace(card, transforms=every))
        except ValueError as error:
            raise ValueError(f"settings.transforms: {error}") from error


def require_features(method: Method, settings: Settings, card: Card) -> None:
    """Refuse (ValueError) a role that reads features of blocks which its network does not have."""
    cards = {"teacher": card, "student": replace(card, transforms=transforms_of(card, settings, method))}
    cards |= {role: source.card() for role, source in sources(method).items()}
    for name, role in method.aux().items():
        read = None if role.needs is None or not role.reads else cards[origin(method, role.needs, cards)]
        if read is None or "denoiser" not in read.parts:
            continue
        denoiser = sketch("denoiser", read)
        assert isinstance(denoiser, Denoiser)
        try:
            require_blocks(role.reads, len(denoiser.backbone.widths))
        except ValueError as error:
            raise ValueError(
                f"the {name} of {type(method).__name__} reads features of the {role.needs}: {error}"
            ) from None


def _changed(before: VideoModel, teacher: VideoModel, settings: Settings) -> VideoModel:
    """`before` with those of the student's own transforms that it does not have yet."""
    return before.transformed(*settings.transforms[len(before.transforms) - len(teacher.transforms) :])


def _whole(denoiser: Denoiser) -> Denoiser:
    """A copy in one piece on the CPU of this process."""
    card = Card(
        name="", parts={"denoiser": describe(denoiser)}, path=denoiser.path, kind=denoiser.kind,
        transforms=denoiser.backbone.transforms,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        piece: Denoiser = allocate("denoiser", card)  # type: ignore[assignment]
    piece.load_state_dict(gathered(denoiser))
    return piece
