"""vLLM-Omni: its pipelines of students that are sampled at fixed timesteps, which `model_index.json` has.

`WanT2VDMD2Pipeline` and `WanI2VDMD2Pipeline` read the block `dmd2_config`. They visit the level of every timestep divided by a
thousand (shift 1) by Euler steps (`ode`), or by x0 and fresh noise (`sde`), and take no other step count or guidance from
requests.
"""

from __future__ import annotations

import numpy as np

from fewstep.models.adapters.export.engines.plan import Plan
from fewstep.models.adapters.export.engines.student import TRAIN_TIMESTEPS, Student

RUNS = "Wan 2.1 and 2.2 (text-to-video, image-to-video, two experts)"
_SOURCES = (
    "vllm-project/vllm-omni, pull request 2749 (13 April 2026): the pipelines of distilled students",
    "vllm_omni/diffusion/models/dmd2/config.py, version 36c5bc6: the keys of dmd2_config",
    "vllm_omni/diffusion/models/dmd2/mixin.py, version 23852d8: the scheduler, and what of a request is ignored",
    "vllm_omni/diffusion/models/schedulers/scheduling_dmd2_euler.py, version a73f65c: timesteps, without a shift",
    "vllm_omni/diffusion/registry.py, version 00218e1: the names of the pipelines",
    "vllm_omni/entrypoints/openai/protocol/videos.py, version 079d7a5: the fields of a request",
)
_NOTES = (
    "The server keeps to this contract: it ignores the steps and the guidance of a request, and says so in its log.",
    "Releases before the block `dmd2_config` (its pull request 2749 read `dmd2_denoising_timesteps` and others at the top of "
    "model_index.json) would fall back to timesteps of their own: the server's log at the first request must show the number "
    "of steps above.",
    "In version 23852d8 the mixin passes guidance_scale and num_inference_steps to a `forward` which, in version 0027c20 of "
    "pipeline_wan2_2.py, takes the request alone. A release in which the two stand together fails at the first request with a "
    "TypeError: take another one.",
)


def vllm_omni(student: Student) -> Plan:
    """The layout of diffusers, whose `model_index.json` names the pipeline and its timesteps.

    ValueError for a student that it would sample in another way.
    """
    student.require_wan("vllm-omni", RUNS)
    card = student.card
    if student.reads_image and student.layout.index.get("expand_timesteps"):
        raise student.refused(
            "vllm-omni",
            f"{card.name} reads its picture as a clean first frame (expand_timesteps), and it is not known that the pipelines "
            "of distilled students do so, too",
            [],
        )
    timesteps = [time * TRAIN_TIMESTEPS for time in student.times[:-1]]
    config = {
        "num_inference_steps": len(timesteps), "denoising_timesteps": [_number(value) for value in timesteps],
        "solver": "sde" if student.fresh_noise else "ode", "guidance_scale": 1.0,
    }  # fmt: skip
    kind = "WanI2VDMD2Pipeline" if student.reads_image else "WanT2VDMD2Pipeline"
    # Without the flag it takes 0.875; a folder with one network has no other to switch to.
    boundary = 0.0 if student.boundary is None else student.boundary
    picture = '-F "input_reference=@picture.png" ' if student.reads_image else ""
    return Plan(
        names="diffusers",
        index={"_class_name": kind, "dmd2_config": config},
        command=f"vllm serve ./{student.title} --omni --port 8091 --boundary-ratio {boundary:g}",
        request=(
            f'curl -sS http://localhost:8091/v1/videos -F "prompt=a cat" {picture}-F size={student.size} '
            f"-F num_frames={card.num_frames} -F fps={card.fps:g} -F seed=0"
        ),
        visited=levels(timesteps),
        sources=_SOURCES,
        notes=_NOTES,
    )


def levels(timesteps: list[float]) -> tuple[float, ...]:
    """Noise levels of `FlowMatchEulerDiscreteScheduler(shift=1).set_timesteps(timesteps=...)`, in its float32."""
    visited = np.array(timesteps, np.float32) / np.float32(TRAIN_TIMESTEPS)
    return (*visited.tolist(), 0.0)


def _number(value: float) -> float:
    """Whole numbers without a point, as configuration files have them."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
