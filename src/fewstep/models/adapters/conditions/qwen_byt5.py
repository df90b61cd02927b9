"""HunyuanVideo 1.5's text encoders: Qwen's states under a prompt template, and ByT5's states of quoted letters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import HunyuanVideo15Pipeline
from torch import nn
from transformers import AutoTokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

from fewstep.core import Cond


class QwenByT5Text(nn.Module):
    """States of the prompt's tokens, without those of the question around it, and of what it puts between quotes.

    `qwen` and `byt5` are the configs of transformers. Prompts that are longer are cut; the weights are kept as `dtype`, and
    never trained.
    """

    folders: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def __init__(
        self,
        *,
        qwen: dict[str, Any],
        byt5: dict[str, Any],
        length: int = 1000,
        glyphs: int = 256,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
    ) -> None:
        super().__init__()
        self.args = {"qwen": qwen, "byt5": byt5, "length": length, "glyphs": glyphs, "dtype": dtype}
        self.length, self.glyphs, self.dtype = length, glyphs, getattr(torch, dtype)
        self.qwen = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**qwen)).to(self.dtype)
        self.byt5 = T5EncoderModel(T5Config(**byt5)).to(self.dtype)
        self.width, self.glyph_width = self.qwen.config.hidden_size, self.byt5.config.d_model
        self.tokenizer: Any = None
        self.letters: Any = None

    def load(self, folder: Path) -> None:
        """Take weights and tokenizers of a folder in diffusers' layout."""
        qwen, tokenizer, byt5, letters = (folder / part for part in self.folders)
        self.qwen = Qwen2_5_VLTextModel.from_pretrained(qwen, dtype=self.dtype, use_safetensors=True)
        self.byt5 = T5EncoderModel.from_pretrained(byt5, dtype=self.dtype, use_safetensors=True)
        self.tokenizer, self.letters = AutoTokenizer.from_pretrained(tokenizer), AutoTokenizer.from_pretrained(letters)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """States `[B, length, width]`; `extra` has `glyphs` `[B, G, D]` and `glyph_mask` `[B, G]`; all float32."""
        device, texts = self.qwen.device, list(prompts)
        with torch.autocast(
            device.type, enabled=False
        ):  # the template and the search for quotes are the pipeline's own
            states, mask = HunyuanVideo15Pipeline._get_mllm_prompt_embeds(
                self.qwen, self.tokenizer, texts, device, self.length
            )
            glyphs, glyph_mask = HunyuanVideo15Pipeline._get_byt5_prompt_embeds(
                self.letters, self.byt5, texts, device, self.glyphs
            )
        return Cond(states.float(), mask.bool(), {"glyphs": glyphs.float(), "glyph_mask": glyph_mask.float()})

    def forward(self, prompts: Sequence[str]) -> Cond:
        return self.encode(prompts)

    def blank(self, batch: int) -> Cond:
        """As many conditions of full length, all zero, and no letters."""
        extra = {
            "glyphs": torch.zeros(batch, self.glyphs, self.glyph_width),
            "glyph_mask": torch.zeros(batch, self.glyphs),
        }
        mask = torch.ones(batch, self.length, dtype=torch.bool)
        return Cond(torch.zeros(batch, self.length, self.width), mask, extra)
