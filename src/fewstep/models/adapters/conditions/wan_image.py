"""First and last frames for Wan: states of CLIP's vision encoder (2103.00020), and latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

Reads = Literal["image", "ends", "frame"]
"""image: the first image; a last one too, where there is no vision encoder (Wan 2.1 I2V, Wan 2.2 I2V-A14B).
ends: the first and the last image (Wan 2.1 FLF2V). frame: the latents of the image are the clip's first frame (TI2V-5B)."""


class WanImage(nn.Module):
    """`config` is that of transformers' CLIPVisionModel; None for models that read latents alone (Wan 2.2).

    The weights are kept as `dtype`, and never trained.
    """

    folders: ClassVar[tuple[str, ...]] = ("image_encoder", "image_processor")

    def __init__(
        self,
        *,
        config: dict[str, Any] | None,
        reads: Reads = "image",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        self.args = {"config": config, "reads": reads, "dtype": dtype}
        self.reads, self.dtype = reads, getattr(torch, dtype)
        self.encoder = None if config is None else CLIPVisionModel(CLIPVisionConfig(**config)).to(self.dtype)
        self.processor: Any = None

    def load(self, folder: Path) -> None:
        """Take weights and processor of a folder in diffusers' layout."""
        if self.encoder is not None:
            encoder, processor = (folder / part for part in self.folders)
            self.encoder = CLIPVisionModel.from_pretrained(encoder, dtype=self.dtype, use_safetensors=True)
            self.processor = CLIPImageProcessor.from_pretrained(processor)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its conditions in `Cond.extra`."""
        return ("image_latents",) if self.encoder is None else ("image_latents", "image_states")

    @property
    def needs_last(self) -> bool:
        """Whether a clip needs its last image as well as its first."""
        return self.reads == "ends"

    def check_last(self, given: bool) -> None:
        """ValueError if a last image was `given` that is not read, or was not and is needed."""
        if given and (self.reads == "frame" or (self.reads == "image" and self.encoder is not None)):
            raise ValueError("this model reads the first image of a clip only; leave out last_image (--last-image)")
        if not given and self.needs_last:
            raise ValueError("this model makes clips between two images; give last_image (--last-image) as well")

    @torch.no_grad()
    def encode(self, image: Tensor, codec: Any, num_frames: int, last_image: Tensor | None = None) -> dict[str, Tensor]:
        """Conditions for images `[B, 3, H, W]` in [-1, 1] at the clips' size, by their names in `Cond.extra`:

        `image_latents` `[B, m + C, F, h, w]`, a mask that is 1 in the frames that are given and the latents of a clip that is
        grey elsewhere, or `[B, C, 1, h, w]` if the model reads a frame; `image_states` `[B, L, D]`, the last but one of CLIP's
        layers, of the last image after those of the first. ValueError for a last image of no use, or a missing one.
        """
        self.check_last(last_image is not None)
        if self.reads == "frame":
            return {"image_latents": codec.encode(image[:, :, None])}
        ends = [image] if last_image is None else [image, last_image]
        if num_frames < len(ends):
            raise ValueError(f"a clip between two images has more frames than {num_frames}; give num_frames more")
        between = image.new_zeros(*image.shape[:2], num_frames - len(ends), *image.shape[2:])
        latents = codec.encode(torch.cat([image[:, :, None], between, *(end[:, :, None] for end in ends[1:])], 2))
        mask = torch.zeros_like(latents[:, :1]).repeat(1, codec.factors[0], 1, 1, 1)
        mask[:, :, 0] = 1
        if last_image is not None:
            mask[:, -1, -1] = 1
        made = {"image_latents": torch.cat([mask, latents], 1)}
        return made if self.encoder is None else made | {"image_states": torch.cat([self._see(end) for end in ends], 1)}

    def blank(self, batch: int, codec: Any, size: tuple[int, int, int]) -> dict[str, Tensor]:
        """What `encode` would make of clips of `size` `(F, H, W)`, all zero."""
        channels, frames, height, width = codec.latent_shape(*size)
        if self.reads == "frame":
            return {"image_latents": torch.zeros(batch, channels, 1, height, width)}
        made = {"image_latents": torch.zeros(batch, codec.factors[0] + channels, frames, height, width)}
        if self.encoder is not None:
            config: Any = self.encoder.config
            length = ((config.image_size // config.patch_size) ** 2 + 1) * (2 if self.needs_last else 1)
            made["image_states"] = torch.zeros(batch, length, config.hidden_size)
        return made

    def _see(self, image: Tensor) -> Tensor:
        """States `[B, L, D]`."""
        assert self.encoder is not None
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        seen = self.processor(images=list(pixels.cpu()), return_tensors="pt").pixel_values.to(self.encoder.device)
        with torch.autocast(seen.device.type, enabled=False):
            states: Tensor = self.encoder(seen.to(self.dtype), output_hidden_states=True).hidden_states[-2]
        return states.float()
