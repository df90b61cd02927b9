"""Prompts to conditions, each distinct prompt encoded once: kept in main memory, or stored before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
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
        self.model, self.negative = model, model.card.negative_prompt
        self.encoder = model.text if "prompts" in needs or "text" in model.parts else None
        self.length = self.encoder.length if self.encoder is not None else 1
        self.known: dict[str, Cond] = {}
        self.rows: dict[str, int] = {}
        """Where each stored prompt is."""
        if cache and self.encoder is not None:
            self.reader = self._store(Path(cache), tuple(dict.fromkeys((self.negative, *prompts))))
            self.rows = {row["caption"]: i for i, row in enumerate(self.reader.rows)}

    def __call__(self, prompts: Sequence[str], device: str | torch.device) -> tuple[Cond, Cond]:
        """Conditions of `prompts`, and the negative prompt as many times."""
        states = [self._states(prompt) for prompt in (*prompts, self.negative)]
        both = Cond.cat([_padded(cond, self.length) for cond in states]).to(device)
        return both[:-1], both[-1:].expand(len(prompts))

    def _states(self, prompt: str) -> Cond:
        if prompt not in self.known:
            if len(self.known) >= KEPT:
                del self.known[next(iter(self.known))]
            self.known[prompt] = self._read(prompt) if self.rows else self._encode(prompt)
        return self.known[prompt]

    @torch.no_grad()
    def _encode(self, prompt: str) -> Cond:
        """One prompt, without the padding that is zero."""
        if self.encoder is None:
            return self.model.blank_cond(1)
        cond = self.encoder.encode([prompt]).to("cpu")
        end = int((cond.mask | (cond.text != 0).any(-1)).nonzero()[-1, 1]) + 1
        return Cond(cond.text[:, :end].clone(), cond.mask[:, :end].clone(), cond.extra)

    def _read(self, prompt: str) -> Cond:
        row = self.reader.rows[self.rows[prompt]]
        read = {name: self.reader.read(name, [self.rows[prompt]]) for name in ("text", "mask", *row.get("extra", ()))}
        text, mask = (read.pop(name)[:, : row["length"]] for name in ("text", "mask"))
        return Cond(text, mask.bool(), read)

    def _store(self, cache: Path, prompts: tuple[str, ...]) -> ShardReader:
        """Encode what is not stored yet: a run that was killed goes on after its last whole shard."""
        encoder = self.encoder
        assert encoder is not None
        settings = {"text": fingerprint(encoder), "prompts": digest(list(prompts)), "count": len(prompts)}
        writer = ShardWriter(cache / digest(settings), "texts", settings, shard_size=64)
        if not writer.complete:
            for prompt in prompts[len(writer.rows) :]:
                cond = self._encode(prompt)
                full = _padded(cond, self.length)
                tensors = {"text": full.text[0].float(), "mask": full.mask[0].to(torch.uint8)}
                row = {"caption": prompt, "length": cond.mask.shape[1], "extra": sorted(cond.extra)}
                writer.add(row, tensors | {name: x[0].float() for name, x in cond.extra.items()}, {})
            writer.finish({})
        return ShardReader(writer.folder, "texts")


def _padded(cond: Cond, length: int) -> Cond:
    """With zeros after its end, up to `length` tokens."""
    room = length - cond.mask.shape[1]
    return Cond(pad(cond.text, (0, 0, 0, room)), pad(cond.mask, (0, room)), cond.extra)
