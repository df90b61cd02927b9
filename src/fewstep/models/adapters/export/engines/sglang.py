"""SGLang's diffusion server: its pipeline of Wan students that draw fresh noise between their steps.

`WanDMDPipeline` takes whole timesteps. It looks each of them up in a table of a thousand noise levels, those of shift 8
whatever the flags say, and takes the nearest: so not every level can be had.
"""

from __future__ import annotations

import math

from fewstep.models.adapters.export.engines.plan import Plan
from fewstep.models.adapters.export.engines.student import TRAIN_TIMESTEPS, Student

RUNS = "text-to-video Wan 2.1 of one network"
SHIFT = 8.0
"""Of the pipeline's own table."""
NEAR = 1 / TRAIN_TIMESTEPS
"""A level that is further from the student's, by more than one timestep, is another one."""
_SOURCES = (
    "sgl-project/sglang, python/sglang/multimodal_gen/runtime/pipelines/wan_dmd_pipeline.py, version 0e73a13: the pipeline",
    "runtime/pipelines_core/stages/denoising_dmd.py, version 020befb: whole timesteps, the table of shift 8, one network",
    "configs/pipeline_configs/base.py, version 035bf19: the flags --dmd-denoising-steps and --flow-shift",
    "configs/pipeline_configs/wan.py, version 055e950: FastWan2_1_T2V_480P_Config, which folders with this pipeline get",
)
_NOTES = (
    "Give both flags: without --dmd-denoising-steps the server takes 1000, 757 and 522. --flow-shift is the table's own shift, "
    "in case another release takes it from there.",
    "The pipeline calls the network with the prompt alone: a guidance scale or a negative prompt in a request changes nothing.",
)


def sglang(student: Student) -> Plan:
    """The layout of diffusers, whose `model_index.json` names the pipeline; the timesteps are a flag.

    ValueError for a student that it would sample in another way.
    """
    student.require_wan("sglang", RUNS)
    card = student.card
    if student.boundary is not None or student.reads_image or student.layout.index.get("expand_timesteps"):
        problem = f"its few-step pipeline is for {RUNS}, and {card.name} is more than that"
        raise student.refused("sglang", problem, ["vllm-omni"])
    if len(student.times) > 2 and not student.fresh_noise:
        problem = (
            f"{card.name} makes {type(card.contract.sampler).__name__} steps; its few-step pipeline draws fresh noise between "
            "steps, and its other one samples with UniPC"
        )
        raise student.refused("sglang", problem, ["vllm-omni", "lightx2v"])
    timesteps = [_nearest(time) for time in student.times[:-1]]
    visited = (*(level(timestep) for timestep in timesteps), 0.0)
    for ours, theirs in zip(student.times, visited):
        if abs(ours - theirs) > NEAR:
            problem = (
                f"its table has no noise level nearer to {ours:g}, which {card.name} was trained for, than {theirs:.6g}"
            )
            raise student.refused("sglang", problem, ["vllm-omni"])
    steps = ",".join(map(str, timesteps))
    return Plan(
        names="diffusers",
        index={"_class_name": "WanDMDPipeline"},
        command=(
            f"sglang serve --model-path ./{student.title} --dmd-denoising-steps {steps} --flow-shift {SHIFT:g} --port 30000"
        ),
        request=(
            "curl -sS http://localhost:30000/v1/videos -H 'Content-Type: application/json' -d "
            f'\'{{"prompt": "a cat", "size": "{student.size}", "num_frames": {card.num_frames}, "fps": {card.fps:g}, '
            f'"num_inference_steps": {len(timesteps)}, "guidance_scale": 1.0, "seed": 0}}\''
        ),
        visited=visited,
        sources=_SOURCES,
        notes=_NOTES,
    )


def level(timestep: int) -> float:
    """The noise level that the pipeline's table has nearest to a timestep: `8 s / (1 + 7 s)` for a whole number of
    thousandths s."""
    table = (SHIFT * k / (TRAIN_TIMESTEPS + (SHIFT - 1) * k) for k in range(1, TRAIN_TIMESTEPS + 1))
    return min(table, key=lambda found: abs(found * TRAIN_TIMESTEPS - timestep))


def _nearest(time: float) -> int:
    """The timestep whose level is nearest to a time."""
    exact = time * TRAIN_TIMESTEPS
    return min({max(1, math.floor(exact)), math.ceil(exact)}, key=lambda whole: abs(level(whole) - time))
