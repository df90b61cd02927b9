"""What a run makes: a student, a teacher, or another part of a model."""

from __future__ import annotations

from typing import Literal

from fewstep.methods.base import Method
from fewstep.models.card import Card


def role_of(method: Method, card: Card) -> Literal["teacher", "student"]:
    """The role of a trained denoiser: a student, unless it is sampled exactly like the model that the run started from."""
    return card.role if method.contract(card.contract) == card.contract else "student"


def result_of(method: Method, card: Card) -> str:
    """The name of a run's result (one of `RESULTS`): the role of a denoiser, or the part that is trained."""
    return role_of(method, card) if method.part == "denoiser" else method.part
