"""Attention patterns, kernels, and the memory of a stream."""

from fewstep.attention.block_causal import BlockCausal
from fewstep.attention.compress_causal import CompressCausal
from fewstep.attention.dense import Dense
from fewstep.attention.kernels import Backend, Tier, attend, attending, backends, pick, require_tier
from fewstep.attention.kv import (
    KEEPS,
    CompressedMemory,
    Decaying,
    Everything,
    Facing,
    Importance,
    Int8Memory,
    Keep,
    KVCache,
    MovingSink,
    Prefix,
    Retrieval,
    StateMemory,
    Window,
)
from fewstep.attention.nag import NAG
from fewstep.attention.pattern import Grid3, Operation, Pattern, Site, operate
from fewstep.attention.routed.top_k import TopK
from fewstep.attention.state_causal import StateCausal
from fewstep.attention.ulysses import Ulysses

PATTERNS: tuple[type[Pattern], ...] = (Dense, BlockCausal, StateCausal, CompressCausal, TopK)

__all__ = [
    "KEEPS", "NAG", "PATTERNS", "Backend", "BlockCausal", "CompressCausal", "CompressedMemory", "Decaying", "Dense", "Everything",
    "Facing", "Grid3", "Importance", "Int8Memory", "KVCache", "Keep", "MovingSink", "Operation", "Pattern", "Prefix", "Retrieval",
    "Site", "StateCausal", "StateMemory", "Tier", "TopK", "Ulysses", "Window", "attend", "attending", "backends", "operate",
    "pick", "require_tier",
]  # fmt: skip
