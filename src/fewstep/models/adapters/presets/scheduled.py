"""The sampler and times of a layout's own scheduler, as its pipeline in diffusers uses it.

Facts from github.com/huggingface/diffusers, src/diffusers/schedulers/: scheduling_unipc_multistep.py,
scheduling_dpmsolver_multistep.py, scheduling_flow_match_euler_discrete.py, scheduling_ddim.py, scheduling_ddim_cogvideox.py,
scheduling_dpm_cogvideox.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fewstep.core import RecipeError
from fewstep.diffusion import (
    Contract,
    DPMpp2M,
    Euler,
    FixedStride,
    FlowSchedule,
    MultistepTimesteps,
    Sampler,
    SDEDPMpp2M,
    TimeGrid,
    Timesteps,
    UniPC,
    WholeTimesteps,
)
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.presets.facts import Preset

_GIVES_TIMES = frozenset({"LTXPipeline", "LTXConditionPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline"})
"""Pipelines that give their scheduler the times of the card itself."""
_MULTISTEP: Mapping[str, Any] = MappingProxyType({
    "solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero", "thresholding": False,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_dynamic_shifting": False,
    "rescale_betas_zero_snr": False,
})  # fmt: skip
"""Settings that are followed, and must be so; they are diffusers' defaults."""
_UNIPC: Mapping[str, Any] = MappingProxyType(
    {**_MULTISTEP, "solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "shift_terminal": None}
)
_DPM: Mapping[str, Any] = MappingProxyType({
    **_MULTISTEP, "solver_type": "midpoint", "algorithm_type": "dpmsolver++", "euler_at_final": False,
    "use_lu_lambdas": False, "lambda_min_clipped": float("-inf"), "variance_type": None,
})  # fmt: skip


def preset(layout: Layout) -> Preset:
    """The preset `layout`. RecipeError for a scheduler that fewstep cannot follow."""
    name, settings = layout.index["scheduler"][1], layout.scheduler()
    if name not in _READ:
        raise RecipeError(
            f"preset: layout: {layout.source} has a {name}, which no sampler follows; these can be followed: "
            f"{', '.join(_READ)}. Leave the preset out: the card's own sampler then visits the scheduler's times"
        )

    def contract(own: Contract) -> Contract:
        if name == "FlowMatchEulerDiscreteScheduler" and layout.index["_class_name"] in _GIVES_TIMES:
            return own
        sampler, grid = _READ[name](settings)
        return replace(own, sampler=sampler, grid=grid)

    contract(Contract())  # refuses what it must at once
    return Preset(contract=contract, source=f"{name} of the layout")


def _unipc(settings: Mapping[str, Any]) -> tuple[Sampler, TimeGrid]:
    _require(settings, _UNIPC)
    return _multistep(settings, UniPC(), "unipc")


def _dpm(settings: Mapping[str, Any]) -> tuple[Sampler, TimeGrid]:
    _require(settings, _DPM)
    return _multistep(settings, DPMpp2M(), "dpm")


def _multistep(settings: Mapping[str, Any], sampler: Sampler, name: Any) -> tuple[Sampler, TimeGrid]:
    total = settings.get("num_train_timesteps", 1000)
    if settings.get("use_flow_sigmas"):
        grid = FlowSchedule(scheduler=name, shift=float(settings.get("flow_shift", 1.0)), num_train_timesteps=total)
        return WholeTimesteps(sampler=sampler, num_train_timesteps=total), grid
    return sampler, MultistepTimesteps(
        spacing=settings.get("timestep_spacing", "linspace"),
        num_train_timesteps=total,
        steps_offset=settings.get("steps_offset", 0) if settings.get("timestep_spacing") == "leading" else 0,
    )


def _euler(settings: Mapping[str, Any]) -> tuple[Sampler, TimeGrid]:
    _require(settings, {"shift_terminal": None, "use_dynamic_shifting": False, "stochastic_sampling": False})
    total = settings.get("num_train_timesteps", 1000)
    shift = float(settings.get("shift", 1.0))
    return Euler(), FlowSchedule(scheduler="euler", shift=shift, num_train_timesteps=total)


def _ddim(settings: Mapping[str, Any]) -> tuple[Sampler, TimeGrid]:
    total, clean = settings.get("num_train_timesteps", 1000), settings.get("set_alpha_to_one", True)
    grid = Timesteps(
        spacing=settings.get("timestep_spacing", "leading"), num_train_timesteps=total,
        steps_offset=settings.get("steps_offset", 0), ends_clean=clean,
    )  # fmt: skip
    return FixedStride(num_train_timesteps=total, ends_clean=clean), grid


def _sde(settings: Mapping[str, Any]) -> tuple[Sampler, TimeGrid]:
    _require(settings, {"set_alpha_to_one": True})
    total = settings.get("num_train_timesteps", 1000)
    spacing, offset = settings.get("timestep_spacing", "leading"), settings.get("steps_offset", 0)
    grid = Timesteps(spacing=spacing, num_train_timesteps=total, steps_offset=offset)
    return SDEDPMpp2M(stride=total), grid


def _require(settings: Mapping[str, Any], followed: Mapping[str, Any]) -> None:
    for key, value in followed.items():
        if settings.get(key, value) not in (value, str(value)):
            raise RecipeError(
                f"scheduler_config.json: {key}: {settings[key]!r} cannot be followed with the preset layout; only {value!r} "
                "can. Leave the preset out"
            )


_READ: Mapping[str, Callable[[Mapping[str, Any]], tuple[Sampler, TimeGrid]]] = MappingProxyType({
    "UniPCMultistepScheduler": _unipc, "DPMSolverMultistepScheduler": _dpm, "FlowMatchEulerDiscreteScheduler": _euler,
    "DDIMScheduler": _ddim, "CogVideoXDDIMScheduler": _ddim, "CogVideoXDPMScheduler": _sde,
})  # fmt: skip
"""Schedulers of diffusers, and what follows them."""
