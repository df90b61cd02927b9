"""CogVideoX (2408.06072), text-to-video and image-to-video, over diffusers' CogVideoXTransformer3DModel.

It predicts v on a scaled-linear table of noise whose signal-to-noise ratio is shifted and which ends in pure noise. The 2B
model adds sinusoids to its tokens, the 5B models rotate queries and keys, and that of images adds learned positions too.
CogVideoX 1.5 has patches of two latent frames. Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from torch import Tensor, nn

from fewstep.attention import Dense, Grid3, Pattern
from fewstep.core import Call, Cond, RecipeError
from fewstep.diffusion import timestep
from fewstep.models.adapters.ddpm import contract_of, kind_of, path_of
from fewstep.models.adapters.dits.joint import JointBlock, Seat, foreign_name, joint
from fewstep.models.adapters.dits.streams import Streams, beside_text, whole_grid
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.network import DiffusersBackbone
from fewstep.models.backbone import Original
from fewstep.models.card import Card, latent_shape_of
from fewstep.models.spec import Spec

_OFFSET = 2.0
"""Constant input of an `ofs` embedding."""
_SIZE_15 = MappingProxyType({"num_frames": 81, "height": 768, "width": 1360, "fps": 16})
"""Size of CogVideoX 1.5, whose configs may name the largest size instead."""


def card(layout: Layout) -> Card:
    """CogVideoX at the size it was trained on, 50 steps of DDIM with guidance 6."""
    scheduler, network, vae = layout.scheduler(), layout.config("transformer"), layout.config("vae")
    path, space = path_of(scheduler), 2 ** (len(vae["block_out_channels"]) - 1)
    text = {"config": layout.config("text_encoder"), "length": network["max_text_seq_length"], "plain": True}
    large = network["use_rotary_positional_embeddings"]
    patch, frames = network["patch_size"], network.get("patch_size_t")
    size = {
        "num_frames": network["sample_frames"], "height": network["sample_height"] * space,
        "width": network["sample_width"] * space, "fps": 8,
    }  # fmt: skip
    codec = {
        "config": vae,
        "kind": "AutoencoderKLCogVideoX",
        "patch": patch,
        "patch_frames": frames or 1,
        "tiling": False,
    }
    parts = {
        "denoiser": Spec(
            "CogVideoX",
            {"config": network, "num_train_timesteps": path.num_train_timesteps, "pattern": Dense().tree()},
        ),
        "text": Spec("T5Text", {**text, "dtype": "bfloat16"}),
        "codec": Spec("VideoCodec", codec),
    }
    if network["in_channels"] != network["out_channels"]:
        parts["image"] = Spec("CogVideoXImage", {})
    return Card(
        name=Path(layout.source).name,
        parts=parts,
        sources=dict.fromkeys(parts, layout.source),
        path=path,
        kind=kind_of(scheduler),
        contract=contract_of(scheduler, steps=50, scale=6.0),
        provenance={"source": layout.source, "licence": "CogVideoX License" if large else "Apache-2.0"},
        **(size if frames is None else _SIZE_15),
    )


def at_size(card: Card) -> Card:
    """The same card. RecipeError for a size that the network has no positions for."""
    shape = latent_shape_of(card)
    assert shape is not None  # `card` gave it a codec
    with torch.device("meta"):
        network: Any = card.parts["denoiser"].build()
    try:
        network.require_positions(*(pixels // network.patch for pixels in shape[2:]))
    except ValueError as error:
        raise RecipeError(f"height: {card.height}, width: {card.width}: {error}") from None
    return card


class _Block(JointBlock):
    """One of diffusers' blocks, which hands on what is not a mask by name."""

    def run(self, state: Streams, seat: Seat, rotary: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        x, text = self.inner(state.x_BNE, state.text_BLE, state.time_BE, rotary, {"attention_mask": seat})
        return x, text


class CogVideoX(DiffusersBackbone):
    """The modules are diffusers' own; `config` is its constructor's arguments. All text tokens are read, padding too.

    A network with more input than output channels is an image-to-video network: it reads `image_latents` of `Cond.extra`.
    """

    network = CogVideoXTransformer3DModel
    shares = True

    def __init__(self, *, config: dict[str, Any], num_train_timesteps: int = 1000, pattern: Pattern = Dense()) -> None:
        super().__init__()
        self.args = {"config": config, "num_train_timesteps": num_train_timesteps, "pattern": pattern.tree()}
        self.num_train_timesteps, self.pattern = num_train_timesteps, pattern
        self._hold(self.network.from_config(config))

    def _hold(self, network: Any) -> None:
        self.config = network.config
        if self.config.dropout:
            raise ValueError(f"CogVideoX is trained without dropout; set dropout: 0, not {self.config.dropout}")
        self.channels, self.patch = self.config.out_channels, self.config.patch_size
        self.patch_frames = self.config.patch_size_t or 1
        self.heads = self.config.num_attention_heads
        self.width = self.heads * self.config.attention_head_dim
        self.any_size = not self.config.use_learned_positional_embeddings
        inner = network.patch_embed
        self.patch_embed = nn.ModuleDict({"proj": inner.proj, "text_proj": inner.text_proj})
        if self.config.use_learned_positional_embeddings:
            self.patch_embed.register_buffer("pos_embedding", inner.pos_embedding)
        self.time_proj, self.time_embedding = network.time_proj, network.time_embedding
        self.ofs_proj, self.ofs_embedding = network.ofs_proj, network.ofs_embedding
        blocks = joint(network.transformer_blocks, self.pattern, self.heads, self.width)
        self.blocks = nn.ModuleList(_Block(*each) for each in blocks)
        self.norm_final, self.norm_out, self.proj_out = network.norm_final, network.norm_out, network.proj_out

    def foreign(self, name: str) -> str:
        return foreign_name(name)

    def embed(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Streams:
        if self._reads_image:
            self._require_whole(x.shape[2] == self._of_image(cond, "image_latents").shape[2], x)
        grid = whole_grid(self, x, t, call, channels=self.channels, patch=self.patch)
        self.require_positions(grid.height, grid.width)
        with torch.autocast(x.device.type, enabled=False):
            x_BNE = self._patches(self._beside_image(x, cond))
            text = self.patch_embed["text_proj"](cond.text.to(x.dtype))
            time = self.time_embedding(self.time_proj(timestep(t, self.num_train_timesteps)).to(x.dtype))
            if self.ofs_embedding is not None:
                time = time + self.ofs_embedding(self.ofs_proj(t.new_full((1,), _OFFSET)).to(x.dtype))
            if self.config.use_learned_positional_embeddings:
                of_text, of_clip = self._learned(grid, text.shape[1], x)
                x_BNE, text = x_BNE + of_clip, text + of_text
            elif not self.config.use_rotary_positional_embeddings:
                x_BNE = x_BNE + self._sinusoids(grid, x.device).to(x.dtype)
        rotary = self._rotary(grid, x.device) if self.config.use_rotary_positional_embeddings else None
        site = beside_text(self.site(self.pattern, grid, call, x.device), self.pattern, text)
        return Streams(x_BNE, text, time, grid, site, rotary)

    def head(self, state: Streams) -> Tensor:
        with torch.autocast(state.x_BNE.device.type, enabled=False):
            x = self.proj_out(self.norm_out(self.norm_final(state.x_BNE), temb=state.time_BE))
        patch = (self.patch_frames, self.patch, self.patch)
        x = x.unflatten(2, (-1, *patch)).unflatten(1, state.grid)  # B F h w C p q r
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)

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
        offset = None if network.ofs_embedding is None else x.new_full((1,), _OFFSET)
        x = self._beside_image(x, cond).transpose(1, 2)
        made: Tensor = network(x, text, steps, ofs=offset, image_rotary_emb=rotary, return_dict=False)[0]
        return made.transpose(1, 2)

    def require_positions(self, rows: int, columns: int) -> None:
        """ValueError for clips of so many patches, if there are no positions for them."""
        _, *known = self._trained_grid
        size = f"{known[0]} x {known[1]} patches"
        if not self.any_size and [rows, columns] != known:
            raise ValueError(
                f"this CogVideoX has learned positions of {size} and no others, not of {rows} x {columns}; keep the height "
                "and width of its card"
            )
        if self.config.patch_size_t is not None and (rows > known[0] or columns > known[1]):
            raise ValueError(
                f"this CogVideoX knows positions of {size}, not {rows} x {columns}; give a smaller height and width"
            )

    @property
    def _reads_image(self) -> bool:
        return bool(self.config.in_channels != self.channels)

    def _beside_image(self, x: Tensor, cond: Cond) -> Tensor:
        """The latents, and in further channels those of the image."""
        return torch.cat([x, self._of_image(cond, "image_latents").to(x)], 1) if self._reads_image else x

    def _patches(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, E]`, in the order of frames, rows and columns."""
        if self.config.patch_size_t is None:  # a convolution in two dimensions
            made = self.patch_embed["proj"](x.transpose(1, 2).flatten(0, 1))
            return made.unflatten(0, (len(x), -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        x = x.unflatten(4, (-1, self.patch)).unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch_frames))
        tokens: Tensor = self.patch_embed["proj"](x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3))
        return tokens

    def _learned(self, grid: Grid3, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the text and of the clip; sinusoids for another number of frames than was trained on."""
        trained, longest = self._trained_grid, self.config.max_text_seq_length
        if grid != trained:
            return like.new_zeros(1, length, self.width), self._sinusoids(grid, like.device).to(like.dtype)
        table: Tensor = self.patch_embed.get_buffer("pos_embedding").to(like.dtype)
        return table[:, :length], table[:, longest:]

    @property
    def _trained_grid(self) -> Grid3:
        config, patch = self.config, self.patch
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return Grid3(frames, config.sample_height // patch, config.sample_width // patch)

    def _sinusoids(self, grid: Grid3, device: torch.device) -> Tensor:
        """`[N, E]`."""
        scales = self.config.spatial_interpolation_scale, self.config.temporal_interpolation_scale
        size = (grid.width, grid.height)
        table: Tensor = get_3d_sincos_pos_embed(self.width, size, grid.frames, *scales, device, output_type="pt")
        return table.flatten(0, 1)

    def _rotary(self, grid: Grid3, device: torch.device) -> Tensor:
        """`[2, N, D]`. In 1.0 as if the clip had been cut from the middle of one of the size that was trained on, in 1.5 from
        its upper left corner."""
        _, rows, columns = self._trained_grid
        places: dict[str, Any] = {"crops_coords": None, "grid_type": "slice", "max_size": (rows, columns)}
        if self.config.patch_size_t is None:
            scale = min(rows / grid.height, columns / grid.width)
            fitted = round(grid.height * scale), round(grid.width * scale)
            start = round((rows - fitted[0]) / 2), round((columns - fitted[1]) / 2)
            places = {"crops_coords": (start, (start[0] + fitted[0], start[1] + fitted[1]))}
        width, size = self.config.attention_head_dim, (grid.height, grid.width)
        return torch.stack(
            get_3d_rotary_pos_embed(width, grid_size=size, temporal_size=grid.frames, device=device, **places)
        )
