"""Sampling of a Wan with random weights: ours beside diffusers' own pipeline, the same noise and steps, in turns.

    python bench/sample.py --size tiny
    python bench/sample.py --size mid --dtype bfloat16 --compile

Both read the same folder and make the same latents (`difference` says how nearly); neither decodes them. Theirs is
`WanPipeline` as its users call it, with the blocks of its transformer compiled where ours are. It needs diffusers, and the
folder `tests` of a checkout, where the small text encoder is.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from fewstep.core import Seeds
from fewstep.models import VideoModel
from fewstep.models.runtime import Runtime
from fewstep.models.source import Diffusers
from measuring import WAN, Clock, Timer, keep, middle, rounded

sys.path.append(str(Path(__file__).parent.parent / "tests"))
WARM_UP = 2
PROMPT = "a red ball walks in the rain"
GUIDANCE = 5.0

SIZES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "tiny": ({}, (5, 64, 64)),
    "mid": (
        {"num_attention_heads": 6, "attention_head_dim": 64, "ffn_dim": 1536, "num_layers": 8, "freq_dim": 256},
        (9, 128, 224),
    ),
    "wan-1.3b": (
        {name: value for name, value in WAN.items() if "channels" not in name and name != "text_dim"},
        (81, 480, 832),
    ),
}
"""Changes of the transformer, and `(num_frames, height, width)` of the clip."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    size: Literal["tiny", "mid", "wan-1.3b"] = "mid"
    steps: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    device: str = "cpu"
    rounds: int = 7
    clock: Clock = "wall"


def saved(case: Case, folder: Path) -> Path:
    """A folder in diffusers' layout."""
    from tiny_models import wan, wan_transformer

    torch.manual_seed(0)
    changes, _ = SIZES[case.size]
    pipeline = wan()
    pipeline.register_modules(transformer=wan_transformer(**changes | {"rope_max_seq_len": 1024}))
    pipeline.save_pretrained(folder)
    return folder


def ours(case: Case, folder: Path) -> Callable[[], Tensor]:
    """Latents by `VideoModel`."""
    model = loaded(case, folder, Runtime(dtype=case.dtype, compile=case.compile, device=case.device))

    def run() -> Tensor:
        return model.latents([PROMPT], num_inference_steps=case.steps, guidance_scale=GUIDANCE)

    return run


def loaded(case: Case, folder: Path, runtime: Runtime) -> VideoModel:
    frames, height, width = SIZES[case.size][1]
    chosen = Diffusers(source=str(folder), num_frames=frames, height=height, width=width)
    return VideoModel.load(chosen.card(), folder, runtime=runtime)


def theirs(case: Case, folder: Path) -> Callable[[], Tensor]:
    """Latents by `WanPipeline`."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=getattr(torch, case.dtype)).to(case.device)
    pipeline.set_progress_bar_config(disable=True)
    if case.compile:
        for block in pipeline.transformer.blocks:
            block.compile(fullgraph=True, dynamic=False)
    model = loaded(case, folder, Runtime())
    noise = Seeds((0,), device=case.device).randn((1, *model.latent_shape()), "start")
    frames, height, width = SIZES[case.size][1]

    def run() -> Tensor:
        made = pipeline(
            PROMPT, negative_prompt=model.card.negative_prompt, latents=noise, num_frames=frames, height=height, width=width,
            num_inference_steps=case.steps, guidance_scale=GUIDANCE, output_type="latent",
        )  # fmt: skip
        return torch.as_tensor(made.frames)

    return run


def measure(case: Case) -> dict[str, Any]:
    """Seconds of both, round by round, and the ratio of each round."""
    with tempfile.TemporaryDirectory() as place:
        folder = saved(case, Path(place))
        sides = {"ours": ours(case, folder), "theirs": theirs(case, folder)}
        timer = Timer(case.device, case.clock)
        for _ in range(WARM_UP):
            made = {name: side() for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(case.rounds):
            for name, side in sides.items():
                seconds[name].append(timer.of(side))
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    difference = (made["ours"] - made["theirs"]).float().norm() / made["theirs"].float().norm()
    return {
        "difference": float(difference),
        "seconds": {name: middle(values) for name, values in seconds.items()},
        "ratio": rounded({"median": middle(ratios), "least": min(ratios), "most": max(ratios)}),
        "rounds": [rounded({name: values[i] for name, values in seconds.items()}) for i in range(case.rounds)],
    }


def main(case: Case) -> None:
    found = measure(case)
    print(found["seconds"], found["ratio"], f"difference {found['difference']:.1e}")
    print(keep("sample", case, found, case.device))


if __name__ == "__main__":
    main(tyro.cli(Case))
