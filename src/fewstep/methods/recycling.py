"""Error recycling: a network is trained on its own errors, which banks keep by time (Stable Video Infinity, 2510.09212).

With errors e of earlier updates, some of them none:

    1  x_t = a (x0 + e_data) + s (eps + e_noise);  what is read of earlier chunks is x0 + e_past
    2  the target is that of the clean x0: for flow prediction v* = (eps + e_noise) - x0, so that x_t - t v* = x0 + (1 - t) e_data
    3  the errors at both ends, of the prediction against the target: e_data <- -t (v - v*), e_noise <- (1 - t) (v - v*)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fewstep.core import Carried, Rng
from fewstep.core.bounds import Count, Fraction, require_bounds
from fewstep.diffusion import Prediction

NAME = "errors"
"""Part of what a run carries that holds the banks."""
Place = tuple[int, int, int, int, int]
"""Where a chunk is: clip, number, first frame, length, bucket of time."""


@dataclass(frozen=True)
class Errors:
    """Errors to add, each like the clips `[B, C, F, H, W]`; None: none at all."""

    data: Tensor | None = None
    noise: Tensor | None = None
    past: Tensor | None = None
    injected: Tensor | None = None
    """Clips that were to get errors, bool `[B]`."""


def plus(x: Tensor, error: Tensor | None) -> Tensor:
    """`x` with an error, `x` itself without."""
    return x if error is None else x + error


@dataclass(frozen=True, kw_only=True)
class ErrorRecycling:
    """Banks of errors, and how often they are used. Frozen: the banks themselves are carried by the run (`Batch.carried`).

    An error is of one chunk, or of a whole clip where the network does not stream, and it is used again at a time of the same
    bucket (`past`: of any). Each place has banks of its own, in main memory and in checkpoints; `size` numbers of latents for
    each bucket add up. Not as published: banks are per process place, and nobody gathers those of others in the first
    iterations; a full bucket loses a random error (the paper offers the nearest one, too); the paper's last frame as condition
    is here the clean chunks that `TeacherForced` reads.
    """

    clean: Fraction = 0.2
    """Share of clips without errors (1 - p)."""
    data: Fraction = 0.9
    """Share of the other clips whose chunks get an error of the data (E_vid)."""
    noise: Fraction = 0.01
    """Share of them whose chunks get an error of the noise (E_noi)."""
    past: Fraction = 0.9
    """Share of them whose earlier chunks are read with an error (E_img); only with `history: {type: TeacherForced}`, else 0."""
    keep_clean: Fraction = 0.1
    """Share of the clips without errors whose own errors are kept: they say little about long streams."""
    buckets: Count = 50
    """Intervals of time, each with an own bank."""
    size: Count = 500
    """Largest number of errors in a bucket."""

    def __post_init__(self) -> None:
        require_bounds(self)

    def draw(self, carried: Carried, x0: Tensor, t: Tensor, lengths: Sequence[int], rng: Rng) -> Errors:
        """Errors for clips at times `[B]` or `[B, F]`, whose chunks have these lengths."""
        banks, rng = carried.part(NAME), rng.fold("recycling")
        injected = rng.rand((len(x0),), "clean") >= self.clean
        drawn: dict[str, Tensor | None] = {}
        for kind, share in (("data", self.data), ("noise", self.noise), ("past", self.past)):
            wanted = injected & (rng.rand((len(x0),), kind) < share)
            which = rng.rand((len(x0), len(lengths)), f"{kind}/which")
            drawn[kind] = _drawn(banks, kind, wanted, which, x0, self._places(t, lengths))
        return Errors(**drawn, injected=injected)

    def keep(
        self, carried: Carried, made: Prediction, ideal: Prediction, errors: Errors, lengths: Sequence[int], rng: Rng
    ) -> None:
        """Add what `made` is wrong by to the banks; `ideal` is the target as a prediction. Chunks without noise have no
        errors."""
        banks, rng, clips = carried.part(NAME), rng.fold("recycling"), len(made.raw)
        assert errors.injected is not None
        kept = errors.injected | (rng.rand((clips,), "keep") < self.keep_clean)
        wrong = {"data": (made.x0 - ideal.x0).detach(), "noise": (made.eps - ideal.eps).detach()}
        slots = rng.integers((clips, len(lengths)), "slot", self.size)
        for clip, piece, begin, length, bucket in self._places(made.t, lengths):
            if bool(kept[clip]) and float(made.t.reshape(clips, -1)[clip, begin if made.t.ndim == 2 else 0]) > 0:
                for kind, error in wrong.items():
                    one = error[clip : clip + 1, :, begin : begin + length].to("cpu", copy=True)
                    _push(banks, f"{kind}/{length}/{bucket}", one, self.size, int(slots[clip, piece]))
        carried.put(NAME, banks)

    def _places(self, t: Tensor, lengths: Sequence[int]) -> list[Place]:
        """Every chunk of clips at times `[B]` or `[B, F]`."""
        begins = [0, *accumulate(lengths)]
        places = []
        for clip, row in enumerate(t.reshape(len(t), -1).tolist()):
            for piece, (begin, length) in enumerate(zip(begins, lengths, strict=False)):
                time = row[begin] if len(row) > 1 else row[0]
                places.append((clip, piece, begin, length, min(int(time * self.buckets), self.buckets - 1)))
        return places


def _drawn(
    banks: dict[str, Tensor], kind: str, wanted: Tensor, which: Tensor, x0: Tensor, places: Sequence[Place]
) -> Tensor | None:
    """One error for each chunk of the clips that are `wanted`, of its own length and bucket (`past`: any bucket); zero where
    there is none; None where there are none at all."""
    found = torch.zeros_like(x0)
    hits = 0
    for clip, piece, begin, length, bucket in places:
        name = f"data/{length}/" if kind == "past" else f"{kind}/{length}/{bucket}"
        fitting = [bank for key, bank in banks.items() if (key.startswith(name) if kind == "past" else key == name)]
        count = sum(map(len, fitting))
        if not count or not bool(wanted[clip]):
            continue
        number = int(which[clip, piece] * count)
        for bank in fitting:
            if number < len(bank):
                found[clip, :, begin : begin + length] = bank[number].to(x0)
                hits += 1
                break
            number -= len(bank)
    return found if hits else None


def _push(banks: dict[str, Tensor], name: str, error: Tensor, size: int, slot: int) -> None:
    """Add one error `[1, C, f, H, W]`, in the place of a random one if the bank is full."""
    bank = banks.get(name)
    if bank is None or len(bank) < size:
        banks[name] = error if bank is None else torch.cat([bank, error])
    else:
        banks[name] = bank.index_copy(0, torch.tensor([slot]), error)
