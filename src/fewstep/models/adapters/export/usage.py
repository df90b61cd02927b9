"""Arguments that make a diffusers pipeline follow a contract, as objects or as lines of Python."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import ClassifierFreeGuidance, SchedulerMixin

from fewstep.diffusion import CFG
from fewstep.models.adapters.conditions.cogvideox_image import CogVideoXImage
from fewstep.models.adapters.export.narrow import Dtype
from fewstep.models.adapters.export.schedulers import ExactScheduler, exact_scheduler
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.lora_file import file_names
from fewstep.models.backbone import Original

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel


_SCHEDULER = "scheduler"
"""Where pipelines look for theirs."""
_UNIFORM = frozenset({"LTXPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline"})
"""Pipelines that give their scheduler the uniform grid of so many steps, where others give it the number."""
OWN_TIMES = frozenset({"LTXConditionPipeline"})
"""Pipelines that give their scheduler times that it does not change."""


def original_of(model: VideoModel) -> Original:
    """The denoiser's networks as diffusers has them. ValueError for those of fewstep's own."""
    backbone = model.denoiser.backbone
    original = backbone.original()
    if original is None:
        raise ValueError(
            f"{type(backbone).__name__} is fewstep's own: diffusers has no class for it, so only fewstep reads this folder"
        )
    return original


@dataclass(frozen=True)
class Usage:
    """How `model` is used in the pipeline of `layout`.

    ValueError where plain diffusers could not make the same clips.
    """

    model: VideoModel
    layout: Layout
    dtype: Dtype = "float32"
    """Type in which the denoiser is stored."""

    def __post_init__(self) -> None:
        card = self.model.card
        _ = self.original
        if "num_frames" not in self.known and card.num_frames != 1:
            raise ValueError(f"{self.pipeline} makes images, and this card asks for {card.num_frames} frames")
        if isinstance(self.model.parts.get("image"), CogVideoXImage):
            raise ValueError(
                f"{self.pipeline} draws the latents of the image from their posterior, and here they are its mode"
            )
        self.options(card.contract.steps)
        self.exact(card.contract.steps)

    @cached_property
    def original(self) -> Original:
        return original_of(self.model)

    @property
    def pipeline(self) -> str:
        """Name of its class."""
        return str(self.layout.index["_class_name"])

    @property
    def takes_lora(self) -> bool:
        """Whether the pipeline loads LoRAs."""
        return hasattr(getattr(diffusers, self.pipeline), "load_lora_weights")

    @cached_property
    def known(self) -> Mapping[str, inspect.Parameter]:
        """Arguments of the pipeline's call."""
        return inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters

    @property
    def guider(self) -> ClassifierFreeGuidance | None:
        """Where guidance is a part of the pipeline and no argument of its call."""
        if "guider" not in self.layout.index:
            return None
        return ClassifierFreeGuidance(guidance_scale=self.model.card.contract.guidance.scale)

    def exact(self, steps: int) -> ExactScheduler:
        """The scheduler for a clip in `steps` steps."""
        card = self.model.card
        exact = exact_scheduler(card.path, card.kind, card.contract, steps, uniform=self.pipeline in _UNIFORM)
        if self.pipeline in OWN_TIMES:
            exact = replace(exact, pinned={"sigmas": list(card.contract.times(steps)[:-1])})
        return exact

    def schedulers(self) -> dict[str, SchedulerMixin]:
        """The scheduler of every step count, by the folder in which it is stored."""
        return {self._folder(steps): self.exact(steps).scheduler for steps in self.model.card.contract.counts}

    def options(self, steps: int) -> dict[str, Any]:
        """Arguments of the pipeline's call besides the prompt."""
        card, names = self.model.card, self.original.names
        offered: dict[str, Any] = {
            "num_inference_steps": steps, "num_frames": card.num_frames, "height": card.height, "width": card.width,
            "max_sequence_length": card.parts["text"].args.get("length"), **self._guidance(),
        }  # fmt: skip
        if (codec := card.parts["codec"].args).get("decode_time"):
            offered |= {"decode_timestep": codec["decode_time"], "decode_noise_scale": codec["decode_noise"]}
        if card.contract.guidance.active and (card.negative_prompt or "guidance_scale" in names):
            offered["negative_prompt"] = card.negative_prompt  # HunyuanVideo is not guided without one
        offered = {names.get(name, name): value for name, value in offered.items()} | self.original.told
        usual = {name: self.known[name].default for name in ("max_sequence_length",) if name in self.known}
        return {k: v for k, v in offered.items() if k in self.known and not (k in usual and v in (None, usual[k]))}

    def _guidance(self) -> dict[str, float]:
        """Diffusers changes the scale with the expert, and never in the time of one network."""
        guidance, boundary = self.model.card.contract.guidance, self.layout.index.get("boundary_ratio")
        plain = type(guidance) is CFG
        if not guidance.active or (plain and guidance.scale > 1 and (guidance.low, guidance.high) == (0, 1)):
            return {"guidance_scale": guidance.scale}
        if plain and guidance.scale > 1 and (guidance.low, guidance.high) == (boundary, 1):
            return {"guidance_scale": guidance.scale, "guidance_scale_2": guidance.outside}
        raise ValueError(
            "diffusers guides at all times with a scale above 1, or with one for each expert, and the contract asks for "
            f"{guidance}"
        )

    def pages(self, source: str, home: str, *, lora: bool = False) -> dict[int, str]:
        """Lines of Python by step count: load `source`, with schedulers (and, if so, a LoRA) of the folder `home`."""
        return {n: self._code(n, source, home, lora=lora) for n in self.model.card.contract.counts}

    def _code(self, steps: int, source: str, home: str, *, lora: bool) -> str:
        exact, folder, names = self.exact(steps), self._folder(steps), {self.pipeline}
        types = self._types(lora=lora)
        given = ", ".join(f'"{name}": {kind}' for name, kind in types.items())
        lines = [
            f'pipe = {self.pipeline}.from_pretrained("{source}"' + (f", torch_dtype={{{given}}})" if types else ")")
        ]
        if lora:
            lines.append(f'pipe.load_lora_weights("{home}")')
            (_, *others) = file_names(tuple(self.original.networks), "diffusers", home).items()
            for network, file in others:
                lines.append(f'pipe.load_lora_weights("{home}", weight_name="{file}", load_into_{network}=True)')
        if lora or folder != _SCHEDULER:
            scheduler = type(exact.scheduler).__name__
            names.add(scheduler)
            lines.append(f'pipe.scheduler = {scheduler}.from_pretrained("{home}", subfolder="{folder}")')
        if lora and self.guider is not None:
            names.add("ClassifierFreeGuidance")
            lines.append(f"pipe.guider = ClassifierFreeGuidance(guidance_scale={self.guider.guidance_scale})")
        if exact.pinned:
            arguments = ", ".join(f"{key}={values!r}" for key, values in exact.pinned.items())
            lines.append("set_timesteps = pipe.scheduler.set_timesteps")
            lines.append("pipe.scheduler.set_timesteps = lambda *_, device=None, sigmas=None, timesteps=None, **__: (")
            lines.append(f"    set_timesteps(device=device, {arguments}))")
        imports = [*(["import torch"] if types else []), f"from diffusers import {', '.join(sorted(names))}"]
        return "\n".join([*imports, "", *lines, f"sampling = {self.options(steps)!r}"])

    def _types(self, *, lora: bool) -> dict[str, torch.dtype]:
        """In which type the pipeline shall load its networks: as each is stored; without those of float32, its default."""
        types = {name: self.layout.dtype(name) for name, entry in self.layout.index.items() if isinstance(entry, list)}
        if not lora:
            types |= dict.fromkeys(self.original.networks, getattr(torch, self.dtype))
        return {name: kind for name, kind in types.items() if kind not in (None, torch.float32)}

    def _folder(self, steps: int) -> str:
        return _SCHEDULER if steps == self.model.card.contract.steps else f"{_SCHEDULER}_{steps}"
