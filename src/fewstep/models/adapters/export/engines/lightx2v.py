"""LightX2V: one file of weights by the names of Wan's authors, and a configuration with `denoising_step_list`.

Its step-distilled schedulers take whole timesteps x and visit the levels `shift s / (1 + (shift - 1) s)` of s = x / 1000 by
Euler steps. Two experts change at a step (`boundary_step_index`). Text encoder, codec and tokenizer come from the folder that
Wan's authors published.
"""

from __future__ import annotations

import json
from typing import Any

from fewstep.models.adapters.export.engines.plan import Plan
from fewstep.models.adapters.export.engines.student import TRAIN_TIMESTEPS, Student
from fewstep.models.adapters.lora_file import file_names

RUNS = "Wan 2.1 and 2.2 A14B (text-to-video and image-to-video)"
CONFIG = "lightx2v.json"
SHIFTS = (1.0, 3.0, 5.0, 8.0, 12.0)
"""Shifts to try first: those that published students have."""
NEAR = 2.5e-4
"""Noise levels that differ by no more are the same: a quarter of a timestep."""
_SOURCES = (
    "ModelTC/LightX2V, commit f8aee98 (21 August 2026)",
    "lightx2v/models/schedulers/wan/step_distill/scheduler.py: the noise levels and the steps",
    "lightx2v/models/runners/wan/wan_distill_runner.py and wan_runner.py: the experts, and the files of the base model",
    "lightx2v/models/networks/base_model.py and wan/weights: the file of weights and the names in it",
    "lightx2v/utils/set_config.py, lightx2v/server: the configuration and the command",
)
_NOTES = (
    "MODEL is the folder that Wan's authors published of the same model (not the one in diffusers' layout): the engine takes "
    "text encoder, codec and tokenizer from there, and they must be the unchanged ones.",
    "Other kernels of attention than torch's own (flash_attn3, sage_attn2) are names in the configuration, if they are "
    "installed.",
    "A request's infer_steps changes nothing: the list in the configuration counts.",
)


def lightx2v(student: Student) -> Plan:
    """The denoiser as files, and the configuration that samples it as it was trained.

    ValueError for a student that it would sample in another way.
    """
    student.require_wan("lightx2v", RUNS)
    card, times = student.card, student.times
    if student.layout.index.get("expand_timesteps"):
        problem = f"{card.name} is a Wan 2.2 TI2V, for which it has no step-distilled runner"
        raise student.refused("lightx2v", problem, [] if student.reads_image else ["vllm-omni"])
    if student.fresh_noise:
        problem = f"{card.name} draws fresh noise between its steps, and the step-distilled schedulers make Euler steps"
        raise student.refused("lightx2v", problem, ["vllm-omni", "sglang"])
    shift, steps = whole_steps(times)
    visited = (*(level(step, shift) for step in steps), 0.0)
    if max(abs(ours - theirs) for ours, theirs in zip(times, visited)) > NEAR:
        problem = f"no shift and whole timesteps give the noise levels {list(times)}; the nearest are {list(visited)}"
        raise student.refused("lightx2v", problem, ["vllm-omni"])
    kind = "wan2.1_distill" if student.boundary is None else "wan2.2_moe_distill"
    task = "i2v" if student.reads_image else "t2v"
    picture = ', "image_path": "BASE64"' if student.reads_image else ""
    notes: tuple[str, ...] = _NOTES
    if student.reads_image:
        notes += (f"It makes clips in the proportions of the picture: give one of {card.width} x {card.height}.",)
    return Plan(
        names="comfyui",
        files={CONFIG: json.dumps(_config(student, shift, steps), indent=2) + "\n"},
        command=(
            f"cd ./{student.title} && python -m lightx2v.server --model_cls {kind} --task {task} --model_path MODEL "
            f"--config_json {CONFIG} --host 127.0.0.1 --port 8000"
        ),
        request=(
            "curl -sS http://localhost:8000/v1/tasks/video/ -H 'Content-Type: application/json' -d "
            f'\'{{"prompt": "a cat"{picture}, "target_video_length": {card.num_frames}, "target_fps": {card.fps:g}, "seed": 0}}\''
        ),
        visited=visited,
        sources=_SOURCES,
        notes=notes,
    )


def level(step: int, shift: float) -> float:
    """The noise level of a whole timestep under a shift."""
    s = step / TRAIN_TIMESTEPS
    return shift * s / (1 + (shift - 1) * s)


def whole_steps(times: tuple[float, ...]) -> tuple[float, list[int]]:
    """The shift and the whole timesteps whose levels are nearest to `times`, from 1 to 0.

    A shift multiplies the odds of a level, s / (1 - s). So for every whole number there is one under which the first level
    between 1 and 0 is exact.
    """
    inner = times[1:-1]
    exact = [_odds(inner[0]) / _odds(x / TRAIN_TIMESTEPS) for x in range(1, TRAIN_TIMESTEPS)] if inner else []

    def steps(shift: float) -> list[int]:
        return [max(1, round(TRAIN_TIMESTEPS * t / (shift - (shift - 1) * t))) for t in times[:-1]]

    def error(shift: float) -> float:
        return max((abs(level(x, shift) - t) for x, t in zip(steps(shift), times)), default=0.0)

    for shift in SHIFTS:
        if error(shift) < 1e-9:
            return shift, steps(shift)
    best = min((*SHIFTS, *exact), key=error)
    return best, steps(best)


def _odds(level: float) -> float:
    return level / (1 - level)


def _config(student: Student, shift: float, steps: list[int]) -> dict[str, Any]:
    card, network = student.card, student.layout.config("transformer")
    files = list(file_names(student.model.denoiser.backbone.folders, "comfyui", student.title).values())
    attention = dict.fromkeys(("self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type"), "torch_sdpa")
    config: dict[str, Any] = {
        "infer_steps": len(steps), "denoising_step_list": steps, "sample_shift": shift, "sample_guide_scale": 1.0,
        "enable_cfg": False, "target_video_length": card.num_frames, "target_height": card.height,
        "target_width": card.width, "fps": card.fps, "text_len": card.parts["text"].args["length"], **attention,
        "dim": network["num_attention_heads"] * network["attention_head_dim"], "num_heads": network["num_attention_heads"],
        "num_layers": network["num_layers"], "ffn_dim": network["ffn_dim"], "freq_dim": network["freq_dim"],
        "in_dim": network["in_channels"], "out_dim": network["out_channels"], "eps": network["eps"],
    }  # fmt: skip
    if student.reads_image:
        config["use_image_encoder"] = network.get("image_dim") is not None
    if student.boundary is None:
        return config | {"dit_original_ckpt": files[0]}
    early = sum(time >= student.boundary for time in student.times[:-1])
    return config | {
        "boundary_step_index": early, "high_noise_original_ckpt": files[0], "low_noise_original_ckpt": files[1],
    }  # fmt: skip
