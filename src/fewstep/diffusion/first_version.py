"""Contracts of the first version (flat numbers and a solver's name), read as today's objects.

It wrote `{solver: euler, steps: 50, shift: 3.0, terminal: 0.0, threshold: 0.0, timesteps: null, grids: {"2": [1.0, 0.5, 0.0]}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fewstep.core.build import At, build, unknown
from fewstep.diffusion.grids import Exact, LinearQuadratic, Shifted, TimeGrid, Timesteps
from fewstep.diffusion.samplers import DDIM, DPMpp2M, Euler, Heun, Renoise, Sampler

SOLVERS: Mapping[str, Sampler] = MappingProxyType(
    {"euler": Euler(), "heun": Heun(), "ddim": DDIM(), "dpmpp_2m": DPMpp2M(), "renoise": Renoise()}
)
"""Samplers by the names that the first version knew them by."""
_GRID: Mapping[str, Any] = MappingProxyType({
    "shift": float, "terminal": float, "threshold": float, "timesteps": Timesteps | None, "grids": dict[str, tuple[float, ...]],
})  # fmt: skip


def objects(tree: Mapping[str, Any], at: At) -> dict[str, Any]:
    """The keys and values of a contract, with `sampler` and `grid` in the place of what the first version had."""
    rest = {key: value for key, value in tree.items() if key != "solver" and key not in _GRID}
    flat = {key: tree[key] for key in _GRID if key in tree}
    if "solver" in tree:
        _require_alone("solver", "sampler", tree, at)
        rest["sampler"] = _sampler(tree["solver"], at.key("solver"))
    if flat:
        _require_alone(next(iter(flat)), "grid", tree, at)
        rest["grid"] = _grid(flat, at)
    return rest


def _require_alone(before: str, now: str, tree: Mapping[str, Any], at: At) -> None:
    """RecipeError where a contract has today's key as well."""
    if now in tree:
        raise at.key(before).fail(
            f"is a key of the first version and says what {now} says, which is there too; change {now} instead"
        )


def _sampler(name: Any, at: At) -> Sampler:
    name = build(str, name, {}, at)
    if name not in SOLVERS:
        raise unknown(at, name, SOLVERS)
    return SOLVERS[name]


def _grid(flat: Mapping[str, Any], at: At) -> TimeGrid:
    values = {key: build(_GRID[key], value, {}, at.key(key)) for key, value in flat.items()}
    try:
        grid = _any_count(values)
        listed = values.get("grids") or {}
        for count, times in listed.items():
            if str(len(times) - 1) != count:
                raise ValueError(f"the grid of {count} steps needs one time more than steps, got {list(times)}")
        return Exact(grids=tuple(sorted(listed.values(), key=len)), otherwise=grid) if listed else grid
    except ValueError as error:
        raise at.fail(f"is refused: {error}") from error


def _any_count(values: Mapping[str, Any]) -> TimeGrid:
    """The grid of a teacher: its timesteps came first, then its threshold."""
    if values.get("timesteps") is not None:
        return values["timesteps"]  # type: ignore[no-any-return]
    if values.get("threshold"):
        return LinearQuadratic(threshold=values["threshold"])
    return Shifted(shift=values.get("shift", 1.0), terminal=values.get("terminal", 0.0))
