"""Whether a run has what its losses compare and judge: clips of a batch, and the frames that a reward sees."""

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
    name, shape = type(method).__name__, latent_shape_of(card)
    if shape is None:
        if "codec" in method.aux() and card.parts:  # a model made in memory tells its parts when it is saved
            raise ValueError(
                f"{name} decodes clips (a reward sees their frames), and {card.name!r} has no codec; take a model with one, or "
                "leave rewards out"
            )
        return
    for part in held_objects(method):
        if isinstance(part, Feedback) and part.frames > shape[1] and all(rollout.whole for rollout in method.rollouts):
            raise ValueError(
                f"feedback.frames is {part.frames}, and a clip of {card.name!r} has {shape[1]} latent frames; write at most "
                f"{shape[1]}, or 0, which takes them all"
            )
