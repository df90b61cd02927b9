"""The state of a transformer with joint attention: tokens of the clip and of the text, which flow side by side.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.attention import Grid3, Pattern, Site, Ulysses
from fewstep.core import Call
from fewstep.models.adapters.ddpm import require_whole_clips
from fewstep.models.backbone import Backbone, State
from fewstep.models.video_dit import unpatchify


@dataclass(frozen=True)
class Streams(State):
    """What flows from block to block, and what every block reads."""

    x_BNE: Tensor
    text_BLE: Tensor
    time_BE: Tensor
    grid: Grid3
    site: Site
    rotary_2ND: Tensor | None = None
    """Cosines and sines of the clip's tokens; None if positions were added to the tokens."""
    shared: Ulysses | None = None
    """Processes that hold the other tokens of these clips; None if clips are not shared. All of them have the text."""

    @property
    def volume(self) -> Tensor:
        return self.joined.x_BNE.unflatten(1, self.grid).permute(0, 4, 1, 2, 3)

    @property
    def streams(self) -> tuple[Tensor, ...]:
        return self.x_BNE, self.text_BLE

    def with_streams(self, streams: Sequence[Tensor]) -> Streams:
        return replace(self, x_BNE=streams[0], text_BLE=streams[1])

    def split(self, processes: Ulysses) -> Streams:
        """This process' share of the clip's tokens, with their positions."""
        rotary = None if self.rotary_2ND is None else processes.split(self.rotary_2ND, 1)
        return replace(self, x_BNE=processes.split(self.x_BNE, 1), rotary_2ND=rotary, shared=processes)

    @property
    def joined(self) -> Streams:
        if self.shared is None:
            return self
        return replace(self, x_BNE=self.shared.join(self.x_BNE, 1), shared=None)


def whole_grid(network: Backbone, x: Tensor, t: Tensor, call: Call, *, channels: int, patch: int) -> Grid3:
    """The tokens of whole clips with one time each. ValueError for other latents than `network` takes."""
    _, given, frames, height, width = x.shape
    if given != channels or frames % network.patch_frames or height % patch or width % patch:
        raise ValueError(
            f"latents [B, C, F, H, W] need C = {channels}, F a multiple of {network.patch_frames} and H, W multiples of "
            f"{patch}, got {tuple(x.shape)}"
        )
    require_whole_clips(type(network).__name__, x, t, call)
    return Grid3(frames // network.patch_frames, height // patch, width // patch)


def beside_text(site: Site, pattern: Pattern, text_BLE: Tensor, mask_BL: Tensor | None = None) -> Site:
    """The site of self-attention with the text's tokens before the clip's; of the text, those of the mask are read (None: all).

    ValueError where `pattern` cannot be right there.
    """
    site = replace(site, beside=text_BLE.shape[1])
    pattern.check(site)
    if mask_BL is None:
        return site
    readable = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), site.grid.tokens)], 1)
    return replace(site, readable_B11M=readable[:, None, None])


def projected(state: Streams, norm: nn.Module, projection: nn.Module, patch: int) -> Tensor:
    """The network's output of the last state: `norm` told the time, then `projection`, in float32."""
    with torch.autocast(state.x_BNE.device.type, enabled=False):
        tokens = projection(norm(state.x_BNE, state.time_BE))
    return unpatchify(tokens, state.grid, patch)
