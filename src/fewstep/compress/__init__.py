"""Changes to a network's structure, named in its card: quantised layers, removed blocks, added inputs, other patterns."""

from fewstep.compress.branches import Branches
from fewstep.compress.experts import Experts
from fewstep.compress.flow_head import FlowHead
from fewstep.compress.frame_input import FrameInput
from fewstep.compress.int8 import Int8
from fewstep.compress.pruned import Pruned
from fewstep.compress.repatterned import Repatterned
from fewstep.compress.scalar_input import ScalarInput
from fewstep.compress.step_scales import StepScales
from fewstep.compress.transform import Transform, transformed

TRANSFORMS: tuple[type[Transform], ...] = (
    Int8, Branches, Experts, Pruned, Repatterned, ScalarInput, FrameInput, StepScales, FlowHead,
)  # fmt: skip

__all__ = [
    "TRANSFORMS", "Branches", "Experts", "FlowHead", "FrameInput", "Int8", "Pruned", "Repatterned", "ScalarInput", "StepScales",
    "Transform", "transformed",
]  # fmt: skip
