"""The memory of a stream: the cache itself, and policies that say what it holds. One policy per file, listed in KEEPS."""

from fewstep.attention.kv.cache import Everything, Keep, KVCache
from fewstep.attention.kv.compressed_memory import CompressedMemory
from fewstep.attention.kv.decaying import Decaying
from fewstep.attention.kv.facing import Facing
from fewstep.attention.kv.importance import Importance
from fewstep.attention.kv.int8_memory import Int8Memory
from fewstep.attention.kv.moving_sink import MovingSink
from fewstep.attention.kv.prefix import Prefix
from fewstep.attention.kv.retrieval import Retrieval
from fewstep.attention.kv.state_memory import StateMemory
from fewstep.attention.kv.window import Window

KEEPS: tuple[type[Keep], ...] = (
    Everything,
    Window,
    Prefix,
    MovingSink,
    Importance,
    Retrieval,
    Facing,
    Decaying,
    StateMemory,
    CompressedMemory,
    Int8Memory,
)

__all__ = [
    "KEEPS", "CompressedMemory", "Decaying", "Everything", "Facing", "Importance", "Int8Memory", "KVCache", "Keep", "MovingSink",
    "Prefix", "Retrieval", "StateMemory", "Window",
]  # fmt: skip
