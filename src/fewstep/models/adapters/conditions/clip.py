"""CLIP's text encoder (2103.00020): prompts to text states, for Stable Diffusion and AnimateDiff."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep.core import Cond


class ClipText(nn.Module):
    """The last hidden states of all 77 places: these U-Nets were trained to read the padding too, so no place is masked.

    `config` is that of transformers. Prompts that are longer are cut; the weights are kept as `dtype`, and never trained.
    """

    folders: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")

    def __init__(self, *, config: dict[str, Any], dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        super().__init__()
        self.args = {"config": config, "dtype": dtype}
        self.dtype = getattr(torch, dtype)
        self.encoder = CLIPTextModel(CLIPTextConfig(**config)).to(self.dtype)
        self.length, self.width = self.encoder.config.max_position_embeddings, self.encoder.config.hidden_size
        self.tokenizer: Any = None

    def load(self, folder: Path) -> None:
        """Take weights and tokenizer of a folder in diffusers' layout."""
        encoder, tokenizer = (folder / part for part in self.folders)
        self.encoder = CLIPTextModel.from_pretrained(encoder, dtype=self.dtype, use_safetensors=True)
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """States `[B, length, width]`, float32."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids.to(self.encoder.device)
        with torch.autocast(ids.device.type, enabled=False):
            states = self.encoder(ids).last_hidden_state
        return Cond(states.float(), torch.ones_like(ids, dtype=torch.bool))

    def forward(self, prompts: Sequence[str]) -> Cond:
        return self.encode(prompts)

    def blank(self, batch: int) -> Cond:
        """As many conditions of full length, all zero."""
        return Cond(torch.zeros(batch, self.length, self.width), torch.ones(batch, self.length, dtype=torch.bool))
