"""The built-in text encoder: prompts to text states without a vocabulary, for words of any language.

Legend: B prompts, L tokens, H heads, E width.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.attention import attend
from fewstep.core.bounds import Count, Depth, Size
from fewstep.core.types import Cond

_WORD = re.compile(r"\w+(?:[-']\w+)*")
_PAD, _BEGIN, _RESERVED = 0, 1, 2


class TextEncoder(nn.Module):
    """Words are hashed, embedded and mixed by a small transformer.

    A word is the sum of two of `buckets` vectors, so that two words which share one still differ in the other.
    """

    def __init__(
        self,
        *,
        width: Size = 128,
        length: Size = 24,
        buckets: Count = 4096,
        depth: Depth = 2,
        heads: Depth = 4,
        attribute_sizes: Sequence[Size] = (),
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads; change width or heads")
        self.args = {
            "width": width, "length": length, "buckets": buckets, "depth": depth, "heads": heads,
            "attribute_sizes": list(attribute_sizes),
        }  # fmt: skip
        self.width, self.length, self.buckets = width, length, buckets
        self.words = nn.Embedding(_RESERVED + buckets, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.attributes = nn.ModuleList(nn.Linear(width, size) for size in attribute_sizes)

    def encode(self, prompts: Sequence[str]) -> Cond:
        """States `[B, length, width]`, zero on padding. Words beyond `length - 1` are not read."""
        ids_BL2 = self.tokens(prompts)
        mask_BL = ids_BL2[..., 0] != _PAD
        x_BLE = self.words(ids_BL2).sum(2) + self.positions
        for layer in self.layers:
            x_BLE = layer(x_BLE, mask_BL[:, None, None])
        return Cond(self.norm(x_BLE) * mask_BL[..., None], mask_BL)

    def blank(self, batch: int) -> Cond:
        """As many conditions of full length, all zero."""
        return Cond(torch.zeros(batch, self.length, self.width), torch.ones(batch, self.length, dtype=torch.bool))

    def forward(self, prompts: Sequence[str]) -> Cond:
        return self.encode(prompts)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Two bucket numbers per token, `[B, length, 2]`; a begin token comes first, so that an empty prompt has one too."""
        rows = [
            [(_BEGIN, _BEGIN), *map(self._buckets, _WORD.findall(prompt.lower()))][: self.length] for prompt in prompts
        ]
        padded = [row + [(_PAD, _PAD)] * (self.length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.positions.device).reshape(-1, self.length, 2)

    def classify(self, cond: Cond) -> list[Tensor]:
        """Logits per attribute of the prompt, read from the begin token (training only)."""
        return [attribute(cond.text[:, 0]).to(cond.text.dtype) for attribute in self.attributes]

    def _buckets(self, word: str) -> tuple[int, int]:
        high, low = divmod(zlib.crc32(word.encode()), self.buckets)
        return _RESERVED + low, _RESERVED + high % self.buckets


class _Layer(nn.Module):
    """Pre-norm transformer layer; padding is never read."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BLE: Tensor, mask_B11L: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x_BLE)).unflatten(-1, (3, self.heads, -1))
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4)
        x_BLE = x_BLE + self.out(attend(q_BHLD, k_BHLD, v_BHLD, mask_B11L).transpose(1, 2).flatten(2))
        return x_BLE + self.down(F.gelu(self.up(self.norm_mlp(x_BLE))))
