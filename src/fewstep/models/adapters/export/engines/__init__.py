"""What other engines need to serve an exported student, and what they cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from fewstep.models.adapters.export.engines.lightx2v import lightx2v
from fewstep.models.adapters.export.engines.plan import Plan
from fewstep.models.adapters.export.engines.sglang import sglang
from fewstep.models.adapters.export.engines.student import Student
from fewstep.models.adapters.export.engines.vllm_omni import vllm_omni

Engine = Literal["vllm-omni", "sglang", "lightx2v"]
ENGINES: Mapping[Engine, Callable[[Student], Plan]] = MappingProxyType(
    {"vllm-omni": vllm_omni, "sglang": sglang, "lightx2v": lightx2v}
)
"""Functions that make the plan for a student. ValueError where the engine would make other clips than its contract asks for."""
