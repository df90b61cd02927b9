"""Iterations of a shipped recipe on a network of full size, here: memory beside the plan, seconds, finite losses, and a run that
is killed and goes on.

    python bench/iteration.py                        wan21_1p3b/dmd2_lora: DMD2 as a LoRA of Wan2.1-T2V-1.3B
    python bench/iteration.py --case animatediff     animatediff/avdm2, as a LoRA: AVDM2 of AnimateDiff over SD 1.5

Denoisers have their published sizes and random weights; text encoder and codec are tiny, and the clip is small, so that a CPU can
do it (12 GB of memory, 20 GB of disk). The recipe's method and settings stay as they are, but for what `COMMON` and `CASES`
say. Memory is that of the process without mapped files, minus what the program takes before it loads anything. The first run is
killed (SIGKILL) after its first checkpoint; the second takes up its run. It needs the folder `tests` of a checkout.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from fewstep.cli.plan import planned
from fewstep.core import Rng
from fewstep.data.video import write_video
from fewstep.pipeline import read
from fewstep.recipe import Recipe
from full_size import saved
from measuring import write

sys.path.append(str(Path(__file__).parent.parent / "tests"))
COMMON = {
    "settings.steps": "2", "settings.batch": "1", "settings.accumulate": "1", "settings.save_every": "1",
    "settings.device": "cpu", "settings.autocast": "off", "settings.health": "null",
}  # fmt: skip
"""Two iterations of one clip, in the arithmetic that every CPU has."""
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "wan": (
        "wan21_1p3b/dmd2_lora",
        {"model.num_frames": "9", "model.height": "64", "model.width": "64", "settings.frozen": "float32"},
    ),
    "animatediff": (
        "animatediff/avdm2",
        {"model.num_frames": "4", "model.height": "32", "model.width": "32", "method.frames": "2",
         "settings.lora": "{rank: 32, alpha: 32}", "settings.optim.student.lr_of": "{}"},
    ),
}  # fmt: skip
"""Recipe, and what differs from it."""
IDLE = "import fewstep.recipe, fewstep.engine.run, diffusers, time; time.sleep(3)"
"""The program itself."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    case: Literal["wan", "animatediff"] = "wan"
    folder: Path | None = None
    """Where models and runs are written, and stay; None: a temporary folder."""


def wan(folder: Path) -> dict[str, str]:
    """Wan2.1-T2V-1.3B in shards, with a tiny codec of its shape and a tiny text encoder of its width."""
    from transformers import UMT5Config, UMT5EncoderModel

    import tiny_models as tiny

    text = UMT5Config(vocab_size=len(tiny.WORDS), d_model=4096, d_kv=8, d_ff=32, num_layers=1, num_heads=3)
    codec = {"z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    layout, prompts = folder / "wan", folder / "prompts.txt"
    saved(layout)
    for part, made in {
        "text_encoder": UMT5EncoderModel(text), "tokenizer": tiny.tokenizer(), "vae": tiny.wan_codec(**codec)
    }.items():  # fmt: skip
        made.save_pretrained(layout / part)
    prompts.write_text("a red ball\na cat walks\n")
    return {"model.source": str(layout), "data.path": str(prompts)}


def animatediff(folder: Path) -> dict[str, str]:
    """AnimateDiff's motion modules in SD 1.5, and SD 1.5 as the image teacher; latents of random numbers."""
    from diffusers import (
        AnimateDiffPipeline,
        MotionAdapter,
        StableDiffusionPipeline,
        UNet2DConditionModel,
        UNetMotionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    import published
    import support_unets as tiny

    torch.manual_seed(0)
    image = UNet2DConditionModel(**published.SD15)
    motion = MotionAdapter(**published.MOTION)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tiny.tokenizer()), hidden_size=768, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    video = AnimateDiffPipeline(
        tiny.vae(), text, tiny.tokenizer(), UNetMotionModel.from_unet2d(image, motion), motion, tiny.scheduler("linear")
    )
    video.save_pretrained(folder / "video")
    StableDiffusionPipeline(
        tiny.vae(),
        text,
        tiny.tokenizer(),
        image,
        tiny.scheduler("scaled_linear"),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "image")
    clips = folder / "clips"
    clips.mkdir(exist_ok=True)
    for number in range(2):
        write_video(clips / f"{number}.mp4", Rng(number).rand((1, 3, 8, 64, 64), "clip") * 2 - 1)
        (clips / f"{number}.txt").write_text("a red ball")
    size = ("--num-frames", "4", "--height", "32", "--width", "32")
    options = ["--model", str(folder / "video"), "--output", str(folder / "latents"), *size]
    subprocess.run([sys.executable, "-m", "fewstep", "prepare", str(clips), *options], check=True)
    return {
        "model.source": str(folder / "video"), "method.image_teacher.source": str(folder / "image"),
        "data.path": str(folder / "latents"),
    }  # fmt: skip


def own(pid: int) -> int:
    """Bytes that a process has to itself; mapped files do not count."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@dataclass
class Watched:
    """What a process took, from its start to its end."""

    iterating: int = 0
    """Most bytes before it writes its result."""
    in_all: int = 0
    seconds: float = 0.0
    code: int = 0


def watched(command: list[str], run: Path, until: Path | None = None) -> Watched:
    """Run a command that writes `run`; kill it when the path `until` is there."""
    found, begun = Watched(), time.monotonic()
    with run.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            now = own(process.pid)
            found.in_all = max(found.in_all, now)
            if not any(run.glob("*student*")):
                found.iterating = max(found.iterating, now)
            if until is not None and until.exists():
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.02)
    found.seconds, found.code = time.monotonic() - begun, process.returncode
    return found


def main(case: Case) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = case.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        name, changes = CASES[case.case]
        made = folder / f"{case.case}.json"
        if not made.is_file():
            made.write_text(json.dumps((wan if case.case == "wan" else animatediff)(folder)))
        changes = COMMON | changes | {"data.text_cache": str(folder / "texts")} | json.loads(made.read_text())
        recipe = read(Path(name), list(changes.items()))
        assert isinstance(recipe, Recipe)
        plan, run = planned(recipe, recipe.settings, recipe.check()), folder / f"run-{case.case}"
        shutil.rmtree(run, ignore_errors=True)
        options = [part for key, value in changes.items() for part in (f"--{key}", value)]
        command = [sys.executable, "-m", "fewstep", "distill", name, *options, "--output", str(run)]
        idle = watched([sys.executable, "-c", IDLE], run)
        first = watched(command, run, until=run / "checkpoints" / "step-000001")
        second = watched(command, run)
        (last,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if (first.code, second.code) != (-signal.SIGKILL, 0):
        raise SystemExit(f"the first run ended with {first.code}, and should be killed; the second with {second.code}")
    own_peak, whole = (max(getattr(w, what) for w in (first, second)) - idle.in_all for what in ("iterating", "in_all"))
    found = {
        "planned, GiB": plan.peak.bytes / 2**30, "iterating, GiB": own_peak / 2**30,
        "with the writing of the result, GiB": whole / 2**30, "iterating over plan": own_peak / plan.peak.bytes,
        "s per iteration": last["time"], "seconds in all": first.seconds + second.seconds,
        "losses after the kill": {key: value for key, value in last.items() if key.startswith("loss/")},
        "finite": all(math.isfinite(value) for value in last.values()),
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    print(write(f"iteration-{case.case}", replace(case, folder=None), found))


if __name__ == "__main__":
    main(tyro.cli(Case, description=__doc__))
