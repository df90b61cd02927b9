"""Text states: each distinct prompt is encoded once, and kept in main memory or stored before training."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewstep.core import Cond
from fewstep.core.build import digest
from fewstep.core.peers import Peers
from fewstep.data.remembered import Remembered
from fewstep.data.store import PartedWriter, Progress, ShardReader, ShardWriter, is_complete
from fewstep.models.bundle import VideoModel
from fewstep.models.fingerprint import fingerprint
from fewstep.models.text import TextEncoder

PART = 1024
"""Number of prompts that a process takes at a time."""
SHARD = 64


class Texts:
    """The text states of a model's encoder, kept in main memory (see `Remembered`).

    A prompt is encoded alone, so its states depend only on the prompt: not on a batch, and not on the cache. A model without
    a text encoder (while its autoencoder is trained) gets blank conditions of width 1; ValueError if `needs` has prompts.

    With a `cache` folder, all `prompts` are encoded before training and stored there (`store_texts`), unless they are stored
    already. The encoder is then not used again and need not be on the training device. `prompts` may be larger than memory;
    they are read in order, more than once.
    """

    def __init__(
        self, model: VideoModel, needs: frozenset[str], cache: str | Path = "", prompts: Iterable[str] = ()
    ) -> None:
        self.model, self.negative = model, model.card.negative_prompt
        self.encoder = model.text if "prompts" in needs or "text" in model.parts else None
        self.length = self.encoder.length if self.encoder is not None else 1
        self.states = Remembered(self._make, lambda cond: cond.tensors)
        self.stored = store_texts(model, prompts, cache) if cache and self.encoder is not None else None

    def __call__(self, prompts: Sequence[str], device: str | torch.device) -> tuple[Cond, Cond]:
        """Conditions of `prompts`, and as many of the negative prompt."""
        both = self.encode((*prompts, self.negative)).to(device)
        return both[:-1], both[-1:].expand(len(prompts))

    def encode(self, prompts: Sequence[str]) -> Cond:
        """What the text encoder says of `prompts`, on the CPU."""
        return Cond.cat([padded(self.states(prompt), self.length) for prompt in prompts])

    def _make(self, prompt: str) -> Cond:
        if self.stored is not None:
            return read_states(self.stored, prompt)
        return self.model.blank_cond(1) if self.encoder is None else _encode(self.encoder, prompt)


def store_texts(
    model: VideoModel,
    prompts: Iterable[str],
    cache: str | Path,
    *,
    peers: Peers = Peers(),
    progress: Callable[[Progress], None] = lambda event: None,
) -> ShardReader:
    """The states of all distinct `prompts`, and of the model's negative prompt, from a folder of their own in `cache`.

    Prompts that are not stored yet are encoded; each of the `peers` takes a share. A killed process resumes after its last
    complete shard. Rows are in the order of their texts. `progress` is called after every prompt of this process' share.
    """
    everything = chain((model.card.negative_prompt,), prompts)
    settings = {"text": fingerprint(model.text), "prompts": _digest(everything)}
    folder = Path(cache) / digest(settings)
    if not is_complete(folder):
        wanted = sorted({model.card.negative_prompt, *prompts})
        writer = PartedWriter(folder, "texts", settings, -(-len(wanted) // PART), peers)
        parts = {number: wanted[PART * number : PART * (number + 1)] for number in writer.mine}
        done, total = 0, sum(map(len, parts.values()))
        for number, mine in parts.items():
            part = writer.part(number, SHARD)
            for here, prompt in _store_part(model.text, mine, part) if not part.complete else ():
                progress(Progress(done + here, total, prompt))
            done += len(mine)
        peers.barrier()
        if peers.leads:
            writer.finish()
        peers.barrier()
    return ShardReader(folder, "texts")


def _store_part(encoder: TextEncoder, prompts: Sequence[str], part: ShardWriter) -> Iterator[tuple[int, str]]:
    """Encode and store every prompt without padding, in the type of the encoder's weights if that type holds it exactly.

    Yields how many are done, and the last prompt.
    """
    dtype = next(encoder.parameters()).dtype
    for done, prompt in enumerate(prompts[len(part.rows) :], len(part.rows) + 1):
        cond = _encode(encoder, prompt)
        tensors = {"text": _narrow(cond.text[0], dtype), "mask": cond.mask[0].to(torch.uint8)}
        extra = {name: _narrow(x[0], dtype) for name, x in cond.extra.items()}
        part.add({"caption": prompt, "length": cond.mask.shape[1], "extra": sorted(extra)}, tensors | extra, {})
        yield done, prompt
    part.finish({})


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in `dtype` if that is exact, else in float32."""
    narrow, exact = value.to(dtype), value.float()
    return narrow if torch.equal(narrow.float(), exact) else exact


def _digest(prompts: Iterable[str]) -> str:
    """Digest of all prompts, read one by one."""
    hashed = sha256()
    for prompt in prompts:
        hashed.update(prompt.encode() + b"\0")
    return hashed.hexdigest()[:12]


def row_of(stored: ShardReader, prompt: str) -> dict[str, Any] | None:
    """The index entry of a prompt; None if it is not stored."""
    index = bisect_left(range(len(stored)), prompt, key=lambda i: stored.row(i)["caption"])
    row = stored.row(index) if index < len(stored) else {}
    return row if row.get("caption") == prompt else None


def read_states(stored: ShardReader, prompt: str) -> Cond:
    """The states of one prompt, without padding. KeyError for a prompt that is not stored."""
    row = row_of(stored, prompt)
    if row is None:
        raise KeyError(prompt)
    read = {name: stored.read_ragged(name, row)[None].float() for name in ("text", "mask", *row["extra"])}
    text, mask = (read.pop(name)[:, : row["length"]] for name in ("text", "mask"))
    return Cond(text, mask.bool(), read)


@torch.no_grad()
def _encode(encoder: TextEncoder, prompt: str) -> Cond:
    """The states of one prompt, without padding of zeros."""
    cond = encoder.encode([prompt]).to("cpu")
    end = int((cond.mask | (cond.text != 0).any(-1)).nonzero()[-1, 1]) + 1
    return Cond(cond.text[:, :end].clone(), cond.mask[:, :end].clone(), cond.extra)


def padded(cond: Cond, length: int) -> Cond:
    """The states padded with zeros to `length` tokens."""
    room = length - cond.mask.shape[1]
    return Cond(pad(cond.text, (0, 0, 0, room)), pad(cond.mask, (0, room)), cond.extra)
