"""HunyuanVideo text-to-video (2412.03603) over diffusers' HunyuanVideoTransformer3DModel.

Its published network had guidance distilled in: the scale is one of its inputs, and it is sampled without classifier-free
guidance. Blocks of two streams come first, then blocks in which both streams share their weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from fewstep.attention import Dense, Pattern
from fewstep.core import Call, Cond
from fewstep.models.adapters.dits.joint import JointBlock, joint
from fewstep.models.adapters.dits.streams import Streams, beside_text, projected, whole_grid
from fewstep.models.adapters.flow import contract_of
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.network import DiffusersBackbone
from fewstep.models.backbone import Original
from fewstep.models.card import Card
from fewstep.models.spec import Spec

_TIMESTEPS = 1000
_GUIDANCE = 6.0
_FRAMES, _HEIGHT, _WIDTH = 129, 720, 1280


def card(layout: Layout) -> Card:
    """HunyuanVideo as its authors sample it: 129 frames of 720p at 24 per second, 50 steps, guidance 6."""
    network, vae = layout.config("transformer"), layout.config("vae")
    text = {"llama": layout.config("text_encoder"), "clip": layout.config("text_encoder_2"), "length": 256}
    scale = 1.0 if network["guidance_embeds"] else _GUIDANCE
    codec = {"config": vae, "kind": "AutoencoderKLHunyuanVideo", "patch": network["patch_size"], "tiling": False}
    return Card(
        name=Path(layout.source).name,
        parts={
            "denoiser": Spec("HunyuanVideo", {"config": network, "guidance": _GUIDANCE, "pattern": Dense().tree()}),
            "text": Spec("HunyuanText", {**text, "dtype": "bfloat16"}),
            "codec": Spec("VideoCodec", codec),
        },
        sources=dict.fromkeys(("denoiser", "text", "codec"), layout.source),
        contract=contract_of(layout.scheduler(), steps=50, scale=scale),
        num_frames=_FRAMES, height=_HEIGHT, width=_WIDTH, fps=24,
        provenance={"source": layout.source, "licence": "Tencent Hunyuan Community License"},
    )  # fmt: skip


class HunyuanVideo(DiffusersBackbone):
    """The modules are diffusers' own; `config` is its constructor's arguments.

    `guidance` is the scale that a network with embedded guidance is told. `Cond.extra["pooled"]` is CLIP's view of the
    prompt; padding of the text is not read.
    """

    network = HunyuanVideoTransformer3DModel
    shares = True

    def __init__(self, *, config: dict[str, Any], guidance: float = _GUIDANCE, pattern: Pattern = Dense()) -> None:
        super().__init__()
        self.args = {"config": config, "guidance": guidance, "pattern": pattern.tree()}
        self.guidance, self.pattern = guidance, pattern
        self._hold(self.network.from_config(config))

    def _hold(self, network: Any) -> None:
        config = network.config
        if config.image_condition_type is not None or config.patch_size_t != 1:
            raise ValueError(
                "HunyuanVideo is read without image conditions and with patches of one frame; this network has "
                f"image_condition_type={config.image_condition_type!r}, patch_size_t={config.patch_size_t}"
            )
        self.channels, self.patch, self.dual = config.in_channels, config.patch_size, config.num_layers
        self.heads, self.embeds_guidance = config.num_attention_heads, config.guidance_embeds
        self.width = self.heads * config.attention_head_dim
        self.x_embedder, self.context_embedder = network.x_embedder, network.context_embedder
        self.time_text_embed, self.rope = network.time_text_embed, network.rope
        inner = (*network.transformer_blocks, *network.single_transformer_blocks)
        self.blocks = nn.ModuleList(JointBlock(*each) for each in joint(inner, self.pattern, self.heads, self.width))
        self.norm_out, self.proj_out = network.norm_out, network.proj_out

    def foreign(self, name: str) -> str:
        if not name.startswith("blocks."):
            return name
        _, index, _, rest = name.split(".", 3)
        block = int(index)
        if block < self.dual:
            return f"transformer_blocks.{block}.{rest}"
        return f"single_transformer_blocks.{block - self.dual}.{rest}"

    def embed(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Streams:
        grid = whole_grid(self, x, t, call, channels=self.channels, patch=self.patch)
        if "pooled" not in cond.extra:
            raise ValueError("HunyuanVideo reads a pooled text state too; encode prompts with its own text encoder")
        time, pooled = (_TIMESTEPS * t).to(x.dtype), cond.extra["pooled"].to(x.dtype)
        scale = torch.full_like(time, _TIMESTEPS * self.guidance) if self.embeds_guidance else None
        with torch.autocast(x.device.type, enabled=False):
            time_BE, _ = self.time_text_embed(time, pooled, scale)
            x_BNE = self.x_embedder(x)
            text = self.context_embedder(cond.text.to(x.dtype), time, cond.mask)
        site = beside_text(self.site(self.pattern, grid, call, x.device), self.pattern, text, cond.mask)
        return Streams(x_BNE, text, time_BE, grid, site, torch.stack(self.rope(x)))

    def head(self, state: Streams) -> Tensor:
        return projected(state, self.norm_out, self.proj_out, self.patch)

    def original(self) -> Original:
        names = {"pooled": "pooled_prompt_embeds", "guidance_scale": "true_cfg_scale"}
        return super().original()._replace(names=names, told={"guidance_scale": self.guidance})

    def by_original(self, network: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, pooled = cond.text.to(x.dtype), cond.extra["pooled"].to(x.dtype)
        scale = x.new_full((len(x),), _TIMESTEPS * self.guidance)
        made: Tensor = network(x, _TIMESTEPS * t, text, cond.mask, pooled, scale, return_dict=False)[0]
        return made
