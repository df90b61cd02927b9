"""Whether a run has what its losses compare: clips of a batch, and decoded frames."""

from __future__ import annotations

from fewstep.core.held import held_objects
from fewstep.engine.settings import Settings
from fewstep.methods.base import Method
from fewstep.methods.rewards import Feedback
from fewstep.models import Card
from fewstep.models.card import latent_shape_of


def require_batch(method: Method, settings: Settings) -> None:
    """Refuse (ValueError) a batch that is too small for what the method compares within it."""
    if settings.batch < (least := least_batch(method)):
        raise ValueError(
            f"settings.batch is {settings.batch}, and {type(method).__name__} compares clips of a batch with each other; write "
            f"at least settings.batch: {least}"
        )


def least_batch(method: Method) -> int:
    """Fewest clips of a batch with which the losses of a method can be computed: the most that one of its parts asks for."""
    return max(getattr(part, "least_batch", 1) for part in held_objects(method))


def require_judged(method: Method, card: Card) -> None:
    """Refuse (ValueError) a method that decodes clips of a model without a codec, and feedback on more frames than clips have."""
    name, parts = type(method).__name__, card.parts  # no parts: made in memory, they are told when it is saved
    if "codec" in method.aux() and parts and "codec" not in parts:
        raise ValueError(
            f"{name} looks at decoded frames, and {card.name!r} has no codec; take a model with one, or leave out what "
            "looks at them"
        )
    most = max((part.frames for part in held_objects(method) if isinstance(part, Feedback)), default=0)
    shape = latent_shape_of(card) if most and all(rollout.whole for rollout in method.rollouts) else None
    if shape is not None and most > shape[1]:
        raise ValueError(
            f"feedback.frames is {most}, and a clip of {card.name!r} has {shape[1]} latent frames; write at most {shape[1]}, or "
            "0 for all"
        )
