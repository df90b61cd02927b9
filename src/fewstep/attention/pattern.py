"""Attention as an operation: a pattern makes one operation per block, which defines what each query reads.

Legend: B batch, H heads, N queries, M keys, D head dimension. Keys are ordered: text that is attended beside the clip, then
remembered frames, then the N tokens of the call's own frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.attention.kernels import attend, by_reference
from fewstep.core import KV, Call, KVView
from fewstep.core.call import Causal


class Grid3(NamedTuple):
    """How many tokens a call has along each axis. Tokens are ordered frame by frame, row by row."""

    frames: int
    height: int
    width: int

    @property
    def per_frame(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.per_frame


class Part(NamedTuple):
    """A chunk of a call, which reads apart from the others."""

    start: int
    stop: int
    """Its own frames of the call, `[start, stop)`."""
    runs: tuple[tuple[int, int], ...]
    """Runs of frames that it reads besides: remembered ones first, then those of the call, in one count."""


@dataclass(frozen=True)
class Site:
    """What an operation may know besides queries, keys and values. Every block of a call has the same."""

    grid: Grid3
    """Grid of all tokens of the clip in this call."""
    past: int = 0
    """Number of remembered frames (slots of the memory) before them."""
    beside: int = 0
    """Number of text tokens before both. Every query reads them; as queries they read every key."""
    readable_B11M: Tensor | None = None
    """False for keys that nobody may read: padded text, empty slots; or numbers that are added to the logits of a key
    (`KVView.weight`), minus infinity for such keys. None: all may be read alike."""
    call: Call = Call()
    parts: tuple[Part, ...] = ()
    """Chunks that read apart (`Call.causal`); (): the call is read as one."""

    def of(self, part: Part) -> Site:
        """Where the attention of one chunk is: what it reads of other frames is its past."""
        grid = self.grid._replace(frames=part.stop - part.start)
        return replace(self, grid=grid, past=sum(high - low for low, high in part.runs), readable_B11M=None, parts=())


class Operation(nn.Module, ABC):
    """What one block's self-attention computes.

    `mask` is the whole truth about it; `forward` must equal softmax attention under `allowed`. This one computes exactly
    that, with a mask of all queries and keys: the reference, for tests and for patterns that have no faster way yet.
    """

    @abstractmethod
    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> Tensor | None:
        """Which keys of clips the queries of the clip read: bool `[N, M]` or `[B, H, N, M]`, without text; None: all.

        Queries and keys come without text, too.
        """

    def allowed(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> Tensor | None:
        """The same with text and with keys that nobody reads, for all queries and keys; None: all. Numbers for the logits where
        `site.readable_B11M` has such."""
        beside = site.beside
        mask = self.mask(q_BHND[:, :, beside:], k_BHMD[:, :, beside:], site)
        if mask is not None and beside:
            mask = F.pad(mask, (beside, 0, beside, 0), value=True)
        if mask is None or site.readable_B11M is None:
            return mask if site.readable_B11M is None else site.readable_B11M
        if site.readable_B11M.dtype == torch.bool:
            return mask & site.readable_B11M
        return site.readable_B11M.masked_fill(~mask.to(site.readable_B11M.device), -torch.inf)

    def forward(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, site: Site) -> Tensor:
        """`[B, H, N, D]`; H may be this process' share of the heads."""
        mask = self.allowed(q_BHND, k_BHMD, site)
        return attend(q_BHND, k_BHMD, v_BHMD, None if mask is None else mask.to(q_BHND.device))

    def finish(self, mixed_BHND: Tensor, qkv: tuple[Tensor, Tensor, Tensor], site: Site) -> tuple[Tensor, KV]:
        """What the call's tokens get, and what is remembered of them: by default what they read, and their keys and values.

        `qkv` are those of the call, without rotary position. Patterns that fold (`Pattern.folds`) add what they read of a state,
        and gates to the values.
        """
        return mixed_BHND, qkv[1:]


def operate(operation: Operation, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, site: Site) -> Tensor:
    """What an operation computes, of each part of the call; where the reference is asked for (`kernels.attending`): what its
    mask says."""
    if site.parts:
        return torch.cat([_of_part(operation, q_BHND, k_BHMD, v_BHMD, site, part) for part in site.parts], 2)
    if by_reference():
        return Operation.forward(operation, q_BHND, k_BHMD, v_BHMD, site)
    mixed: Tensor = operation(q_BHND, k_BHMD, v_BHMD, site)
    return mixed


def _of_part(operation: Operation, q: Tensor, k: Tensor, v: Tensor, site: Site, part: Part) -> Tensor:
    per_frame = site.grid.per_frame
    runs = (*part.runs, (site.past + part.start, site.past + part.stop))
    return operate(
        operation, q[:, :, part.start * per_frame : part.stop * per_frame], frames_of(k, runs, per_frame),
        frames_of(v, runs, per_frame), site.of(part),
    )  # fmt: skip


def frames_of(x: Tensor, runs: Sequence[tuple[int, int]], per_frame: int, dim: int = 2) -> Tensor:
    """The tokens of runs of frames."""
    parts = [x.narrow(dim, low * per_frame, (high - low) * per_frame) for low, high in runs if high > low]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def parts_of(causal: Causal, grid: Grid3, kv: KVView | None) -> tuple[Part, ...]:
    """What each chunk of a call reads. ValueError for chunks that are not the call, and for streams of different age."""
    if sum(causal.chunks) != grid.frames or min(causal.chunks) < 1:
        raise ValueError(f"a call of {grid.frames} frames cannot have chunks of {list(causal.chunks)}")
    places, first, past = {}, 0, 0
    if kv is not None:
        if kv.start.ndim or kv.positions.ndim > 1:
            raise ValueError("chunks of one call read a past of one age; call once for each age")
        if kv.layers and kv.layers[0][0].shape[2] != kv.slots * grid.per_frame:
            raise ValueError(
                "chunks of one call read whole frames, and this past has parts of them; call once for each chunk"
            )
        first, past = int(kv.start), kv.slots
        places = {p: slot for slot, p in enumerate(kv.positions.tolist()[:past]) if p >= 0}
    places = {first + frame: past + frame for frame in range(grid.frames)} | places
    parts, start = [], 0
    for length in causal.chunks:
        here = first + start
        recent = range(0 if causal.recent is None else max(here - causal.recent, 0), here)
        seen = sorted({*range(min(causal.sink, here)), *recent})
        parts.append(Part(start, start + length, _runs([places[p] for p in seen if p in places])))
        start += length
    return tuple(parts)


def _runs(frames: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The runs of neighbours in a list, in its order: `[first, last + 1)` each."""
    runs: list[tuple[int, int]] = []
    for frame in frames:
        follows = bool(runs) and runs[-1][1] == frame
        runs[-1:] = [(runs[-1][0], frame + 1)] if follows else [*runs[-1:], (frame, frame + 1)]
    return tuple(runs)


class Pattern(ABC):
    """Which keys each query reads: a frozen dataclass, named in recipes and cards."""

    folds: ClassVar[bool] = False
    """Whether its operations read a state of what has left the memory, and make the gates that write it (`KVView.states`)."""

    @property
    def compresses(self) -> int:
        """Tokens that one of the learned tokens stands for that its operations leave behind each frame; 0: they leave none."""
        return 0

    @abstractmethod
    def operation(self, layer: int, heads: int, width: int) -> Operation:
        """What block `layer` computes, with `heads` heads of `width` channels. It may have parameters of its own."""

    def check(self, site: Site) -> None:  # noqa: B027 - most patterns can be run anywhere
        """Refuse (ValueError) a call that this pattern cannot be right for."""

    def tree(self) -> dict[str, Any]:
        """Plain values from which `core.build` makes an equal pattern."""
        return {"type": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]
