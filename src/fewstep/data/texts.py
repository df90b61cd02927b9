"""Prompts to conditions, each distinct prompt encoded once: kept in main memory, or stored before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewstep.core import Cond
from fewstep.core.build import digest
from fewstep.data.store import ShardReader, ShardWriter
from fewstep.models.bundle import VideoModel, fingerprint

KEPT = 8192
"""Distinct prompts kept. Beyond that the oldest are forgotten, and read or encoded again when they come back."""


class Texts:
    """The text states of a model's encoder, cached in main memory.

    A prompt is encoded alone, so its states depend on nothing but the prompt: not on the batch it first appeared in,
    nor on whether it was cached. A model without a text encoder (one whose autoencoder is being trained) gets blank
    conditions of width 1; ValueError if `needs` has prompts.

    With a `cache` folder all of `prompts` are encoded at once and stored there, unless they are there already; from then
    on the encoder is not asked again, and need not be where the training is.
    """

    def __init__(
        self, model: VideoModel, needs: frozenset[str], cache: str | Path = "", prompts: Sequence[str] = ()
    ) -> None:
        self.encoder = model.text if "prompts" in needs or "text" in model.parts else None
        self.known: dict[str, tuple[Tensor, Tensor]] = {}
        self.rows: dict[str, int] = {}
        """Where each stored prompt is."""
        if cache and self.encoder is not None:
            self.reader = self._store(Path(cache), tuple(dict.fromkeys(("", *prompts))))
            self.rows = {row["caption"]: i for i, row in enumerate(self.reader.rows)}

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
            self.known[prompt] = self._read(prompt) if self.rows else self._encode(prompt)
        return self.known[prompt]

    @torch.no_grad()
    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        if self.encoder is None:
            return torch.zeros(1, 1), torch.zeros(1, dtype=torch.bool)
        cond = self.encoder.encode([prompt])
        return cond.text[0].cpu(), cond.mask[0].cpu()

    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        index = self.rows[prompt]
        length = self.reader.rows[index]["length"]
        text, mask = (self.reader.read(name, [index])[0, :length] for name in ("text", "mask"))
        return text, mask.bool()

    def _store(self, cache: Path, prompts: tuple[str, ...]) -> ShardReader:
        """Encode what is not stored yet: a run that was killed goes on after its last whole shard."""
        encoder = self.encoder
        assert encoder is not None
        settings = {"text": fingerprint(encoder), "prompts": digest(list(prompts)), "count": len(prompts)}
        writer = ShardWriter(cache / digest(settings), "texts", settings, shard_size=64)
        if not writer.complete:
            for prompt in prompts[len(writer.rows) :]:
                text, mask = self._encode(prompt)
                room = max(0, encoder.length - len(mask))
                tensors = {"text": pad(text.float(), (0, 0, 0, room)), "mask": pad(mask, (0, room)).to(torch.uint8)}
                writer.add({"caption": prompt, "length": len(mask)}, tensors, {})
            writer.finish({})
        return ShardReader(writer.folder, "texts")
