"""Attention as an operation: a pattern makes one operation per block, which defines what each query reads.

Legend: B batch, H heads, N queries, M keys, D head dimension. Keys are ordered: text that is attended beside the clip, then
remembered frames, then the N tokens of the call's own frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.attention.kernels import attend, by_reference
from fewstep.core import Call


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
    """False for keys that nobody may read: padded text, empty slots. None: all may be read."""
    call: Call = Call()


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
        """The same with text and with keys that nobody reads, for all queries and keys; None: all."""
        beside = site.beside
        mask = self.mask(q_BHND[:, :, beside:], k_BHMD[:, :, beside:], site)
        if mask is not None and beside:
            mask = F.pad(mask, (beside, 0, beside, 0), value=True)
        if mask is None or site.readable_B11M is None:
            return mask if site.readable_B11M is None else site.readable_B11M
        return mask & site.readable_B11M

    def forward(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, site: Site) -> Tensor:
        """`[B, H, N, D]`; H may be this process' share of the heads."""
        mask = self.allowed(q_BHND, k_BHMD, site)
        return attend(q_BHND, k_BHMD, v_BHMD, None if mask is None else mask.to(q_BHND.device))


def operate(operation: Operation, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, site: Site) -> Tensor:
    """What an operation computes; where the reference is asked for (`kernels.attending`): what its mask says."""
    if by_reference():
        return Operation.forward(operation, q_BHND, k_BHMD, v_BHMD, site)
    mixed: Tensor = operation(q_BHND, k_BHMD, v_BHMD, site)
    return mixed


class Pattern(ABC):
    """Which keys each query reads: a frozen dataclass, named in recipes and cards."""

    @abstractmethod
    def operation(self, layer: int, heads: int, width: int) -> Operation:
        """What block `layer` computes, with `heads` heads of `width` channels. It may have parameters of its own."""

    def check(self, site: Site) -> None:  # noqa: B027 - most patterns can be run anywhere
        """Refuse (ValueError) a call that this pattern cannot be right for."""

    def tree(self) -> dict[str, Any]:
        """Plain values from which `core.build` makes an equal pattern."""
        return {"type": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]
