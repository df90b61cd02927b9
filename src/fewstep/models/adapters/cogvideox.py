"""CogVideoX 1.0 text to video (2408.06072) over diffusers' CogVideoXTransformer3DModel.

It predicts v on a scaled-linear table of noise whose signal-to-noise ratio is shifted and which ends in pure noise. The 2B
model adds sinusoids to its tokens, the 5B model rotates queries and keys.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from torch import Tensor, nn

from fewstep.attention import Grid3, KVView
from fewstep.core.types import Cond
from fewstep.diffusion import timestep
from fewstep.models.adapters.ddpm import contract_of, kind_of, path_of
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.streams import Streams, StreamsBackbone, StreamsBlock
from fewstep.models.backbone import Original
from fewstep.models.bundle import Card
from fewstep.models.spec import Spec
from fewstep.models.video_dit import unpatchify

_REFUSED = ("patch_size_t", "ofs_embed_dim", "use_learned_positional_embeddings", "dropout")
"""Settings of CogVideoX 1.5 and of its image-to-video models."""


def card(layout: Layout) -> Card:
    """CogVideoX at the size it was trained on, 50 steps of DDIM with guidance 6."""
    scheduler, network, vae = layout.scheduler(), layout.config("transformer"), layout.config("vae")
    path, space = path_of(scheduler), 2 ** (len(vae["block_out_channels"]) - 1)
    text = {"config": layout.config("text_encoder"), "length": network["max_text_seq_length"], "plain": True}
    large = network["use_rotary_positional_embeddings"]
    codec = {"config": vae, "kind": "AutoencoderKLCogVideoX", "patch": network["patch_size"], "tiling": False}
    return Card(
        name=Path(layout.source).name,
        parts={
            "denoiser": Spec("CogVideoX", {"config": network, "num_train_timesteps": path.num_train_timesteps}),
            "text": Spec("T5Text", {**text, "dtype": "bfloat16"}),
            "codec": Spec("VideoCodec", codec),
        },
        sources=dict.fromkeys(("denoiser", "text", "codec"), layout.source),
        path=path,
        kind=kind_of(scheduler),
        contract=contract_of(scheduler, steps=50, scale=6.0),
        num_frames=network["sample_frames"], height=network["sample_height"] * space,
        width=network["sample_width"] * space, fps=8,
        provenance={"source": layout.source, "licence": "CogVideoX License" if large else "Apache-2.0"},
    )  # fmt: skip


class CogVideoX(StreamsBackbone):
    """The modules are diffusers' own; `config` is its constructor's arguments. All text tokens are read, padding too."""

    network = CogVideoXTransformer3DModel

    def __init__(self, *, config: dict[str, Any], num_train_timesteps: int = 1000) -> None:
        super().__init__()
        self.args = {"config": config, "num_train_timesteps": num_train_timesteps}
        self.num_train_timesteps = num_train_timesteps
        self._hold(self.network.from_config(config))

    def _hold(self, network: Any) -> None:
        self.config = network.config
        for key in _REFUSED:
            if self.config[key]:
                raise ValueError(
                    f"CogVideoX 1.0 text to video is what is read; this network has {key}: {self.config[key]!r}"
                )
        self.channels, self.patch = self.config.in_channels, self.config.patch_size
        self.width = self.config.num_attention_heads * self.config.attention_head_dim
        inner = network.patch_embed
        self.patch_embed = nn.ModuleDict({"proj": inner.proj, "text_proj": inner.text_proj})
        self.time_proj, self.time_embedding = network.time_proj, network.time_embedding
        self.blocks = nn.ModuleList(map(StreamsBlock, network.transformer_blocks))
        self.norm_final, self.norm_out, self.proj_out = network.norm_final, network.norm_out, network.proj_out

    def embed(self, x: Tensor, t: Tensor, cond: Cond, kv: KVView | None = None) -> Streams:
        grid = self._grid(x, t, kv)
        with torch.autocast(x.device.type, enabled=False):
            patches = self.patch_embed["proj"](x.transpose(1, 2).flatten(0, 1))
            x_BNE = patches.unflatten(0, (len(x), -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)
            text = self.patch_embed["text_proj"](cond.text.to(x.dtype))
            time = self.time_embedding(self.time_proj(timestep(t, self.num_train_timesteps)).to(x.dtype))
        if self.config.use_rotary_positional_embeddings:
            return Streams(x_BNE, text, time, grid, self._rotary(grid, x.device))
        return Streams(x_BNE + self._sinusoids(grid, x.device).to(x.dtype), text, time, grid)

    def head(self, state: Streams) -> Tensor:
        with torch.autocast(state.x_BNE.device.type, enabled=False):
            x = self.norm_final(state.x_BNE)
            return unpatchify(self.proj_out(self.norm_out(x, temb=state.time_BE)), state.grid, self.patch)

    def original(self) -> Original:
        """Diffusers has frames before channels."""
        original = super().original()
        return original._replace(pack=lambda x: x.transpose(1, 2), unpack=lambda made, _: made.transpose(1, 2))

    def by_original(self, network: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        rotary = None
        if network.config.use_rotary_positional_embeddings:  # as the pipeline makes them, for latents
            settings = SimpleNamespace(transformer=network, vae_scale_factor_spatial=1)
            _, _, frames, height, width = x.shape
            rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(settings, height, width, frames, x.device)
        steps, text = timestep(t, self.num_train_timesteps), cond.text.to(x.dtype)
        made: Tensor = network(x.transpose(1, 2), text, steps, image_rotary_emb=rotary, return_dict=False)[0]
        return made.transpose(1, 2)

    def _sinusoids(self, grid: Grid3, device: torch.device) -> Tensor:
        """`[N, E]`."""
        scales = self.config.spatial_interpolation_scale, self.config.temporal_interpolation_scale
        size = (grid.width, grid.height)
        table: Tensor = get_3d_sincos_pos_embed(self.width, size, grid.frames, *scales, device, output_type="pt")
        return table.flatten(0, 1)

    def _rotary(self, grid: Grid3, device: torch.device) -> Tensor:
        """`[2, N, D]`, as if the clip had been cut from the middle of one of the size that was trained on."""
        trained = self.config.sample_height // self.patch, self.config.sample_width // self.patch
        scale = min(trained[0] / grid.height, trained[1] / grid.width)
        fitted = round(grid.height * scale), round(grid.width * scale)
        start = round((trained[0] - fitted[0]) / 2), round((trained[1] - fitted[1]) / 2)
        stop = start[0] + fitted[0], start[1] + fitted[1]
        tables = get_3d_rotary_pos_embed(
            self.config.attention_head_dim, (start, stop), (grid.height, grid.width), grid.frames, device=device
        )
        return torch.stack(tables)
