"""DDPM-trained models: table, prediction and timesteps from a diffusers scheduler, and cards of U-Nets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fewstep.core import Call, RecipeError
from fewstep.diffusion import CFG, DDIM, Betas, Contract, Kind, Timesteps
from fewstep.models.adapters.layout import Layout
from fewstep.models.card import Card
from fewstep.models.spec import Spec

_KINDS: Mapping[str, Kind] = MappingProxyType({"epsilon": "eps", "v_prediction": "v", "sample": "x0"})
_SCHEDULES = ("linear", "scaled_linear")
_REFUSED = ("trained_betas", "clip_sample", "thresholding")


def card_of(layout: Layout, family: str, *, num_frames: int, steps: int, licence: str) -> Card:
    """A U-Net of `family` with CLIP's text encoder and an image autoencoder, at the size it was trained on."""
    scheduler, unet, vae = layout.scheduler(), layout.config("unet"), layout.config("vae")
    size = (unet.get("sample_size") or 64) * 2 ** (len(vae["block_out_channels"]) - 1)
    patch = 2 ** (len(unet["block_out_channels"]) - 1)
    path = path_of(scheduler)
    return Card(
        name=Path(layout.source).name,
        parts={
            "denoiser": Spec(family, {"config": unet, "num_train_timesteps": path.num_train_timesteps}),
            "text": Spec("ClipText", {"config": layout.config("text_encoder"), "dtype": "float32"}),
            "codec": Spec("FrameCodec", {"config": vae, "patch": patch, "tiling": False, "chunk": 16}),
        },
        sources=dict.fromkeys(("denoiser", "text", "codec"), layout.source),
        path=path,
        kind=kind_of(scheduler),
        contract=contract_of(scheduler, steps=steps, scale=7.5),
        num_frames=num_frames, height=size, width=size, fps=8,
        provenance={"source": layout.source, "licence": licence},
    )  # fmt: skip


def require_whole_clips(name: str, x: Tensor, t: Tensor, call: Call) -> None:
    """ValueError for a time per frame or a cache, neither of which a network called `name` was trained with."""
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"{name} was trained with one time per clip: t must be [{len(x)}], got {tuple(t.shape)}; give whole clips one "
            "time, or take a model whose frames have their own (Wan, LTX)"
        )
    if call.kv is not None:
        raise ValueError(f"{name} sees whole clips and has no cache; call it without kv")
    if call.causal is not None:
        raise ValueError(
            f"{name} sees whole clips, not chunks; call it without causal (leave out the history of a method)"
        )


def path_of(scheduler: Mapping[str, Any]) -> Betas:
    """The noise table. RecipeError where it is of another kind, or samples would be clipped."""
    for key in _REFUSED:
        if scheduler.get(key):
            raise RecipeError(f"scheduler_config.json: {key}: {scheduler[key]!r} is not for latents; set it to null")
    schedule = scheduler.get("beta_schedule")
    if schedule not in _SCHEDULES:
        raise RecipeError(
            f"scheduler_config.json: beta_schedule: {schedule!r} cannot be read; these can: {', '.join(_SCHEDULES)}"
        )
    return Betas(
        num_train_timesteps=scheduler["num_train_timesteps"],
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
        schedule=schedule,
        snr_shift=scheduler.get("snr_shift_scale", 1.0),
        zero_snr=scheduler.get("rescale_betas_zero_snr", False),
    )


def kind_of(scheduler: Mapping[str, Any]) -> Kind:
    """What the network predicts."""
    found = scheduler.get("prediction_type", "epsilon")
    if found not in _KINDS:
        raise RecipeError(
            f"scheduler_config.json: prediction_type: {found!r} is unknown; choose one of {', '.join(_KINDS)}"
        )
    return _KINDS[found]


def contract_of(scheduler: Mapping[str, Any], *, steps: int, scale: float) -> Contract:
    """DDIM over the scheduler's timesteps, whichever sampler it is itself, with guidance of strength `scale`."""
    grid = Timesteps(
        spacing=scheduler.get("timestep_spacing", "leading"),
        num_train_timesteps=scheduler["num_train_timesteps"],
        steps_offset=scheduler.get("steps_offset", 0),
        ends_clean=scheduler.get("set_alpha_to_one", True),
    )
    return Contract(grid=grid, sampler=DDIM(), steps=steps, guidance=CFG(scale=scale))
