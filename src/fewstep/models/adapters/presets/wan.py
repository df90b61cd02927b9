"""How Wan's authors sample their models.

Wan 2.1, github.com/Wan-Video/Wan2.1: generate.py (steps, shift, guidance, sizes), README.md (T2V-1.3B: guidance 6, shift 8,
"can be adjusted within the range of 8 to 12"), wan/configs/{shared_config,wan_i2v_14B,__init__}.py (negative prompts).
Wan 2.2, github.com/Wan-Video/Wan2.2: generate.py, wan/configs/wan_{t2v_A14B,i2v_A14B,ti2v_5B}.py. Both sample with UniPC-2 whose
times lie evenly from 0.999 to 0 before the shift: wan/utils/fm_solvers_unipc.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from fewstep.diffusion import Contract, FlowSchedule, UniPC, WholeTimesteps
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.presets.facts import Preset
from fewstep.models.card import Card

SMALL: Mapping[str, int] = MappingProxyType({"num_frames": 81, "height": 480, "width": 832, "fps": 16})
LARGE: Mapping[str, int] = MappingProxyType({"num_frames": 81, "height": 720, "width": 1280, "fps": 16})
LARGEST: Mapping[str, int] = MappingProxyType({"num_frames": 121, "height": 704, "width": 1280, "fps": 24})
_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_SHAKING, _CUTS = "镜头晃动，", "镜头切换，"


class Facts(NamedTuple):
    """One published model."""

    size: Mapping[str, int]
    shift: float
    guidance: float
    """Scale; of two experts, that of the noisy times. The other's is in the card."""
    steps: int
    negative: str = _NEGATIVE


FACTS: Mapping[str, Facts] = MappingProxyType({
    "T2V-1.3B": Facts(SMALL, 8.0, 6.0, 50),
    "T2V-14B": Facts(LARGE, 5.0, 5.0, 50),
    "I2V-14B-480P": Facts(SMALL, 3.0, 5.0, 40, _SHAKING + _NEGATIVE),
    "I2V-14B-720P": Facts(LARGE, 5.0, 5.0, 40, _SHAKING + _NEGATIVE),
    "FLF2V-14B-720P": Facts(LARGE, 16.0, 5.0, 50, _CUTS + _SHAKING + _NEGATIVE),
    "T2V-A14B": Facts(LARGE, 12.0, 4.0, 40),
    "I2V-A14B": Facts(LARGE, 5.0, 3.5, 40),
    "TI2V-5B": Facts(LARGEST, 5.0, 5.0, 50),
})  # fmt: skip
"""Published models by the end of their names."""


def kind_of(layout: Layout, reads: str | None) -> str:
    """Which of `FACTS` a layout is; `reads` says how it reads images. 480P and 720P of I2V differ in nothing but their names."""
    if layout.index.get("boundary_ratio") is not None:
        return "T2V-A14B" if reads is None else "I2V-A14B"
    if layout.index.get("expand_timesteps"):
        return "TI2V-5B"
    if reads == "ends":
        return "FLF2V-14B-720P"
    if reads == "image":
        return "I2V-14B-720P" if "720P" in layout.source.rstrip("/").rsplit("/", 1)[-1] else "I2V-14B-480P"
    return "T2V-1.3B" if layout.config("transformer")["num_attention_heads"] <= 12 else "T2V-14B"


def authors(layout: Layout, card: Card) -> Preset:
    """The preset `authors`."""
    image = card.parts.get("image")
    facts = FACTS[kind_of(layout, None if image is None else image.args["reads"])]

    def contract(own: Contract) -> Contract:
        return replace(
            own,
            sampler=WholeTimesteps(sampler=UniPC()),
            grid=FlowSchedule(scheduler="dpm", shift=facts.shift),
            guidance=replace(own.guidance, scale=facts.guidance),
            steps=facts.steps,
        )

    fields: dict[str, Any] = {**facts.size, "negative_prompt": facts.negative}
    later = layout.index.get("boundary_ratio") is not None or layout.index.get("expand_timesteps")
    version = "2.2" if later else "2.1"
    return Preset(contract=contract, source=f"github.com/Wan-Video/Wan{version} generate.py", fields=fields)
