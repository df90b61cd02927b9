"""A diffusers pipeline around a model's own weights, to compare samples with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    SchedulerMixin,
)
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule
from PIL import Image
from torch import Tensor

from fewstep.core import Cond
from fewstep.models.adapters.conditions.wan_image import WanImage
from fewstep.models.adapters.export.usage import Usage
from fewstep.models.adapters.layout import Layout

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel

_BY_SIZE = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
"""Settings of a scheduler whose shift depends on the number of tokens."""


class NoCounterpart(Exception):
    """Diffusers has nothing that does the same, and why."""


class GivenNoise(LTXConditionPipeline):
    """Diffusers' pipeline, which would draw noise of its own, from given latents."""

    def prepare_latents(self, *given: Any, latents: Tensor | None = None, **named: Any) -> Any:
        _, *rest = super().prepare_latents(*given, latents=latents, **named)
        return latents, *rest


def recommended_times(layout: Layout, steps: int, tokens: int) -> tuple[float, ...]:
    """The times of `steps` steps by a layout's scheduler, for a clip of so many tokens: our t, from noise to data.

    A flow model's are those of its authors, the uniform grid under the scheduler's shift; diffusers' own solvers begin or
    end that grid a little off, each in its way.
    """
    scheduler = layout.scheduler()
    if layout.index["_class_name"] == LTXConditionPipeline.__name__:
        return (*linear_quadratic_schedule(steps).tolist(), 0.0)
    if "beta_schedule" in scheduler and not scheduler.get("use_flow_sigmas"):
        ddim: Any = CogVideoXDDIMScheduler if "snr_shift_scale" in scheduler else DDIMScheduler
        ddim = ddim.from_config(scheduler)
        ddim.set_timesteps(steps)
        total = ddim.config.num_train_timesteps
        return (*((k + 1) / total for k in ddim.timesteps.tolist()), 0.0 if ddim.config.set_alpha_to_one else 1 / total)
    shift = scheduler.get("flow_shift", scheduler.get("shift", 1.0))
    euler = FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler), shift=shift)
    mu = calculate_shift(tokens, *(euler.config[key] for key in _BY_SIZE))
    euler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    return tuple(euler.sigmas.tolist())


def scheduled_times(layout: Layout, steps: int) -> tuple[float, ...]:
    """The times that a layout's multistep or flow scheduler visits when a pipeline asks for `steps` steps: our t."""
    scheduler = getattr(diffusers, layout.index["scheduler"][1]).from_config(layout.scheduler())
    scheduler.set_timesteps(steps)
    if "beta_schedule" in scheduler.config and not scheduler.config.get("use_flow_sigmas"):
        return (*((k + 1) / scheduler.config.num_train_timesteps for k in scheduler.timesteps.tolist()), 0.0)
    return tuple(scheduler.sigmas.tolist())


def sample(
    model: VideoModel, layout: Layout, noise: Tensor, cond: Cond, uncond: Cond, steps: int,
    pictures: Mapping[str, Image.Image] = MappingProxyType({}),
) -> Tensor:  # fmt: skip
    """Latents that the layout's pipeline makes of `noise` with this model's weights, times and guidance, without its text
    encoder; of `pictures` by the pipeline's names for them. NoCounterpart says why it cannot make them.
    """
    try:
        usage = Usage(model, layout)
        scheduler = usage.exact(steps).pin()
    except ValueError as reason:
        raise NoCounterpart(str(reason)) from reason
    original, options = usage.original, usage.options(steps)
    options.pop("negative_prompt", None)
    offered = {"prompt_embeds": cond.text, "prompt_attention_mask": cond.mask, **cond.extra, **pictures}
    if model.card.contract.guidance.active:
        offered |= {"negative_prompt_embeds": uncond.text, "negative_prompt_attention_mask": uncond.mask}
        offered |= {f"negative_{name}": value for name, value in uncond.extra.items()}
    offered = {_named(name, original.names): value for name, value in offered.items()}
    options |= {name: value for name, value in offered.items() if name in usage.known}
    pipeline: Any = _pipeline(usage, scheduler)
    made: Tensor = pipeline(latents=original.pack(noise), output_type="latent", return_dict=False, **options)[0]
    return original.unpack(made, noise.shape)


def _named(name: str, names: Mapping[str, str]) -> str:
    """What the pipeline calls a condition, or the negative prompt's."""
    rest = name.removeprefix("negative_")
    return name.removesuffix(rest) + names.get(rest, rest)


def _pipeline(usage: Usage, scheduler: SchedulerMixin) -> DiffusionPipeline:
    """The layout's pipeline with our networks; of what it asks for besides, the settings of the layout or nothing."""
    kind = GivenNoise if usage.pipeline == LTXConditionPipeline.__name__ else getattr(diffusers, usage.pipeline)
    settings = {key: value for key, value in usage.layout.index.items() if not isinstance(value, list)}
    ours = {"scheduler": scheduler, "vae": usage.model.codec.vae, "guider": usage.guider, **usage.original.networks}
    if isinstance(eye := usage.model.parts.get("image"), WanImage):
        ours |= {"image_encoder": eye.encoder, "image_processor": eye.processor}
    parts = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name in ours or name in settings:
            parts[name] = ours.get(name, settings.get(name))
        elif name != "self" and parameter.default is inspect.Parameter.empty:
            parts[name] = None
    pipeline: DiffusionPipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
