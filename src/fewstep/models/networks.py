"""Every network that a card may name, by name: fewstep's own, and those of adapters, which are imported when needed."""

from __future__ import annotations

import importlib
from types import MappingProxyType, ModuleType
from typing import Any

from torch import nn

from fewstep.core import RecipeError
from fewstep.core.build import At, find_class
from fewstep.models.autoencoder import FrameAutoencoder
from fewstep.models.discriminators import BlockHead, FeatureHeads, JointHead, QueryHead
from fewstep.models.features import ClipFeatures
from fewstep.models.text import TextEncoder
from fewstep.models.video_dit import VideoDiT

NETWORKS: tuple[type[nn.Module], ...] = (
    VideoDiT, FeatureHeads, JointHead, BlockHead, QueryHead, FrameAutoencoder, TextEncoder, ClipFeatures,
)  # fmt: skip
ADAPTED = MappingProxyType(
    {
        "Wan": "dits.wan", "WanExperts": "dits.wan_experts", "LTX": "dits.ltx", "CogVideoX": "dits.cogvideox",
        "HunyuanVideo": "dits.hunyuan", "HunyuanVideo15": "dits.hunyuan15",
        "AnimateDiff": "unets.animatediff", "StableDiffusion": "unets.stable_diffusion",
        "WanImage": "conditions.wan_image", "CogVideoXImage": "conditions.cogvideox_image",
        "T5Text": "conditions.t5", "ClipText": "conditions.clip", "HunyuanText": "conditions.hunyuan_text",
        "QwenByT5Text": "conditions.qwen_byt5",
        "VideoCodec": "codecs.codec", "FrameCodec": "codecs.frame_codec",
    }
)  # fmt: skip
"""Networks of the room `adapters`, and the file of each."""


def network_class(name: Any, at: At) -> type[nn.Module]:
    """The class called `name`: of `NETWORKS`, of `ADAPTED`, or of an import path `package.module:Class`."""
    if isinstance(name, str) and name in ADAPTED:
        found: type[nn.Module] = getattr(adapter(ADAPTED[name]), name)
        return found
    return find_class(name, nn.Module, {c.__name__: c for c in NETWORKS}, at)


def adapter(file: str) -> ModuleType:
    """A file of the room `adapters`. RecipeError says what to install."""
    try:
        return importlib.import_module(f"fewstep.models.adapters.{file}")
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"models of the diffusers ecosystem need {error.name}: pip install 'fewstep[diffusers]'"
        ) from error
