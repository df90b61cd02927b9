"""Diffusers' U-Nets in three parts: the blocks are down, middle and up, and the state carries the skip connections.

Every clip is a batch of images; only the motion modules of a video U-Net know which of them belong together.
Legend: B clips, F frames, K = B x F images, C channels, L text tokens, D their width, E width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core import Call, Cond
from fewstep.diffusion import timestep
from fewstep.models.adapters.ddpm import require_whole_clips
from fewstep.models.adapters.network import DiffusersBackbone
from fewstep.models.backbone import State

_REFUSED = (
    "class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type",
    "center_input_sample", "time_embedding_act_fn", "dropout", "time_cond_proj_dim",
)  # fmt: skip
"""Settings of diffusers' U-Nets that need inputs or steps which this contract does not have."""


@dataclass(frozen=True)
class UNetState(State):
    """What flows from block to block."""

    x_KCHW: Tensor
    time_KE: Tensor
    text_KLD: Tensor
    frames: int
    skips: tuple[Tensor, ...]
    """Outputs of the down blocks that the up blocks have not read yet; the next one is last."""

    @property
    def volume(self) -> Tensor:
        return to_clips(self.x_KCHW, self.frames)

    @property
    def streams(self) -> tuple[Tensor, ...]:
        return self.x_KCHW, *self.skips

    def with_streams(self, streams: Sequence[Tensor]) -> UNetState:
        return replace(self, x_KCHW=streams[0], skips=tuple(streams[1:]))


class UNet(DiffusersBackbone):
    """A U-Net of diffusers: one text condition and one time per clip, predicting a tensor like the latents.

    All text tokens are read, padding included, as these models were trained.
    """

    folders = ("unet",)

    def __init__(self, *, config: dict[str, Any], num_train_timesteps: int = 1000) -> None:
        """`config` is the arguments of diffusers' class; ValueError where it asks for more than text and time."""
        super().__init__()
        self.args = {"config": config, "num_train_timesteps": num_train_timesteps}
        self.num_train_timesteps = num_train_timesteps
        self._hold(self.network.from_config(config))

    def _hold(self, network: Any) -> None:
        for key in _REFUSED:
            if network.config.get(key):
                raise ValueError(
                    f"a {type(self).__name__} with {key}: {network.config[key]!r} cannot be read: it does more than "
                    "denoise by one text and one time; give a text-to-image or text-to-video model of SD 1.x or 2.x, or, for a "
                    "network that is told its guidance, make a student of it (fewstep import)"
                )
        self.config, self.factor = network.config, 2**network.num_upsamplers
        self.time_proj, self.time_embedding, self.conv_in = network.time_proj, network.time_embedding, network.conv_in
        downs, ups = map(Down, network.down_blocks), map(Up, network.up_blocks)
        self.blocks = nn.ModuleList([*downs, Mid(network.mid_block), *ups])
        self.conv_norm_out, self.conv_act, self.conv_out = network.conv_norm_out, network.conv_act, network.conv_out

    @property
    def widths(self) -> tuple[int, ...]:
        down = tuple(self.config["block_out_channels"])
        return (*down, down[-1], *reversed(down))

    def embed(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> UNetState:
        self._check(x, t, call)
        frames = x.shape[2]
        with torch.autocast(x.device.type, enabled=False):
            features = self.time_proj(timestep(t, self.num_train_timesteps)).to(x.dtype)
            time_KE = self.time_embedding(features).repeat_interleave(frames, 0)
            x_KCHW = self.conv_in(to_images(x))
        text_KLD = cond.text.to(x.dtype).repeat_interleave(frames, 0)
        return UNetState(x_KCHW, time_KE, text_KLD, frames, (x_KCHW,))

    def head(self, state: UNetState) -> Tensor:
        with torch.autocast(state.x_KCHW.device.type, enabled=False):
            x = self.conv_norm_out(state.x_KCHW.to(self.conv_out.weight.dtype))
            return to_clips(self.conv_out(self.conv_act(x)), state.frames)

    def by_original(self, network: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        steps = timestep(t, self.num_train_timesteps)
        made: Tensor = network(x, steps, cond.text.to(x.dtype).repeat_interleave(x.shape[2], 0), return_dict=False)[0]
        return made

    def foreign(self, name: str) -> str:
        depth = len(self.config["block_out_channels"])
        if not name.startswith("blocks."):
            return name
        _, index, _, rest = name.split(".", 3)
        block = int(index)
        if block == depth:
            return f"mid_block.{rest}"
        return f"down_blocks.{block}.{rest}" if block < depth else f"up_blocks.{block - depth - 1}.{rest}"

    def _check(self, x: Tensor, t: Tensor, call: Call) -> None:
        if x.shape[1] != self.config["in_channels"] or x.shape[3] % self.factor or x.shape[4] % self.factor:
            raise ValueError(
                f"latents [B, C, F, H, W] need C = {self.config['in_channels']} and H, W multiples of {self.factor}, "
                f"got {tuple(x.shape)}"
            )
        require_whole_clips(type(self).__name__, x, t, call)


class _Block(nn.Module):
    """A block of diffusers' U-Net, given what it reads of the state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def run(self, state: UNetState, **more: Any) -> Any:
        if getattr(self.inner, "has_cross_attention", False):
            more["encoder_hidden_states"] = state.text_KLD
        if hasattr(self.inner, "motion_modules"):
            more["num_frames"] = state.frames
        return self.inner(hidden_states=state.x_KCHW, temb=state.time_KE, **more)


class Down(_Block):
    """Leaves its outputs on the skip stack."""

    def forward(self, state: UNetState) -> UNetState:
        x, skips = self.run(state)
        return replace(state, x_KCHW=x, skips=(*state.skips, *skips))


class Mid(_Block):
    """The block at the lowest resolution."""

    def forward(self, state: UNetState) -> UNetState:
        return replace(state, x_KCHW=self.run(state))


class Up(_Block):
    """Takes as many skips as it has convolutional layers from the top of the stack."""

    def forward(self, state: UNetState) -> UNetState:
        count = len(self.inner.resnets)
        x = self.run(state, res_hidden_states_tuple=state.skips[-count:])
        return replace(state, x_KCHW=x, skips=state.skips[:-count])


def to_images(x_BCFHW: Tensor) -> Tensor:
    """`[K, C, H, W]`, the frames of a clip next to each other."""
    return x_BCFHW.transpose(1, 2).flatten(0, 1)


def to_clips(x_KCHW: Tensor, frames: int) -> Tensor:
    """`[B, C, F, H, W]` again."""
    return x_KCHW.unflatten(0, (-1, frames)).transpose(1, 2)
