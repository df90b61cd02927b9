"""HunyuanVideo 1.5 text-to-video (2511.18870) over diffusers' HunyuanVideo15Transformer3DModel.

Its text is the states of a language model, followed by those of the letters that shall be written in the picture. It was
trained on images as well: their place in the input is zero here, and their tokens, which would be masked, are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from torch import Tensor, nn

from fewstep.attention import Dense, Pattern
from fewstep.core import Call, Cond, RecipeError
from fewstep.models.adapters.dits.joint import JointBlock, foreign_name, joint
from fewstep.models.adapters.dits.streams import Streams, beside_text, projected, whole_grid
from fewstep.models.adapters.flow import contract_of
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.network import DiffusersBackbone
from fewstep.models.backbone import Original
from fewstep.models.card import Card
from fewstep.models.spec import Spec

_TIMESTEPS = 1000


def card(layout: Layout) -> Card:
    """HunyuanVideo 1.5: 121 frames at 24 per second of the layout's resolution, 50 steps, its guider's guidance."""
    network, vae = layout.config("transformer"), layout.config("vae")
    text = {"qwen": layout.config("text_encoder"), "byt5": layout.config("text_encoder_2"), "dtype": "bfloat16"}
    codec = {"config": vae, "kind": "AutoencoderKLHunyuanVideo15", "patch": network["patch_size"], "tiling": False}
    shapes = HunyuanVideo15ImageProcessor(vae_scale_factor=vae["spatial_compression_ratio"])
    height, width = shapes.calculate_default_height_width(9, 16, network["target_size"])
    return Card(
        name=Path(layout.source).name,
        parts={
            "denoiser": Spec("HunyuanVideo15", {"config": network, "pattern": Dense().tree()}),
            "text": Spec("QwenByT5Text", text),
            "codec": Spec("VideoCodec", codec),
        },
        sources=dict.fromkeys(("denoiser", "text", "codec"), layout.source),
        contract=contract_of(layout.scheduler(), steps=50, scale=_guidance(layout.guider())),
        num_frames=121, height=height, width=width, fps=24,
        provenance={"source": layout.source, "licence": "Tencent Hunyuan Community License"},
    )  # fmt: skip


def _guidance(guider: dict[str, Any]) -> float:
    plain = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
    for key, value in plain.items():
        if guider.get(key, value) != value:
            raise RecipeError(f"guider_config.json: {key}: {guider[key]!r} cannot be followed; set it to {value!r}")
    return float(guider["guidance_scale"]) if guider.get("enabled", True) else 1.0


class HunyuanVideo15(DiffusersBackbone):
    """The modules are diffusers' own; `config` is its constructor's arguments.

    `Cond.extra` has `glyphs` `[B, G, D]`, the states of letters, and `glyph_mask` `[B, G]`. Padding is not read.
    """

    network = HunyuanVideo15Transformer3DModel
    shares = True

    def __init__(self, *, config: dict[str, Any], pattern: Pattern = Dense()) -> None:
        super().__init__()
        self.args, self.pattern = {"config": config, "pattern": pattern.tree()}, pattern
        self._hold(self.network.from_config(config))

    def _hold(self, network: Any) -> None:
        config = network.config
        if config.use_meanflow or config.patch_size_t != 1:
            raise ValueError(
                "HunyuanVideo 1.5 is read with one time and with patches of one frame; this network has "
                f"use_meanflow={config.use_meanflow}, patch_size_t={config.patch_size_t}"
            )
        self.channels, self.patch = config.out_channels, config.patch_size
        self.heads = config.num_attention_heads
        self.width = self.heads * config.attention_head_dim
        self.x_embedder, self.image_embedder = network.x_embedder, network.image_embedder
        self.context_embedder, self.context_embedder_2 = network.context_embedder, network.context_embedder_2
        self.time_embed, self.cond_type_embed, self.rope = network.time_embed, network.cond_type_embed, network.rope
        inner = network.transformer_blocks
        self.blocks = nn.ModuleList(JointBlock(*each) for each in joint(inner, self.pattern, self.heads, self.width))
        self.norm_out, self.proj_out = network.norm_out, network.proj_out

    def foreign(self, name: str) -> str:
        return foreign_name(name)

    def embed(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Streams:
        grid = whole_grid(self, x, t, call, channels=self.channels, patch=self.patch)
        if "glyphs" not in cond.extra:
            raise ValueError("HunyuanVideo 1.5 reads states of letters too; encode prompts with its own text encoder")
        time, glyph_mask = (_TIMESTEPS * t).to(x.dtype), cond.extra["glyph_mask"].bool()
        with torch.autocast(x.device.type, enabled=False):
            x_BNE = self.x_embedder(self._with_image(x))
            words = self.context_embedder(cond.text.to(x.dtype), time, cond.mask) + self.cond_type_embed.weight[0]
            glyphs = self.context_embedder_2(cond.extra["glyphs"].to(x.dtype)) + self.cond_type_embed.weight[1]
            time_BE = self.time_embed(time)
        text = torch.cat([glyphs, words], 1)
        mask = torch.cat([glyph_mask, cond.mask], 1)
        site = beside_text(self.site(self.pattern, grid, call, x.device), self.pattern, text, mask)
        return Streams(x_BNE, text, time_BE, grid, site, torch.stack(self.rope(x)))

    def head(self, state: Streams) -> Tensor:
        return projected(state, self.norm_out, self.proj_out, self.patch)

    def original(self) -> Original:
        names = {
            "prompt_attention_mask": "prompt_embeds_mask", "glyphs": "prompt_embeds_2",
            "glyph_mask": "prompt_embeds_mask_2",
        }  # fmt: skip
        return super().original()._replace(names=names)

    def by_original(self, network: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        glyphs, glyph_mask = cond.extra["glyphs"].to(x.dtype), cond.extra["glyph_mask"]
        no_image = x.new_zeros(len(x), 1, network.config.image_embed_dim)  # masked, because it is zero
        made: Tensor = network(
            self._with_image(x), _TIMESTEPS * t, cond.text.to(x.dtype), cond.mask, None, glyphs, glyph_mask, no_image,
            return_dict=False,
        )[0]  # fmt: skip
        return made

    def _with_image(self, x: Tensor) -> Tensor:
        """Latents followed by those of an image and where it is, of which there is none."""
        return torch.cat([x, x.new_zeros(len(x), self.channels + 1, *x.shape[2:])], 1)
