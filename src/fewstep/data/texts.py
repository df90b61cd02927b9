"""Prompts to conditions, each distinct prompt encoded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewstep.core import Cond
from fewstep.models.bundle import VideoModel

KEPT = 8192
"""Distinct prompts kept. Beyond that the oldest are forgotten and encoded again when they come back."""


class Texts:
    """The text states of a model's encoder, cached in main memory.

    A prompt is encoded alone, so its states depend on nothing but the prompt: not on the batch it first appeared in,
    nor on whether it was cached. A model without a text encoder (one whose autoencoder is being trained) gets blank
    conditions of width 1; ValueError if `needs` has prompts.
    """

    def __init__(self, model: VideoModel, needs: frozenset[str]) -> None:
        self.encoder = model.text if "prompts" in needs or "text" in model.parts else None
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, prompts: Sequence[str], device: str | torch.device) -> tuple[Cond, Cond]:
        """Conditions of `prompts` and of as many empty prompts, of one length."""
        states = [self._states(prompt) for prompt in (*prompts, "")]
        length = max(len(mask) for _, mask in states)
        both = Cond(
            torch.stack([pad(text, (0, 0, 0, length - len(text))) for text, _ in states]).to(device),
            torch.stack([pad(mask, (0, length - len(mask))) for _, mask in states]).to(device),
        )
        return both[:-1], both[-1:].expand(len(prompts))

    def _states(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt not in self.known:
            if len(self.known) >= KEPT:
                del self.known[next(iter(self.known))]
            self.known[prompt] = self._encode(prompt)
        return self.known[prompt]

    @torch.no_grad()
    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        if self.encoder is None:
            return torch.zeros(1, 1), torch.zeros(1, dtype=torch.bool)
        cond = self.encoder.encode([prompt])
        return cond.text[0].cpu(), cond.mask[0].cpu()
