"""Changes to a network's structure, named in its card: quantised layers, added inputs, removed blocks, low-rank branches."""

from fewstep.compress.branches import Branches
from fewstep.compress.int8 import Int8
from fewstep.compress.pruned import Pruned
from fewstep.compress.scalar_input import ScalarInput
from fewstep.compress.transform import Transform, transformed

TRANSFORMS: tuple[type[Transform], ...] = (Int8, Branches, Pruned, ScalarInput)

__all__ = ["TRANSFORMS", "Branches", "Int8", "Pruned", "ScalarInput", "Transform", "transformed"]
