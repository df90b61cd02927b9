"""A stream between two clips, as a run carries it from one update to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import Cond


@dataclass(frozen=True, kw_only=True)
class Underway:
    """Everything that the next clip depends on. `streaming.Snapshot` is the same for serving, with prompts in place of
    conditions."""

    memory: KVCache
    conds: tuple[Cond, Cond]
    """Conditions of the stream, and the null prompt."""
    seeds: tuple[int, ...]
    """One per stream, as a session has them."""
    switch: int = 0
    """Number of the clip that begins with another prompt; 0: none."""
    clip: int = 0
    """Clips made so far."""
    chunks: int = 0
    """Chunks made so far."""
    latents: Tensor | None = None
    """Last latents `[B, C, F, H, W]`, from which the memory can be made anew; None before the first chunk."""
    past: Tensor | None = None
    """Last latents that the next clip begins with; None before the first chunk."""

    def tensors(self) -> dict[str, Tensor]:
        """The stream as tensors by name. `of` is the way back."""
        counts = {"switch": self.switch, "clip": self.clip, "chunks": self.chunks}
        found = {name: torch.tensor(count) for name, count in counts.items()}
        found |= {"seeds": torch.tensor(self.seeds), "start": self.memory.start, "positions": self.memory.positions}
        found |= {name: x for name, x in self._optional() if x is not None}
        for number, (k, v) in enumerate(self.memory.layers):
            found |= {f"keys/{number}": k, f"values/{number}": v}
        found |= {f"notes/{number}": note for number, note in enumerate(self.memory.notes)}
        found |= {f"states/{number}": state for number, state in enumerate(self.memory.states)}
        for name, cond in zip(CONDS, self.conds, strict=True):
            found |= {f"{name}/text": cond.text, f"{name}/mask": cond.mask}
            found |= {f"{name}/extra/{key}": x for key, x in cond.extra.items()}
        return found

    def _optional(self) -> Iterator[tuple[str, Tensor | None]]:
        yield from (("latents", self.latents), ("past", self.past), ("rows", self.memory.rows))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], empty: KVCache, device: str | torch.device) -> Underway:
        """The stream of these tensors on `device`; `empty` is the memory of one that has not begun (`Chunks.begin`)."""
        there = {name: x if name in ON_CPU else x.to(device) for name, x in tensors.items()}
        layers = zip(_listed(there, "keys"), _listed(there, "values"), strict=True)
        memory = replace(
            empty, layers=tuple(layers), positions=there["positions"], start=there["start"], rows=there.get("rows"),
            notes=_listed(there, "notes"), states=_listed(there, "states"),
        )  # fmt: skip
        extras = [_under(there, f"{name}/extra") for name in CONDS]
        cond, uncond = (
            Cond(there[f"{name}/text"], there[f"{name}/mask"], extra) for name, extra in zip(CONDS, extras, strict=True)
        )
        return cls(
            memory=memory, conds=(cond, uncond), seeds=tuple(there["seeds"].tolist()), switch=int(there["switch"]),
            clip=int(there["clip"]), chunks=int(there["chunks"]), latents=there.get("latents"), past=there.get("past"),
        )  # fmt: skip


CONDS = ("cond", "uncond")
ON_CPU = {"switch", "clip", "chunks", "seeds", "start", "positions", "rows"}
"""What is said of numbers and positions stays on the CPU, as `KVCache` has it."""


def _under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): x for key, x in tensors.items() if key.startswith(f"{name}/")}


def _listed(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    found = _under(tensors, name)
    return tuple(found[str(number)] for number in range(len(found)))
