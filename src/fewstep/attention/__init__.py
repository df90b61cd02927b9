"""What each query reads, how that is computed, and what is remembered."""

from fewstep.attention.block_causal import BlockCausal
from fewstep.attention.dense import Dense
from fewstep.attention.kernels import Backend, attend, backends, math_only, pick
from fewstep.attention.kv import KVCache
from fewstep.attention.pattern import Grid3, Pattern
from fewstep.attention.ulysses import Ulysses

PATTERNS: tuple[type[Pattern], ...] = (Dense, BlockCausal)

__all__ = [
    "PATTERNS", "Backend", "BlockCausal", "Dense", "Grid3", "KVCache", "Pattern", "Ulysses", "attend",
    "backends", "math_only", "pick",
]  # fmt: skip
