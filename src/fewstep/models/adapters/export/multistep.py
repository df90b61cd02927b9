"""Diffusers' multistep schedulers, for contracts that sample as they do."""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

from fewstep.diffusion import (
    Betas,
    Contract,
    DPMpp2M,
    FlowSchedule,
    Kind,
    MultistepTimesteps,
    NoisePath,
    RectifiedFlow,
    Sampler,
    Trained,
    UniPC,
    WholeTimesteps,
)

_CLASSES: dict[Sampler, tuple[type[SchedulerMixin], str]] = {
    UniPC(): (UniPCMultistepScheduler, "unipc"),
    DPMpp2M(): (DPMSolverMultistepScheduler, "dpm"),
}
"""Schedulers by sampler, and how `FlowSchedule` calls their times. Diffusers' UniPC with bh1 ends in NaN."""
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def multistep(path: NoisePath, kind: Kind, contract: Contract) -> SchedulerMixin | None:
    """The scheduler that makes the same clip for any number of steps; None if there is none."""
    sampler, grid = contract.sampler, contract.grid
    grid = grid.grid if isinstance(grid, Trained) else grid
    if isinstance(path, RectifiedFlow) and kind == "flow" and isinstance(sampler, WholeTimesteps):
        total, held = sampler.num_train_timesteps, sampler.sampler
        made, name = _CLASSES.get(held, (None, ""))
        if (
            made is None
            or not isinstance(grid, FlowSchedule)
            or (grid.scheduler, grid.num_train_timesteps) != (name, total)
        ):
            return None
        return made(
            num_train_timesteps=total, use_flow_sigmas=True, flow_shift=grid.shift, prediction_type="flow_prediction"
        )
    if sampler not in _CLASSES or not isinstance(path, Betas) or not isinstance(grid, MultistepTimesteps):
        return None
    plain = (path.zero_snr, path.snr_shift, path.num_train_timesteps) == (False, 1.0, grid.num_train_timesteps)
    if kind not in _PREDICTIONS or not plain:
        return None
    settings: dict[str, Any] = {
        "num_train_timesteps": path.num_train_timesteps, "beta_start": path.beta_start, "beta_end": path.beta_end,
        "beta_schedule": path.schedule, "prediction_type": _PREDICTIONS[kind], "timestep_spacing": grid.spacing,
        "steps_offset": grid.steps_offset,
    }  # fmt: skip
    return _CLASSES[sampler][0](**settings)
