"""Chunk-by-chunk decoding with diffusers' video autoencoders, and the memory each needs between chunks.

Legend: z latents of the autoencoder itself, `[B, C, f, h, w]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor, nn


class ChunkDecoder(ABC):
    """One autoencoder's way. Nothing is kept here: all that was seen is in the `past` that goes in and comes out."""

    tiles: ClassVar[bool] = False
    """Whether chunks can be decoded while large frames are decoded in tiles."""
    group: ClassVar[int] = 1
    """Latent frames decoded together after the first; a clip has one plus a multiple of this number."""

    def __init__(self, vae: Any, options: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.vae, self.options = vae, options

    def encode(self, frames: Tensor, past: Any) -> tuple[list[Tensor], Any]:
        """The autoencoder's own latents of `[1, 3, F, H, W]` that can be made now, one by one, and what the next call needs.

        ValueError for encoders that read what comes after a frame, or a clip as a whole.
        """
        raise ValueError(
            f"the encoder of {type(self.vae).__name__} does not work chunk by chunk; encode the whole clip, or take a model with "
            "Wan's autoencoder"
        )

    @abstractmethod
    def next(self, z: Tensor, past: Any, last: bool) -> tuple[list[Tensor], Any]:
        """The frames that can be made now, in pieces, and what the next call needs.

        `past` is None where the clip begins; with `last` nothing follows.
        """


class WanChunks(ChunkDecoder):
    """Latent by latent, as Wan decodes whole clips: every convolution remembers the last two frames that it read."""

    def next(self, z: Tensor, past: Any, last: bool) -> tuple[list[Tensor], Any]:
        made, patch = [], self.vae.config.patch_size or 1
        for frame in frames_of(z):
            begins = past is None
            cache = [None] * _causal(self.vae.decoder) if begins else list(past)
            z_1 = self.vae.post_quant_conv(frame)
            decoded = self.vae.decoder(z_1, feat_cache=cache, feat_idx=[0], first_chunk=begins)
            made.append(unpatchify(decoded, patch).clamp(-1, 1))
            past = cache
        return made, past

    def encode(self, frames: Tensor, past: Any) -> tuple[list[Tensor], Any]:
        """One frame first, then four by four, as Wan encodes whole clips."""
        waiting, cache = past or (frames[:, :, :0], None)
        waiting, made = torch.cat([waiting, frames], 2), list[Tensor]()
        while waiting.shape[2] >= (size := 1 if cache is None else 4):
            cache = [None] * _causal(self.vae.encoder) if cache is None else list(cache)
            x = waiting[:, :, :size]
            x = x if self.vae.config.patch_size is None else patchify(x, self.vae.config.patch_size)
            made.append(self.vae.quant_conv(self.vae.encoder(x, feat_cache=cache, feat_idx=[0])).chunk(2, 1)[0])
            waiting = waiting[:, :, size:]
        return made, (waiting.clone(), cache)


class CogVideoXChunks(ChunkDecoder):
    """Three latents first, then two at a time, as CogVideoX decodes whole clips: its norms are over such groups."""

    group = 2

    def next(self, z: Tensor, past: Any, last: bool) -> tuple[list[Tensor], Any]:
        waiting, cache = past or (z[:, :, :0], None)
        waiting, made = torch.cat([waiting, z], 2), []
        while waiting.shape[2] >= (size := self.group + (cache is None)):
            frames, cache = self._decode(waiting[:, :, :size], cache)
            made.append(frames)
            waiting = waiting[:, :, size:]
        if last and waiting.shape[2]:
            if cache is not None:
                raise ValueError("CogVideoX decodes 2 k + 1 latent frames, and this clip ended with one more")
            made.append(self._decode(waiting, None)[0])
        return made, (waiting, cache)

    def _decode(self, z: Tensor, cache: Any) -> tuple[Tensor, Any]:
        after: nn.Module | None = self.vae.post_quant_conv
        frames, cache = self.vae.decoder(z if after is None else after(z), conv_cache=cache)
        return frames, cache


class TimeTiles(ChunkDecoder):
    """Overlapping tiles of a few latents, blended into each other: decoders whose frames read what comes after them."""

    tiles = True

    def next(self, z: Tensor, past: Any, last: bool) -> tuple[list[Tensor], Any]:
        vae, ratio = self.vae, self.vae.temporal_compression_ratio
        size, stride = vae.tile_sample_min_num_frames // ratio + 1, vae.tile_sample_stride_num_frames // ratio
        blend = vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames
        waiting, tail = past or (z[:, :, :0], None)
        waiting, made = torch.cat([waiting, z], 2), list[Tensor]()
        while waiting.shape[2] >= size or (last and waiting.shape[2]):
            frames = self._decode(waiting[:, :, :size])
            if tail is None and waiting.shape[2] < size:  # the whole clip is shorter than a tile
                return [*made, frames], (waiting[:, :, :0], None)
            kept = stride * ratio + 1
            if tail is not None:  # the first frame is that of a clip which begins here
                frames, kept = vae.blend_t(tail, frames[:, :, 1:].contiguous(), blend), kept - 1
            made.append(frames[:, :, :kept])
            waiting, tail = waiting[:, :, stride:], frames[:, :, -blend:].clone()
        return made, (waiting, tail)

    def _decode(self, z: Tensor) -> Tensor:
        vae, space = self.vae, self.vae.spatial_compression_ratio
        rows, columns = vae.tile_sample_min_height // space, vae.tile_sample_min_width // space
        if vae.use_tiling and (z.shape[3] > rows or z.shape[4] > columns):
            tiled: Tensor = vae.tiled_decode(z, **self.options).sample
            return tiled
        after = getattr(vae, "post_quant_conv", None)
        frames: Tensor = vae.decoder(z if after is None else after(z), **self.options)
        return frames


class HunyuanVideo15Chunks(ChunkDecoder):
    """Latent by latent: convolutions remember the last two frames that they read, the attention keys and values of all."""

    def next(self, z: Tensor, past: Any, last: bool) -> tuple[list[Tensor], Any]:
        made = []
        for frame in frames_of(z):
            walk = _Walk(past or ())
            made.append(walk.decode(self.vae.decoder, frame))
            past = walk.new
        return made, past


class _Walk:
    """One latent frame through the decoder of HunyuanVideo 1.5; `past` is the `new` of the frame before, one entry per module."""

    def __init__(self, past: Sequence[Any]) -> None:
        self.past, self.new = past, list[Any]()

    def decode(self, decoder: Any, z: Tensor) -> Tensor:
        x = self._conv(decoder.conv_in, z) + z.repeat_interleave(decoder.repeat, 1)
        first, *rest = decoder.mid_block.resnets
        x = self._resnet(first, x)
        for attention, block in zip(decoder.mid_block.attentions, rest, strict=True):
            x = self._resnet(block, x if attention is None else self._attend(attention, x))
        for up in decoder.up_blocks:
            for block in up.resnets:
                x = self._resnet(block, x)
            for upsampler in up.upsamplers or ():
                x = self._upsample(upsampler, x)
        return self._conv(decoder.conv_out, decoder.conv_act(decoder.norm_out(x)))

    def _conv(self, conv: Any, x: Tensor) -> Tensor:
        left, right, top, bottom, back, _ = conv.time_causal_padding
        before = self.past[len(self.new)] if self.past else x[:, :, :1].repeat(1, 1, back, 1, 1)
        read = torch.cat([before, x], 2)
        self.new.append(read[:, :, -back:].clone())  # not a view, which would keep all of `read`
        padded: Tensor = conv.conv(F.pad(read, (left, right, top, bottom, 0, 0), mode=conv.pad_mode))
        return padded

    def _resnet(self, block: Any, x: Tensor) -> Tensor:
        h = self._conv(block.conv1, block.nonlinearity(block.norm1(x)))
        h = self._conv(block.conv2, block.nonlinearity(block.norm2(h)))
        return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))

    def _attend(self, block: Any, x: Tensor) -> Tensor:
        h = block.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (block.to_q, block.to_k, block.to_v))
        if self.past:
            k, v = (torch.cat(both, 2) for both in zip(self.past[len(self.new)], (k, v), strict=True))
        self.new.append((k, v))
        read = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        mixed: Tensor = block.proj_out(read)
        return x + mixed

    def _upsample(self, block: Any, x: Tensor) -> Tensor:
        """Twice as many rows and columns, and twice as many frames but of the clip's first."""
        h, arrange, repeats = self._conv(block.conv, x), block._dcae_upsample_rearrange, block.repeats
        made: Tensor
        if not block.add_temporal_upsample:
            made = arrange(h) + arrange(x.repeat_interleave(repeats, 1))
        elif self.past:
            made = arrange(h, 2) + arrange(x, 2).repeat_interleave(repeats, 1)
        else:
            made = arrange(h)[:, : h.shape[1] // 8] + arrange(x).repeat_interleave(repeats // 2, 1)
        return made


def _causal(network: nn.Module) -> int:
    """Number of convolutions that remember frames."""
    return sum(isinstance(module, WanCausalConv3d) for module in network.modules())


def frames_of(z: Tensor) -> tuple[Tensor, ...]:
    """Its latent frames, one by one; none of an empty chunk."""
    return z.split(1, 2) if z.shape[2] else ()


CHUNKS: Mapping[str, type[ChunkDecoder]] = MappingProxyType(
    {
        "AutoencoderKLWan": WanChunks, "AutoencoderKLCogVideoX": CogVideoXChunks, "AutoencoderKLLTXVideo": TimeTiles,
        "AutoencoderKLHunyuanVideo": TimeTiles, "AutoencoderKLHunyuanVideo15": HunyuanVideo15Chunks,
    }
)  # fmt: skip
"""By diffusers' class."""
