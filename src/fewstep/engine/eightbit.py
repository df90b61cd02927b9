"""AdamW whose moments have 8 bits, by bitsandbytes (Dettmers and others, 2110.02861).

Blocks of 256 values share one float32 scale, and each value is one of 256 on a dynamic map, signed for the first moment and
unsigned for the second. Tensors of fewer than `SMALL` values keep moments in float32. bitsandbytes does the arithmetic; this
file makes its states plain tensors, so that a run can store them and continue bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

from fewstep.engine.memory import SMALL

_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""The library's maps of the two moments: constants, which need no place in a checkpoint."""


class EightBitAdamW(AdamW8bit):
    """bitsandbytes' AdamW with states `step`, `state1`, `state2`, and for each block of the 8-bit ones `absmax1`, `absmax2`.

    With `paged` the moments of large tensors are in memory that CUDA moves between device and main memory as it is needed.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], weight_decay: float, paged: bool
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay, min_8bit_size=SMALL, is_paged=paged)

    def begin(self, parameter: Tensor) -> None:
        """Make the states of a parameter, all zero, unless it has some."""
        if not self.state[parameter]:
            self.init_state(self.param_groups[0], parameter, 0, 0)

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        super().init_state(group, p, gindex, pindex)
        state = self.state[p]
        state["step"] = torch.zeros(())
        for slot in _MAPS:
            state.pop(slot, None)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        state = self.state[p]
        counted = state["step"]
        state["step"] = int(counted)  # the library counts in plain numbers, a checkpoint holds tensors
        state |= {slot: self.name2qmap[name].to(p.device) for slot, name in _MAPS.items()}
        super().update_step(group, p, gindex, pindex)
        for slot in _MAPS:
            del state[slot]
        state["step"] = counted.add_(1)
