"""HunyuanVideo's text encoders: LLaMA's states under a prompt template, and CLIP's pooled state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from fewstep.core import Cond

_LAYER = -3
"""Whose states are read: two layers before the last."""


class HunyuanText(nn.Module):
    """States of the prompt's `length` tokens, without those of the question around it; `extra["pooled"]` is CLIP's.

    `llama` and `clip` are the configs of transformers. Prompts that are longer are cut; the weights are kept as `dtype`, and
    never trained.
    """

    folders: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def __init__(
        self,
        *,
        llama: dict[str, Any],
        clip: dict[str, Any],
        length: int = 256,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
    ) -> None:
        super().__init__()
        self.args = {"llama": llama, "clip": clip, "length": length, "dtype": dtype}
        self.length, self.dtype = length, getattr(torch, dtype)
        self.llama = LlamaModel(LlamaConfig(**llama)).to(self.dtype)
        self.clip = CLIPTextModel(CLIPTextConfig(**clip)).to(self.dtype)
        self.width, self.pooled_width = self.llama.config.hidden_size, self.clip.config.hidden_size
        self.tokenizer: Any = None
        self.clip_tokenizer: Any = None

    def load(self, folder: Path) -> None:
        """Take weights and tokenizers of a folder in diffusers' layout."""
        llama, tokenizer, clip, clip_tokenizer = (folder / part for part in self.folders)
        self.llama = LlamaModel.from_pretrained(llama, dtype=self.dtype, use_safetensors=True)
        self.clip = CLIPTextModel.from_pretrained(clip, dtype=self.dtype, use_safetensors=True)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.clip_tokenizer = AutoTokenizer.from_pretrained(clip_tokenizer)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """States `[B, length, width]` and the pooled ones `[B, pooled width]`, float32."""
        template, start = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
        asked = [template.format(prompt) for prompt in prompts]
        tokens, words = (
            tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(
                self.llama.device
            )
            for tokenizer, texts, length in (
                (self.tokenizer, asked, self.length + start),
                (self.clip_tokenizer, list(prompts), self.clip.config.max_position_embeddings),
            )
        )
        with torch.autocast(self.llama.device.type, enabled=False):
            states = self.llama(tokens.input_ids, tokens.attention_mask, output_hidden_states=True).hidden_states
            pooled = self.clip(words.input_ids).pooler_output
        mask = tokens.attention_mask[:, start:].bool()
        return Cond(states[_LAYER][:, start:].float(), mask, {"pooled": pooled.float()})

    def forward(self, prompts: Sequence[str]) -> Cond:
        return self.encode(prompts)

    def blank(self, batch: int) -> Cond:
        """As many conditions of full length, all zero."""
        mask = torch.ones(batch, self.length, dtype=torch.bool)
        return Cond(
            torch.zeros(batch, self.length, self.width), mask, {"pooled": torch.zeros(batch, self.pooled_width)}
        )
