"""T5 text encoders of transformers: prompts to text states."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import ftfy
import torch
import transformers
from torch import nn

from fewstep.core import Cond


class T5Text(nn.Module):
    """Prompts are repaired (ftfy, HTML entities, white space), cut at `length` tokens, and zero after their end.

    If `plain` they are not repaired, and the encoder reads the padding like words, as LTX and CogVideoX were trained; if
    `masked` as well it does not, as for LTX from 0.9.5 on.
    `config` is that of transformers, which names the class; the weights are kept as `dtype`, and never trained.
    """

    folders: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")

    def __init__(
        self,
        *,
        config: dict[str, Any],
        length: int = 512,
        plain: bool = False,
        masked: bool = False,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
    ) -> None:
        super().__init__()
        self.args = {"config": config, "length": length, "plain": plain, "masked": masked, "dtype": dtype}
        self.length, self.width = length, int(config["d_model"])
        self.plain, self.masked, self.dtype = plain, masked or not plain, getattr(torch, dtype)
        self.kind = getattr(transformers, config["architectures"][0])
        self.encoder = self.kind(transformers.AutoConfig.for_model(**config)).to(self.dtype)
        self.tokenizer: Any = None

    def load(self, folder: Path) -> None:
        """Take weights and tokenizer of a folder in diffusers' layout."""
        encoder, tokenizer = (folder / part for part in self.folders)
        self.encoder = self.kind.from_pretrained(encoder, dtype=self.dtype, use_safetensors=True)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """States `[B, length, width]`, float32."""
        tokens = self.tokenizer(
            list(prompts) if self.plain else [clean(prompt) for prompt in prompts],
            padding="max_length", max_length=self.length, truncation=True, return_tensors="pt",
        ).to(self.encoder.device)  # fmt: skip
        mask = tokens.attention_mask.bool()
        with torch.autocast(mask.device.type, enabled=False):
            states = self.encoder(tokens.input_ids, tokens.attention_mask if self.masked else None).last_hidden_state
        return Cond(states.float() if self.plain else states.float().masked_fill(~mask[..., None], 0.0), mask)

    def forward(self, prompts: Sequence[str]) -> Cond:
        return self.encode(prompts)

    def blank(self, batch: int) -> Cond:
        """As many conditions of full length, all zero."""
        return Cond(torch.zeros(batch, self.length, self.width), torch.ones(batch, self.length, dtype=torch.bool))


def clean(prompt: str) -> str:
    """Text as Wan's pipelines clean it."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
