"""A student as engines see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.diffusion import DDIM, Euler, RectifiedFlow, Renoise
from fewstep.models.adapters.layout import Layout
from fewstep.models.card import Card

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel

_PLAIN = (Euler(), DDIM())
"""On a flow path these two make the same steps."""
TRAIN_TIMESTEPS = 1000
"""Whole timesteps of Wan's schedulers, in all three engines."""


@dataclass(frozen=True)
class Student:
    """A student to serve, called `title` where it is written."""

    model: VideoModel
    layout: Layout
    title: str

    @property
    def card(self) -> Card:
        return self.model.card

    @property
    def pipeline(self) -> str:
        """Diffusers' class."""
        return str(self.layout.index["_class_name"])

    @property
    def reads_image(self) -> bool:
        return "image" in self.card.parts

    @property
    def boundary(self) -> float | None:
        """Time from which on, up to 1, the first of two experts denoises; None of one network."""
        found: float | None = self.layout.index.get("boundary_ratio")
        return found

    @property
    def times(self) -> tuple[float, ...]:
        """Noise levels of the contract's own number of steps: from 1 to 0."""
        return self.card.contract.times()

    @property
    def fresh_noise(self) -> bool:
        """Whether it draws noise between its steps."""
        return self.card.contract.sampler == Renoise() and len(self.times) > 2

    def require_wan(self, engine: str, runs: str) -> None:
        """ValueError, which says what the engine `runs`, for what none of the three is known to serve exactly."""
        contract, card = self.card.contract, self.card
        if not self.pipeline.startswith("Wan") or not isinstance(card.path, RectifiedFlow) or card.kind != "flow":
            raise ValueError(
                f"--for {engine} exports {runs}, and {card.name} is a {self.pipeline}; leave --for out to export it for "
                "diffusers, or serve it with fewstep serve"
            )
        if contract.guidance.active:
            raise ValueError(
                f"--for {engine}: {card.name} is sampled with guidance ({contract.guidance}), and these few-step samplers call "
                "the network once a step; distil the guidance into the student first"
            )
        if contract.sampler not in (*_PLAIN, Renoise()) or self.times[0] != 1:
            raise ValueError(
                f"--for {engine}: it has no sampler for {type(contract.sampler).__name__} over the times {list(self.times)}; "
                "it can run Euler, DDIM or Renoise steps from time 1"
            )

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT."""
        return f"{self.card.width}x{self.card.height}"

    def refused(self, engine: str, problem: str, others: Sequence[str]) -> ValueError:
        """The error of an engine that cannot run this student, and what can."""
        rest = " or ".join([*(f"--for {other}" for other in others), "fewstep serve"])
        return ValueError(f"--for {engine}: {problem}; use {rest}")
