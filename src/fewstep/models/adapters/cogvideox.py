"""CogVideoX 1.0 (2408.06072) over diffusers' CogVideoXTransformer3DModel: text and video are one sequence.

It predicts v on `Betas(zero_snr=True)`, the 2B model with `snr_shift=3.0`.
Legend: as in `backbone.py`; p, q rows and columns of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from fewstep.attention import Grid3, KVView
from fewstep.core.types import Cond
from fewstep.diffusion import timestep
from fewstep.models.adapters.ddpm import require_whole_clips
from fewstep.models.backbone import Backbone, State


@dataclass(frozen=True)
class JointState(State):
    """What flows from block to block: the video's tokens and the text's."""

    x_BNE: Tensor
    text_BLE: Tensor
    time_BE: Tensor
    grid: Grid3
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines of the video's positions; None where positions were added in the beginning (2B)."""

    @property
    def volume(self) -> Tensor:
        return self.x_BNE.unflatten(1, self.grid).permute(0, 4, 1, 2, 3)

    @property
    def detached(self) -> JointState:
        x, text = (tokens.detach().requires_grad_() for tokens in (self.x_BNE, self.text_BLE))
        return replace(self, x_BNE=x, text_BLE=text)


class CogVideoX(Backbone):
    """Clips `[B, 16, F, h, w]` with one time each; `config` is the arguments of diffusers' class.

    All text tokens are read, padding included, as it was trained.
    """

    folders: ClassVar[tuple[str, ...]] = ("transformer",)

    def __init__(self, *, config: dict[str, Any], num_train_timesteps: int = 1000) -> None:
        super().__init__()
        self.args = {"config": config, "num_train_timesteps": num_train_timesteps}
        self.num_train_timesteps = num_train_timesteps
        self._hold(CogVideoXTransformer3DModel.from_config(config))

    def load(self, folder: Path) -> None:
        """Take the weights of a folder in diffusers' layout, as float32."""
        self._hold(
            CogVideoXTransformer3DModel.from_pretrained(
                folder, subfolder=self.folders[0], torch_dtype=torch.float32, use_safetensors=True
            )
        )

    def _hold(self, network: CogVideoXTransformer3DModel) -> None:
        for key in ("patch_size_t", "ofs_embed_dim", "use_learned_positional_embeddings", "dropout"):
            if network.config[key]:
                raise ValueError(
                    f"CogVideoX 1.0 text to video is what is read; this network has {key}: {network.config[key]!r}"
                )
        self.config, self.patch = network.config, network.config.patch_size
        self.width = self.config.num_attention_heads * self.config.attention_head_dim
        self.patch_embed, self.time_proj, self.time_embedding = (
            network.patch_embed, network.time_proj, network.time_embedding,
        )  # fmt: skip
        self.blocks = nn.ModuleList(map(Block, network.transformer_blocks))
        self.norm_final, self.norm_out, self.proj_out = network.norm_final, network.norm_out, network.proj_out

    def embed(self, x: Tensor, t: Tensor, cond: Cond, kv: KVView | None = None) -> JointState:
        require_whole_clips("CogVideoX", x, t, kv)
        grid = self._grid(x)
        with torch.autocast(x.device.type, enabled=False):
            waves = self.time_proj(timestep(t, self.num_train_timesteps)).to(x.dtype)
            time_BE = self.time_embedding(waves)
            tokens = self.patch_embed(cond.text.to(x.dtype), x.transpose(1, 2))
        text, video = tokens.tensor_split([cond.text.shape[1]], 1)
        return JointState(video, text, time_BE, grid, self._rotary(grid, x.device))

    def head(self, state: JointState) -> Tensor:
        with torch.autocast(state.x_BNE.device.type, enabled=False):
            tokens = self.norm_final(state.x_BNE.to(self.proj_out.weight.dtype))
            tokens = self.proj_out(self.norm_out(tokens, temb=state.time_BE))
        x = tokens.unflatten(2, (-1, self.patch, self.patch)).unflatten(1, state.grid)  # B F h w C p q
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)

    def foreign(self, name: str) -> str:
        if not name.startswith("blocks."):
            return name
        _, index, _, rest = name.split(".", 3)
        return f"transformer_blocks.{index}.{rest}"

    def _grid(self, x: Tensor) -> Grid3:
        _, channels, frames, height, width = x.shape
        if channels != self.config.in_channels or height % self.patch or width % self.patch:
            raise ValueError(
                f"latents [B, C, F, H, W] need C = {self.config.in_channels} and H, W multiples of {self.patch}, "
                f"got {tuple(x.shape)}"
            )
        return Grid3(frames, height // self.patch, width // self.patch)

    def _rotary(self, grid: Grid3, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Positions as if every size were the trained one, stretched."""
        if not self.config.use_rotary_positional_embeddings:
            return None
        size = (grid.height, grid.width)
        trained = (self.config.sample_width // self.patch, self.config.sample_height // self.patch)
        cos, sin = get_3d_rotary_pos_embed(
            embed_dim=self.config.attention_head_dim, crops_coords=get_resize_crop_region_for_grid(size, *trained),
            grid_size=size, temporal_size=grid.frames, device=device,
        )  # fmt: skip
        return cos, sin


class Block(nn.Module):
    """A block of diffusers, State to State."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, state: JointState) -> JointState:
        x, text = self.inner(state.x_BNE, state.text_BLE, state.time_BE, image_rotary_emb=state.rotary)
        return replace(state, x_BNE=x, text_BLE=text)
