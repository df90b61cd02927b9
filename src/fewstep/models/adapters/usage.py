"""The lines of Python that load a folder with plain diffusers and sample it as its contract says."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import diffusers

from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.schedulers import Exact, exact_scheduler
from fewstep.models.bundle import VideoModel


@dataclass(frozen=True)
class Usage:
    """How `model` is used in the pipeline of `layout`.

    ValueError where plain diffusers could not make the same clips.
    """

    model: VideoModel
    layout: Layout

    def __post_init__(self) -> None:
        card = self.model.card
        guidance = card.contract.guidance
        if guidance.active and (guidance.low > 0 or guidance.high < 1 or guidance.scale < 1):
            raise ValueError(
                f"diffusers guides at all times with a scale above 1, and the contract asks for {guidance}"
            )
        if "num_frames" not in self._known and card.num_frames != 1:
            raise ValueError(f"{self.pipeline} makes images, and this card asks for {card.num_frames} frames")
        if self.pipeline == "LTXConditionPipeline":
            raise ValueError(
                "LTXConditionPipeline goes by times of its own, whatever its scheduler says; a folder of fewstep's own keeps "
                "this student exactly"
            )
        self.exact(card.contract.steps)

    @property
    def pipeline(self) -> str:
        """Name of its class."""
        return str(self.layout.index["_class_name"])

    def exact(self, steps: int) -> Exact:
        """The scheduler for a clip in `steps` steps."""
        card = self.model.card
        return exact_scheduler(card.path, card.kind, card.contract, steps)

    def pages(self, source: str, lora: str = "") -> dict[int, str]:
        """By step count: load `source`, which has the scheduler of the default count, or any other source and a `lora`."""
        contract = self.model.card.contract
        return {n: self._code(n, source, lora, there=n == contract.steps and not lora) for n in contract.counts}

    def _code(self, steps: int, source: str, lora: str, *, there: bool) -> str:
        exact, names = self.exact(steps), {self.pipeline}
        lines = [f'pipe = {self.pipeline}.from_pretrained("{source}")']
        if lora:
            lines.append(f'pipe.load_lora_weights("{lora}")')
        if not there:
            scheduler = type(exact.scheduler).__name__
            settings = {key: value for key, value in exact.scheduler.config.items() if not key.startswith("_")}
            names.add(scheduler)
            lines.append(f"pipe.scheduler = {scheduler}(**{settings!r})")
        if exact.pinned:
            arguments = ", ".join(f"{key}={values!r}" for key, values in exact.pinned.items())
            lines.append("set_timesteps = pipe.scheduler.set_timesteps")
            lines.append(f"pipe.scheduler.set_timesteps = lambda *_, **__: set_timesteps({arguments})")
        return "\n".join(
            [f"from diffusers import {', '.join(sorted(names))}", "", *lines, f"sampling = {self._options(steps)!r}"]
        )

    def _options(self, steps: int) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        card = self.model.card
        guidance = card.contract.guidance
        offered: dict[str, Any] = {
            "num_inference_steps": steps, "guidance_scale": guidance.scale, "num_frames": card.num_frames,
            "height": card.height, "width": card.width,
        }  # fmt: skip
        if guidance.active and card.negative_prompt:
            offered["negative_prompt"] = card.negative_prompt
        return {key: value for key, value in offered.items() if key in self._known}

    @property
    def _known(self) -> set[str]:
        return set(inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters)
