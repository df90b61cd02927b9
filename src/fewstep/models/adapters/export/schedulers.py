"""Diffusers schedulers that visit exactly the times of a contract and take exactly its sampler's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)

from fewstep.diffusion import (
    DDIM,
    Betas,
    Contract,
    Euler,
    FixedStride,
    Kind,
    NoisePath,
    RectifiedFlow,
    Renoise,
    Sampler,
    TimeGrid,
    Timesteps,
)
from fewstep.models.adapters.export.multistep import multistep

_PREDICTIONS = MappingProxyType({"eps": "epsilon", "v": "v_prediction", "x0": "sample"})
_NEAR = 1e-6
"""Two times of float32 are the same."""
_NO_SKIP = 1e5
"""Diffusers' LCM mixes `x_t` into x0 by `0.25 / (this k)^2`: nothing that float32 could hold, from timestep 1 on."""


@dataclass(frozen=True)
class ExactScheduler:
    """A scheduler that does what a contract says."""

    scheduler: SchedulerMixin
    pinned: dict[str, list[float]] = field(default_factory=dict)
    """Arguments for its `set_timesteps`; empty if the pipeline's own call is enough."""

    def pin(self) -> SchedulerMixin:
        """The scheduler itself, which from now on visits its times whatever a pipeline asks for."""
        set_timesteps: Any = self.scheduler.set_timesteps  # type: ignore[attr-defined]
        if self.pinned:
            # Pipelines look whether there is such an argument before they give it.
            self.scheduler.set_timesteps = lambda *_, device=None, sigmas=None, timesteps=None, **__: set_timesteps(  # type: ignore[attr-defined]
                device=device, **self.pinned
            )
        return self.scheduler


def exact_scheduler(
    path: NoisePath, kind: Kind, contract: Contract, steps: int, *, uniform: bool = False
) -> ExactScheduler:
    """The diffusers scheduler that makes the same clip in `steps` steps, for a pipeline that takes a number of steps, or for
    a `uniform` grid with that number.

    ValueError if diffusers has no such scheduler.
    """
    times, sampler = contract.times(steps), contract.sampler
    if contract.grid.video_noise is not None:
        raise ValueError(
            "diffusers has no scheduler that does what this student needs, which begins with the latents of a video and not with "
            "noise; a folder of fewstep's own keeps it exactly"
        )
    if not uniform and (scheduler := multistep(path, kind, contract)) is not None:
        return ExactScheduler(scheduler)
    if isinstance(path, RectifiedFlow) and kind == "flow" and sampler in _STOCHASTIC and times[0] == 1:
        return _flow(times, stochastic=_STOCHASTIC[sampler], uniform=uniform)
    if isinstance(path, Betas) and kind in _PREDICTIONS:
        table = _Table(path, _PREDICTIONS[kind], contract.grid, [_level(t, path) for t in times])
        if isinstance(sampler, FixedStride):
            made = _ddim(table, any_spacing=True) if sampler == _stride_of(table) else None
            if made is not None:
                return made
        for make in _SCHEDULERS.get(sampler, ()):
            if (found := make(table)) is not None:
                return found
    raise ValueError(
        f"diffusers has no scheduler that does what {type(sampler).__name__} does on {type(path).__name__} at the times "
        f"{list(times)} with a network that predicts {kind}; a folder of fewstep's own keeps this student exactly"
    )


def _level(t: float, path: Betas) -> float:
    """The timestep; a whole one where float32 cannot tell it from that."""
    level = t * path.num_train_timesteps - 1
    return round(level) if abs(level - round(level)) < _NEAR * path.num_train_timesteps else level


def _flow(times: tuple[float, ...], *, stochastic: bool, uniform: bool) -> ExactScheduler:
    """Euler in t, or x0 and fresh noise: one class of diffusers, whose grid has two numbers to turn."""
    steps = len(times) - 1
    plain: dict[str, Any] = {"shift": 1.0, "stochastic_sampling": stochastic}
    scheduler = FlowMatchEulerDiscreteScheduler(**(plain | _stretch(times, uniform)))
    scheduler.set_timesteps(
        **({"sigmas": [1 - k / steps for k in range(steps)]} if uniform else {"num_inference_steps": steps})
    )
    if all(abs(sigma - t) < _NEAR for sigma, t in zip(scheduler.sigmas.tolist(), times, strict=True)):
        return ExactScheduler(scheduler)
    return ExactScheduler(FlowMatchEulerDiscreteScheduler(**plain), {"sigmas": list(times[:-1])})


def _stretch(times: tuple[float, ...], uniform: bool) -> dict[str, float]:
    """Settings under which diffusers' grid is `times`, if it can be: every shifted uniform grid can.

    It shifts times that are uniform between 1 and its smallest (`1 / steps` of a `uniform` grid), then stretches the
    distances from 1 so that the last is `shift_terminal`. With `w_k = 1 - t_k` that makes `k / w_k` a line in k, whose slope
    fixes the shift.
    """
    count = len(times) - 1
    if count == 1:
        return {}
    ratio = [k / (1 - times[k]) for k in range(1, count)]
    slope = (ratio[-1] - ratio[0]) / (count - 2) if count > 2 else 0.0
    start, shift = ratio[0] - slope, 1.0
    for _ in range(30):  # diffusers' own smallest time depends on the shift, very little
        smallest = 1 / count if uniform else 1 / (1 + 999 / shift)
        bend = -slope / start * (count - 1) / (1 - smallest)
        if bend >= 1:
            return {}
        shift = 1 / (1 - bend)
    return {"shift": shift, "shift_terminal": times[-2]}


@dataclass(frozen=True)
class _Table:
    """A model that knows a table of noise levels, and the levels to visit."""

    path: Betas
    prediction: str
    grid: TimeGrid
    levels: list[float]


def _stride_of(table: _Table) -> FixedStride:
    """The sampler that is diffusers' DDIM for this table and end."""
    return FixedStride(num_train_timesteps=table.path.num_train_timesteps, ends_clean=table.levels[-1] < 0)


def _ddim(table: _Table, *, any_spacing: bool = False) -> ExactScheduler | None:
    """Diffusers' DDIM moves down by one number of levels, whatever timestep comes next; `any_spacing` wants just that."""
    path, levels = table.path, table.levels
    asked, steps = table.grid if isinstance(table.grid, Timesteps) else Timesteps(), len(levels) - 1
    settings = _schedule(path, table.prediction) | {
        "rescale_betas_zero_snr": path.zero_snr, "set_alpha_to_one": levels[-1] < 0, "clip_sample": False,
        "timestep_spacing": asked.spacing, "steps_offset": asked.steps_offset,
    }  # fmt: skip
    if path.snr_shift == 1.0:
        scheduler: Any = DDIMScheduler(**settings)
    else:
        scheduler = CogVideoXDDIMScheduler(**settings, snr_shift_scale=path.snr_shift)
    scheduler.set_timesteps(steps)
    stride = path.num_train_timesteps // steps
    even = all(a - b == stride for a, b in pairwise(levels[:-1])) and levels[-2] < stride
    return ExactScheduler(scheduler) if (even or any_spacing) and scheduler.timesteps.tolist() == levels[:-1] else None


def _euler(table: _Table) -> ExactScheduler | None:
    """DDIM is Euler in s / a, from any level to any other, where that is finite.

    Between two levels s / a is interpolated, where the path interpolates `atan(s / a)`: within 1e-5 of it.
    """
    path, levels = table.path, table.levels
    if path.zero_snr or path.snr_shift != 1.0 or levels[-2] < 0:
        return None
    end = "zero" if levels[-1] < 0 else "sigma_min"
    settings = _schedule(path, table.prediction) | {"timestep_spacing": "leading", "final_sigmas_type": end}
    return ExactScheduler(EulerDiscreteScheduler(**settings), _pinned(levels))


def _tcd(table: _Table) -> ExactScheduler | None:
    """With `eta = 0`, which is what pipelines ask for, this is DDIM from any level to any other, and at last to level 0.

    Where the clip ends clean, that level, at which no step begins, is made clean.
    """
    path, levels = table.path, table.levels
    clean = levels[-1] < 0
    if (clean and levels[-2] < 1) or any(level % 1 for level in levels):
        return None
    return ExactScheduler(
        TCDScheduler(**_betas(path, table.prediction, clean=clean), original_inference_steps=path.num_train_timesteps),
        _pinned(levels),
    )


def _lcm(table: _Table) -> ExactScheduler | None:
    """x0 and fresh noise of the next level; x0 itself at the end."""
    path, levels = table.path, table.levels
    if levels[-1] >= 0 or levels[-2] < 1 or any(level % 1 for level in levels):
        return None
    if path.snr_shift == 1.0:
        settings = _schedule(path, table.prediction) | {"rescale_betas_zero_snr": path.zero_snr}
    else:
        settings = _betas(path, table.prediction)
    settings |= {
        "original_inference_steps": path.num_train_timesteps, "timestep_scaling": _NO_SKIP, "clip_sample": False,
    }  # fmt: skip
    scheduler = LCMScheduler(**settings)
    scheduler.set_timesteps(len(levels) - 1)
    own = scheduler.timesteps.tolist() == levels[:-1]
    return ExactScheduler(LCMScheduler(**settings), {} if own else _pinned(levels))


_STOCHASTIC: Mapping[Sampler, bool] = MappingProxyType({Euler(): False, DDIM(): False, Renoise(): True})
"""Samplers that diffusers has for flow models, and whether they draw noise between steps."""
_SCHEDULERS: Mapping[Sampler, tuple[Callable[[_Table], ExactScheduler | None], ...]] = MappingProxyType({
    DDIM(): (_ddim, _euler, _tcd), Renoise(): (_lcm,),
})  # fmt: skip
"""What may do for a table of noise levels, the plainest first. A sampler that is not listed has no scheduler in diffusers."""


def _schedule(path: Betas, prediction: str) -> dict[str, Any]:
    """The noise table as the numbers it was made from."""
    return {
        "num_train_timesteps": path.num_train_timesteps, "beta_start": path.beta_start, "beta_end": path.beta_end,
        "beta_schedule": path.schedule, "prediction_type": prediction,
    }  # fmt: skip


def _betas(path: Betas, prediction: str, *, clean: bool = False) -> dict[str, Any]:
    """The noise table itself, as betas: schedulers that know neither its shift nor pure noise take that."""
    count = path.num_train_timesteps
    t = torch.arange(1, count + 1, dtype=torch.float64) / count
    signal = path.coeffs(t).a.square()
    if clean:
        signal[0] = 1.0
    before = torch.cat([signal.new_ones(1), signal[:-1]])
    return {
        "num_train_timesteps": count, "trained_betas": (1 - signal / before).tolist(), "prediction_type": prediction,
    }  # fmt: skip


def _pinned(levels: list[float]) -> dict[str, list[float]]:
    return {"timesteps": [float(k) for k in levels[:-1]]}
