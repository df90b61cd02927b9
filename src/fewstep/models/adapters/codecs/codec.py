"""Pixels to latents and back with diffusers' video autoencoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import torch
from torch import Tensor, nn

from fewstep.core import Rng
from fewstep.models.adapters.codecs.chunks import CHUNKS, ChunkDecoder
from fewstep.models.decoding import Decoded
from fewstep.models.encoding import Encoded

Kind = Literal[
    "AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
]  # fmt: skip


class VideoCodec(nn.Module):
    """Latents have mean 0 and deviation 1 per channel, as the denoiser knows them; clip by clip, in float32 unless told
    otherwise.

    `config` is the arguments of diffusers' class `kind`; the denoiser takes latents in whole patches of `patch` rows and
    columns, and of `patch_frames` frames: repetitions of the first one are put before it, and left out again when decoded.
    With `tiling` large frames are done in overlapping tiles, which need less memory and are not exactly the whole. A decoder
    that reads a time is told `decode_time` and given latents of which `decode_noise` is noise, the same for every clip.
    """

    folders: ClassVar[tuple[str, ...]] = ("vae",)
    one_at_a_time: ClassVar[bool] = True
    """Whether the clips of a batch are encoded one after the other; some of these autoencoders support only this."""

    def __init__(
        self,
        *,
        config: dict[str, Any],
        kind: Kind = "AutoencoderKLWan",
        patch: int = 1,
        patch_frames: int = 1,
        tiling: bool = False,
        decode_time: float = 0.0,
        decode_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.args = {
            "config": config, "kind": kind, "patch": patch, "patch_frames": patch_frames, "tiling": tiling,
            "decode_time": decode_time, "decode_noise": decode_noise,
        }  # fmt: skip
        self.kind, self.patch, self.patch_frames = getattr(diffusers, kind), patch, patch_frames
        self.decode_time, self.decode_noise = decode_time, decode_noise
        self._chunks: type[ChunkDecoder] = CHUNKS[kind]
        self._hold(self.kind.from_config(config))

    def load(self, folder: Path) -> None:
        """Take the weights of a folder in diffusers' layout, as float32."""
        self._hold(
            self.kind.from_pretrained(
                folder, subfolder=self.folders[0], torch_dtype=torch.float32, use_safetensors=True
            )
        )

    def _hold(self, vae: Any) -> None:
        self.vae = vae
        self.tile(bool(self.args["tiling"]))

    @property
    def chunks_in_tiles(self) -> bool:
        """Whether chunks can be decoded while large frames are decoded in tiles."""
        return self._chunks.tiles

    @property
    def whole_in_chunks(self) -> bool:
        """Whether chunks give exactly the frames that the whole clip gives."""
        noisy = any(self.vae.config.get("decoder_inject_noise") or ())
        return not noisy and not self.vae.use_tiling and self.kind.__name__ != "AutoencoderKLLTXVideo"

    def tile(self, on: bool) -> None:
        """Do large frames in tiles from now on, or no more."""
        self.vae.enable_tiling() if on else self.vae.disable_tiling()

    @property
    def factors(self) -> tuple[int, int]:
        """Frames per latent frame, and pixels per latent row and column."""
        vae, config = self.vae, self.vae.config
        if "scale_factor_temporal" in config:  # Wan
            return config.scale_factor_temporal, config.scale_factor_spatial
        if "spatial_compression_ratio" in config:  # LTX, Hunyuan
            return vae.temporal_compression_ratio, vae.spatial_compression_ratio
        return config.temporal_compression_ratio, 2 ** (len(config.block_out_channels) - 1)  # CogVideoX

    def encode(self, frames: Tensor, *, autocast: bool = False) -> Tensor:
        """`[B, 3, F, H, W]` in [-1, 1] to latents `[B, *latent_shape(F, H, W)]`: the mode of the posterior.

        With `autocast` convolutions are computed in bfloat16.
        """
        _, whole, _, _ = self.latent_shape(*frames.shape[2:])
        mean, std = self._statistics(frames)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=autocast):
            modes = [self.vae.encode(clip).latent_dist.mode() for clip in frames.float().split(1)]
        latents = (torch.cat(modes).float() - mean) / std
        missing = whole - latents.shape[2]
        return torch.cat([latents[:, :, :1].repeat(1, 1, missing, 1, 1), latents], 2) if missing else latents

    def encode_next(self, frames: Tensor, past: Any = None) -> Encoded:
        """As in `ChunkEncoder`: the first latent comes with the first frame, each further one with the next four (Wan). What is
        remembered does not grow with the clip. ValueError for other encoders, and in tiles."""
        chunks = self._chunks(self.vae)
        if self.vae.use_tiling:
            raise ValueError(f"{self.kind.__name__} does not encode chunks in tiles; set tiling: false")
        channels, _, height, width = self.latent_shape(1, *frames.shape[3:])
        mean, std = self._statistics(frames)
        with torch.autocast(frames.device.type, enabled=False):
            pairs = zip(frames.float().split(1), past or [None] * len(frames), strict=True)
            made = [chunks.encode(clip, seen) for clip, seen in pairs]
        nothing = frames.new_zeros(1, channels, 0, height, width, dtype=torch.float32)
        latents = torch.cat([torch.cat([nothing, *parts], 2) for parts, _ in made])
        return Encoded((latents - mean) / std, [seen for _, seen in made])

    def decode(self, latents: Tensor) -> Tensor:
        """The frames, in [-1, 1]."""
        clips = self._own(latents, 0)
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([self.vae.decode(clip, **self._told(latents)).sample for clip in clips.split(1)])

    def decode_next(self, latents: Tensor, past: Any = None, *, last: bool = False) -> Decoded:
        """As in `ChunkCodec`. Joined, the frames are those of `decode`; but for LTX, whose decoder looks far ahead: those of
        overlapping tiles of three latent frames.

        The first frames come with the first latent (Wan, HunyuanVideo 1.5), the third (CogVideoX, LTX) or the fifth
        (HunyuanVideo). What is remembered does not grow with the clip, but for keys and values of one attention layer in
        HunyuanVideo 1.5. ValueError where it cannot be done.
        """
        chunks = self._chunks(self.vae, self._told(latents))
        if self.vae.use_tiling and not chunks.tiles:
            raise ValueError(f"{self.kind.__name__} does not decode chunks in tiles; set tiling: false")
        if any(self.vae.config.get("decoder_inject_noise") or ()):
            raise ValueError("this autoencoder draws noise for a whole clip; decode its clips whole")
        before, pasts = past or (0, [None] * len(latents))
        with torch.autocast(latents.device.type, enabled=False):
            clips = self._own(latents, before).split(1)
            made = [chunks.next(clip, seen, last) for clip, seen in zip(clips, pasts, strict=True)]
        (_, space), (height, width) = self.factors, latents.shape[3:]
        nothing = latents.new_zeros(1, 3, 0, height * space, width * space, dtype=torch.float32)
        frames = [torch.cat([nothing, *parts], 2) for parts, _ in made]
        return Decoded(torch.cat(frames), (before + latents.shape[2], [seen for _, seen in made]))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`(C, F, h, w)` of a clip; ValueError if the size cannot be encoded."""
        config, (time, space) = self.vae.config, self.factors
        unit = time * self._chunks.group
        if num_frames % unit != 1:
            near = num_frames // unit * unit + 1
            raise ValueError(f"num_frames must be {unit} k + 1 for this codec, such as {near}, got {num_frames}")
        if height % (space * self.patch) or width % (space * self.patch):
            raise ValueError(f"height and width must be multiples of {space * self.patch}, got {height} x {width}")
        channels = config["z_dim"] if "z_dim" in config else config["latent_channels"]
        frames = -(-(num_frames // time + 1) // self.patch_frames) * self.patch_frames
        return channels, frames, height // space, width // space

    def clip_frames(self, latents: int) -> int:
        """Frames of a clip of so many latent frames, 1 at least."""
        return (latents - self.patch_frames) * self.factors[0] + 1

    def _own(self, latents: Tensor, before: int) -> Tensor:
        """The autoencoder's own latents of those that follow `before` others, without what only fills the first patch."""
        mean, std = self._statistics(latents)
        z = latents.float() * std + mean
        if self.decode_noise and z.shape[2]:
            _, channels, frames, height, width = z.shape
            shape, rng = (channels, height, width), Rng(0, device=str(z.device))
            drawn = [rng.randn(shape, f"decode/{frame}") for frame in range(before, before + frames)]
            z = torch.lerp(z, torch.stack(drawn, 1).expand_as(z), self.decode_noise)
        return z if before else z[:, :, self.patch_frames - 1 :]

    def _told(self, latents: Tensor) -> dict[str, Tensor]:
        """What the decoder reads besides."""
        reads_time = self.vae.config.get("timestep_conditioning", False)
        return {"temb": torch.full((1,), self.decode_time, device=latents.device)} if reads_time else {}

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's own latents, which its config or its weights name."""
        config = self.vae.config
        known = {**config, **dict(self.vae.named_buffers(recurse=False))}

        def per_channel(name: str, otherwise: float) -> Tensor:
            value = otherwise if known.get(name) is None else known[name]
            return torch.as_tensor(value, dtype=torch.float32, device=like.device).reshape(-1, 1, 1, 1)

        return per_channel("latents_mean", 0.0), per_channel("latents_std", 1.0) / config.get("scaling_factor", 1.0)
