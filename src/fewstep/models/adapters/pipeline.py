"""One of our models as its own pipeline of diffusers, around the same weights: what its samples are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import (
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
)
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule
from PIL import Image
from torch import Tensor

from fewstep.core import Cond
from fewstep.diffusion import CFG, Betas, Contract, NoisePath, RectifiedFlow
from fewstep.models.adapters.cogvideox_image import CogVideoXImage
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.wan_image import WanImage
from fewstep.models.backbone import Original

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel

_BY_SIZE = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
"""Settings of a scheduler whose shift depends on the number of tokens."""


class NoCounterpart(Exception):
    """Diffusers has nothing that does the same, and why."""


class ExactSigmas(FlowMatchEulerDiscreteScheduler):
    """Diffusers' Euler solver on given times, whatever its pipeline asks for."""

    times: tuple[float, ...] = (1.0, 0.0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        super().set_timesteps(device=device, sigmas=list(self.times[:-1]))


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
        ddim = _ddim(scheduler)
        ddim.set_timesteps(steps)
        total = ddim.config.num_train_timesteps
        return (*((k + 1) / total for k in ddim.timesteps.tolist()), 0.0 if ddim.config.set_alpha_to_one else 1 / total)
    shift = scheduler.get("flow_shift", scheduler.get("shift", 1.0))
    euler = FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler), shift=shift)
    mu = calculate_shift(tokens, *(euler.config[key] for key in _BY_SIZE))
    euler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    return tuple(euler.sigmas.tolist())


def sample(
    model: VideoModel, layout: Layout, noise: Tensor, cond: Cond, uncond: Cond, steps: int,
    pictures: Mapping[str, Image.Image] = MappingProxyType({}),
) -> Tensor:  # fmt: skip
    """Latents that the layout's pipeline makes of `noise` with this model's weights, times and guidance, without its text
    encoder; of `pictures` by the pipeline's names for them. NoCounterpart says why it cannot make them.
    """
    original, contract = model.denoiser.backbone.original(), model.card.contract
    if original is None:
        raise NoCounterpart("this network is no class of diffusers")
    if isinstance(model.parts.get("image"), CogVideoXImage):
        raise NoCounterpart("diffusers' pipeline draws the latents of the image from their posterior")
    scheduler = _scheduler(model.denoiser.path, contract, layout.scheduler(), steps)
    pipeline = _pipeline(layout, original, model, scheduler)
    card = model.card
    offered = {
        "num_frames": card.num_frames, "height": card.height, "width": card.width, "num_inference_steps": steps,
        "latents": original.pack(noise), "output_type": "latent", "return_dict": False,
        "prompt_embeds": cond.text, "prompt_attention_mask": cond.mask, **cond.extra,
        **_guidance(contract.guidance, layout.index.get("boundary_ratio")),
        **pictures,
    }  # fmt: skip
    if contract.guidance.active:
        offered |= {"negative_prompt_embeds": uncond.text, "negative_prompt_attention_mask": uncond.mask}
        offered |= {f"negative_{name}": value for name, value in uncond.extra.items()}
    offered = {_named(name, original.names): value for name, value in offered.items()} | original.told
    known = inspect.signature(pipeline.__call__).parameters
    made: Tensor = pipeline(**{name: value for name, value in offered.items() if name in known})[0]
    return original.unpack(made, noise.shape)


def _named(name: str, names: Mapping[str, str]) -> str:
    """What the pipeline calls an argument, or the negative prompt's."""
    rest = name.removeprefix("negative_")
    return name.removesuffix(rest) + names.get(rest, rest)


def _guidance(guidance: CFG, boundary: float | None) -> dict[str, float]:
    if (guidance.low, guidance.high) == (0, 1):
        return {"guidance_scale": guidance.scale}
    if (guidance.low, guidance.high) == (boundary, 1):
        return {"guidance_scale": guidance.scale, "guidance_scale_2": guidance.outside}
    raise NoCounterpart("diffusers changes the guidance scale with the expert only")


def _scheduler(path: NoisePath, contract: Contract, settings: Mapping[str, Any], steps: int) -> Any:
    if isinstance(path, RectifiedFlow) and contract.solver == "euler":
        exact = ExactSigmas(num_train_timesteps=settings.get("num_train_timesteps", 1000))
        exact.times = contract.times(steps)
        return exact
    if isinstance(path, Betas) and contract.solver == "ddim" and not contract.grids:
        ddim = _ddim(settings)
        ddim.set_timesteps(steps)
        if (ddim.timesteps.diff() != -(ddim.config.num_train_timesteps // steps)).any():
            raise NoCounterpart(f"diffusers' DDIM does not step to its own next timestep at {steps} steps")
        return ddim
    raise NoCounterpart(f"diffusers has no scheduler for the solver {contract.solver} with these times on this path")


def _ddim(settings: Mapping[str, Any]) -> Any:
    return (CogVideoXDDIMScheduler if "snr_shift_scale" in settings else DDIMScheduler).from_config(settings)


def _pipeline(layout: Layout, original: Original, model: VideoModel, scheduler: Any) -> DiffusionPipeline:
    """The layout's pipeline with our networks; of what it asks for besides, the settings of the layout or nothing."""
    name = layout.index["_class_name"]
    kind = GivenNoise if name == LTXConditionPipeline.__name__ else getattr(diffusers, name)
    settings = {key: value for key, value in layout.index.items() if not isinstance(value, list)}
    guider = ClassifierFreeGuidance(guidance_scale=model.card.contract.guidance.scale)
    ours = {"scheduler": scheduler, "vae": model.codec.vae, "guider": guider, **original.networks}
    if isinstance(eye := model.parts.get("image"), WanImage):
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
