"""The few types everyone shares."""

from fewstep.core.build import RecipeError, build, dump
from fewstep.core.call import Call, KVView
from fewstep.core.rng import Noise, Rng, Seeds
from fewstep.core.types import KV, Batch, Carried, Cond, Later, Losses, Pairs, Past

__all__ = [
    "KV", "Batch", "Call", "Carried", "Cond", "KVView", "Later", "Losses", "Noise", "Pairs", "Past", "RecipeError", "Rng",
    "Seeds", "build", "dump",
]  # fmt: skip
