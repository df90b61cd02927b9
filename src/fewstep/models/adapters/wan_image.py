"""The image that a clip of Wan begins with, as Wan reads it: by CLIP's vision encoder (2103.00020), and as latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from fewstep.models.adapters.codec import VideoCodec


class WanImage(nn.Module):
    """`config` is that of transformers' CLIPVisionModel; None for models that read the latents alone (Wan 2.2 A14B).

    The weights are kept as `dtype`, and never trained.
    """

    folders: ClassVar[tuple[str, ...]] = ("image_encoder", "image_processor")

    def __init__(self, *, config: dict[str, Any] | None, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        super().__init__()
        self.args = {"config": config, "dtype": dtype}
        self.dtype = getattr(torch, dtype)
        self.encoder = None if config is None else CLIPVisionModel(CLIPVisionConfig(**config)).to(self.dtype)
        self.processor: Any = None

    def load(self, folder: Path) -> None:
        """Take weights and processor of a folder in diffusers' layout."""
        if self.encoder is not None:
            encoder, processor = (folder / part for part in self.folders)
            self.encoder = CLIPVisionModel.from_pretrained(encoder, dtype=self.dtype, use_safetensors=True)
            self.processor = CLIPImageProcessor.from_pretrained(processor)

    @torch.no_grad()
    def encode(self, image: Tensor, codec: VideoCodec, num_frames: int) -> dict[str, Tensor]:
        """Of images `[B, 3, H, W]` in [-1, 1] as large as the clips, by their names in `Cond.extra`:

        `image_latents` `[B, m + C, F, h, w]`, a mask that is 1 in the first frame and the latents of the image before black
        frames; `image_states` `[B, L, D]`, the last but one of CLIP's layers.
        """
        later = image.new_zeros(*image.shape[:2], num_frames - 1, *image.shape[2:])
        latents = codec.encode(torch.cat([image[:, :, None], later], 2))
        mask = torch.zeros_like(latents[:, :1]).repeat(1, codec.vae.config.scale_factor_temporal, 1, 1, 1)
        mask[:, :, 0] = 1
        made = {"image_latents": torch.cat([mask, latents], 1)}
        if self.encoder is not None:
            pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            seen = self.processor(images=list(pixels.cpu()), return_tensors="pt").pixel_values.to(self.encoder.device)
            with torch.autocast(seen.device.type, enabled=False):
                states = self.encoder(seen.to(self.dtype), output_hidden_states=True).hidden_states[-2]
            made["image_states"] = states.float()
        return made
