"""LTX-Video text-to-video (2501.00103) over diffusers' LTXVideoTransformer3DModel.

Positions are seconds and pixels, so the network knows the frame rate and how much the codec compresses. From 0.9.5 on, in
layouts of LTXConditionPipeline, a latent frame stands where the first of its frames is, and times are slow at first. From
0.9.1 on the decoder is given a little noise.
Legend: as in `models/backbone.py`; tokens are single latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import LTXConditionPipeline, LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from torch import Tensor, nn

from fewstep.attention import Dense, Grid3, Operation, Pattern
from fewstep.core import Call, Cond, RecipeError
from fewstep.diffusion import LinearQuadratic, Shifted
from fewstep.models.adapters.dits.attention import keys, modulated, out, queries
from fewstep.models.adapters.flow import contract_of
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.network import DiffusersBackbone
from fewstep.models.adapters.presets.ltx import licence_of
from fewstep.models.backbone import Avoided, Context, Original, Tokens, Words, read_text, words_of
from fewstep.models.card import Card, latent_shape_of
from fewstep.models.rotary import turn_pairs
from fewstep.models.spec import Spec
from fewstep.models.video_dit import modulate, time_groups

_TIMESTEPS = 1000
_TEXT_LENGTH = 128
_CONDITION = "LTXConditionPipeline"
_CONDITION_TEXT_LENGTH = 256
_THRESHOLD = 0.025
_DECODE = MappingProxyType({"decode_time": 0.05, "decode_noise": 0.025})
"""What LTX's authors tell and give a decoder that reads a time, from 0.9.1 on (configs/ltxv-2b-0.9.1.yaml, -0.9.5.yaml)."""
_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
"""The negative prompt that LTX's authors sample with."""


def card(layout: Layout) -> Card:
    """LTX as diffusers samples it: 161 frames of 512 x 704 at 25 per second, 50 steps, guidance 3."""
    later, vae = layout.index["_class_name"] == _CONDITION, layout.config("vae")
    codec_settings = {"config": vae, "kind": "AutoencoderKLLTXVideo", "patch": 1, "tiling": False}
    if vae.get("timestep_conditioning"):
        codec_settings |= _DECODE
    codec = Spec("VideoCodec", codec_settings)
    with torch.device("meta"):
        compression = list(codec.build().factors)
    network = {
        "config": layout.config("transformer"), "compression": compression, "fps": 25, "first_pixels": later,
        "pattern": Dense().tree(),
    }  # fmt: skip
    text = {
        "config": layout.config("text_encoder"), "length": _CONDITION_TEXT_LENGTH if later else _TEXT_LENGTH,
        "plain": True, "masked": later, "dtype": "bfloat16",
    }  # fmt: skip
    made = Card(
        name=Path(layout.source).name,
        parts={"denoiser": Spec("LTX", network), "text": Spec("T5Text", text), "codec": codec},
        sources=dict.fromkeys(("denoiser", "text", "codec"), layout.source),
        num_frames=161, height=512, width=704, fps=25, negative_prompt=_NEGATIVE,
        provenance={"source": layout.source, "licence": licence_of(later, network["config"]["num_layers"])},
    )  # fmt: skip
    return at_size(made)


def at_size(card: Card) -> Card:
    """The same model for the size and frame rate of its card: they decide the shift of its times, and its positions."""
    shape, layout = latent_shape_of(card), Layout.find(card.sources["denoiser"])
    assert shape is not None  # `card` gave it a codec
    contract = contract_of(layout.scheduler(), tokens=math.prod(shape[1:]), steps=50, scale=3.0)
    if layout.index["_class_name"] == _CONDITION:
        if contract.grid != Shifted():
            raise RecipeError(
                f"{layout.source}: {_CONDITION} has times of its own, which scheduler_config.json must leave alone; set "
                "shift: 1, use_dynamic_shifting: false and shift_terminal: null"
            )
        contract = replace(contract, grid=LinearQuadratic(threshold=_THRESHOLD))
    denoiser = Spec("LTX", {**card.parts["denoiser"].args, "fps": card.fps})
    return replace(card, parts={**card.parts, "denoiser": denoiser}, contract=contract)


class LTX(DiffusersBackbone):
    """The modules are diffusers' own; `config` is its constructor's arguments.

    `compression` is frames per latent frame and pixels per latent row of the codec, `fps` frames per second; with
    `first_pixels` a latent frame stands where the first of its frames is. Every frame may have its own time, and with
    `pattern` and a cache view it is a causal model.
    """

    network = LTXVideoTransformer3DModel
    shares = True
    text_first = True
    unmixes = True

    def __init__(
        self,
        *,
        config: dict[str, Any],
        compression: list[int],
        fps: int,
        first_pixels: bool = False,
        pattern: Pattern = Dense(),
    ) -> None:
        super().__init__()
        self.args = {
            "config": config, "compression": compression, "fps": fps, "first_pixels": first_pixels,
            "pattern": pattern.tree(),
        }  # fmt: skip
        self.compression, self.fps, self.first_pixels, self.pattern = compression, fps, first_pixels, pattern
        self._hold(self.network.from_config(config))

    def _hold(self, network: LTXVideoTransformer3DModel) -> None:
        config = network.config
        if config.patch_size != 1 or config.patch_size_t != 1:
            raise ValueError(
                "LTX is read with patches of one latent pixel; this network has "
                f"patch_size={config.patch_size}, patch_size_t={config.patch_size_t}"
            )
        self.heads = config.num_attention_heads
        self.width = self.heads * config.attention_head_dim
        self.proj_in, self.time_embed, self.rope = network.proj_in, network.time_embed, network.rope
        time, space = self.compression
        self.rotary = _Rotary(network.rope, self.heads, (time, space), self.fps, self.first_pixels)
        self.caption_projection = network.caption_projection
        self.blocks = nn.ModuleList(
            _Block(block, self.pattern.operation(layer, self.heads, config.attention_head_dim))
            for layer, block in enumerate(network.transformer_blocks)
        )
        self.norm_out, self.proj_out, self.scale_shift_table = (
            network.norm_out, network.proj_out, network.scale_shift_table,
        )  # fmt: skip

    def foreign(self, name: str) -> str:
        return f"transformer_{name}" if name.startswith("blocks.") else name

    def embed(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Tokens:
        grid = self.grid(x)
        with torch.autocast(x.device.type, enabled=False):
            x_BNE = self.proj_in(_tokens(x))
            time_BG = time_groups(t, x)
            modulation, time = self.time_embed(_TIMESTEPS * time_BG.flatten(), batch_size=len(x), hidden_dtype=x.dtype)
            text = call.constant("words", lambda: self.caption_projection(cond.text.to(x.dtype)))
            avoided = Avoided.of(call, lambda negative: self.caption_projection(negative.text.to(x.dtype)), masked=True)
        context = Context(
            modulation_BG6E=modulation.unflatten(0, time_BG.shape).unflatten(-1, (6, self.width)),
            text_BLE=text,
            text_mask_B11L=cond.mask[:, None, None],
            rotary=self.rotary,
            table=self.turns(grid, x, call),
            site=self.site(self.pattern, grid, call, x.device),
            avoided=avoided,
        )
        return Tokens(x_BNE, time.unflatten(0, time_BG.shape), grid, context)

    def head(self, state: Tokens) -> Tensor:
        with torch.autocast(state.x_BNE.device.type, enabled=False):
            shift, scale = (self.scale_shift_table + state.time_BGE[:, :, None]).unbind(2)
            tokens_BNC = self.proj_out(modulate(self.norm_out(state.x_BNE), shift, scale))
        return _latents(tokens_BNC, state.grid)

    def original(self) -> Original:
        """Diffusers' newer pipeline gives latents, the older one tokens."""
        original = super().original()._replace(pack=_tokens, told={"frame_rate": self.fps})
        if self.first_pixels:
            return original
        return original._replace(unpack=lambda made, shape: _latents(made, shape[2:]))

    def by_original(self, network: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        time, space = self.compression
        text, size = cond.text.to(x.dtype), x.shape[2:]
        options: dict[str, Any] = {"rope_interpolation_scale": (time / self.fps, space, space)}
        if self.first_pixels:
            places = LTXConditionPipeline._prepare_video_ids(len(x), *size, device=x.device)
            places = LTXConditionPipeline._scale_video_ids(places, space, time, 0, x.device).float()
            places[:, 0] = places[:, 0] * (1 / self.fps)
            options = {"video_coords": places}
        made = network(_tokens(x), text, _TIMESTEPS * t, cond.mask, *size, **options, return_dict=False)[0]
        return _latents(made, size)

    def grid(self, x: Tensor) -> Grid3:
        if x.shape[1] != self.proj_in.in_features:
            raise ValueError(f"latents [B, C, F, H, W] need C = {self.proj_in.in_features}, got {tuple(x.shape)}")
        return Grid3(*x.shape[2:])


@dataclass(frozen=True, eq=False)
class _Rotary:
    """LTX's angles, which differ from head to head: of seconds and pixels. float32, as it was trained."""

    rope: nn.Module
    heads: int
    compression: tuple[int, int]
    fps: int
    first_pixels: bool
    longest: int | None = None

    def table(self, frames: Tensor, grid: Grid3, like: Tensor) -> Tensor:
        if frames.ndim == 2:
            return torch.stack([self.table(row, grid, like) for row in frames], 1)
        (time, space), frames = self.compression, frames.float()
        seconds = frames * (time / self.fps)
        if self.first_pixels:
            seconds = (frames * time + 1 - time).clamp_min(0) * (1 / self.fps)
        axes = seconds, torch.arange(grid.height).float() * space, torch.arange(grid.width).float() * space
        places_13M = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)[None]
        tables_2ME = torch.stack([table[0, :, ::2] for table in self.rope(places_13M, video_coords=places_13M)])
        return tables_2ME.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(like)

    def turn(self, x_BHMD: Tensor, table: Tensor) -> Tensor:
        return turn_pairs(x_BHMD, table)


class _Block(nn.Module):
    """One of diffusers' blocks: self-attention, cross-attention to the text, MLP; the first and last modulated by time."""

    def __init__(self, block: LTXVideoTransformerBlock, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.norm1, self.attn1, self.attn2 = block.norm1, block.attn1, block.attn2
        self.norm2, self.ff = block.norm2, block.ff
        self.scale_shift_table = block.scale_shift_table

    def forward(self, state: Tokens) -> Tokens:
        def cross(x: Tensor) -> Tensor:
            words = state.text or self.reads(state.context)
            return out(self.attn2, read_text(queries(self.attn2, x), words, state.context))

        return modulated(self, state, cross, self.norm2, self.ff)

    def reads(self, context: Context) -> Words:
        """Keys and values of the text."""
        return words_of(context, lambda text: keys(self.attn2, text, context.modulation_BG6E.dtype))


def _tokens(x: Tensor) -> Tensor:
    """`[B, N, C]` of latents."""
    return x.flatten(2).transpose(1, 2)


def _latents(tokens_BNC: Tensor, grid: Sequence[int]) -> Tensor:
    """`[B, C, F, H, W]` again."""
    return tokens_BNC.transpose(1, 2).unflatten(2, grid)
