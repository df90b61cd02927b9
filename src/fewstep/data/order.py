"""The order in which samples are drawn, as a function of seed, epoch and place, without stored state."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import torch

from fewstep.core import Rng
from fewstep.data.base import DataError

ROUNDS = 8


def draw_indices(n: int, size: int, rng: Rng) -> list[int]:
    """Indices of the samples, out of `n`, in the batch of `size` at `(rng.seed, rng.step, rng.place)`.

    Each place goes through its own shuffle of all samples, with a new shuffle for every epoch: sample `i` of a place is
    position `i % n` in the order of epoch `i // n`, and step `k` has samples `k size ... (k+1) size - 1`. So a place sees every
    sample exactly once per epoch, for any `size`, and any step is found directly, in constant time and memory. Places shuffle
    independently, because a source does not know how many there are (ranks times accumulated micro-batches).

    >>> sorted(draw_indices(4, 2, Rng(0, step=0)) + draw_indices(4, 2, Rng(0, step=1)))
    [0, 1, 2, 3]
    """
    if n < 1:
        raise DataError("there are no samples to draw from; give data with at least one")
    first = rng.step * size
    chosen = (divmod(position, n) for position in range(first, first + size))
    return [shuffled(offset, n, _key(rng.seed, rng.place, epoch)) for epoch, offset in chosen]


def shuffled(position: int, n: int, key: bytes) -> int:
    """The number at `position` in the permutation of 0 ... n-1 that `key` names.

    A Feistel network permutes the numbers of 2k bits, the next power of 4 from `n` on; it is applied again until the
    result is below `n` (cycle walking; Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
    """
    half = max(2, (n - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(ROUNDS):
            drawn = blake2b(b"%d %d" % (number, right), key=key, digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(drawn, "little") & mask
        position = left << half | right
        if position < n:
            return position


@lru_cache(maxsize=64)
def _key(seed: int, place: int, epoch: int) -> bytes:
    generator = Rng(seed, step=epoch, place=place).local("data/epoch")
    return bytes(torch.randint(256, (16,), generator=generator).tolist())
