"""Numbers that are not finite, not whole, absurdly large or negative, at every number that a recipe holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from faults.case import Case
from faults.given import RECIPE, recipe
from fewstep.core.build import parameters
from fewstep.diffusion import CFG, DENSITIES, PATHS, Contract
from fewstep.engine import Health, Optim, Parallel, Settings, WorldProbe
from fewstep.methods import METHODS
from fewstep.models import FrameAutoencoder, Lora, TextEncoder, VideoDiT
from fewstep.models.source import Scratch
from fewstep.world.data import WorldClips

METHOD = "{type: FlowMatching}"
ANY_SIGN = {"seed", "pool_seed", "layers", "steps_offset"}
"""Whole numbers that may be negative."""
FAULTS = {float: (".nan", ".inf", "-.inf", "1e999"), int: ("1.5", "99999999999999999999999999", ".inf", "-99")}


def places() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Dotted key, class, and the method that a recipe must have for it."""
    for method in METHODS:
        yield "method", method, f"{{type: {method.__name__}}}"
    yield "settings", Settings, METHOD
    yield "settings.optim.student", Optim, METHOD
    yield "settings.parallel", Parallel, METHOD
    yield "settings.health", Health, METHOD
    yield "settings.lora", Lora, METHOD
    yield "probe", WorldProbe, METHOD
    yield "model", Scratch, METHOD
    yield "model.denoiser", VideoDiT, METHOD
    yield "model.text", TextEncoder, METHOD
    yield "model.codec", FrameAutoencoder, METHOD
    yield "model.contract", Contract, METHOD
    yield "data", WorldClips, METHOD
    yield "method.guidance", CFG, "{type: DMD2}"
    for density in DENSITIES:
        yield "method.density", density, f"{{type: FlowMatching, density: {{type: {density.__name__}}}}}"
    for path in PATHS:
        yield "model.path", path, METHOD


def kind_of(expected: Any) -> type | None:
    """float or int where the annotation is a number's, or None."""
    arms = get_args(expected) if get_origin(expected) in (Union, type(int | str)) else (expected,)
    plain = [get_args(arm)[0] if get_origin(arm) is Annotated else arm for arm in arms]
    return next((arm for arm in plain if arm in FAULTS), None)


def cases() -> Iterator[Case]:
    for place, cls, method in places():
        for parameter in parameters(cls):
            kind = kind_of(parameter.type)
            if kind is None or (parameter.required and parameter.name != "steps"):
                continue
            key = f"{place}.{parameter.name}"
            files = recipe(METHOD, method, RECIPE)
            if place == "model.path":
                files = recipe("num_frames: 4", f"num_frames: 4\n  path: {{type: {cls.__name__}}}", RECIPE)
            for value in FAULTS[kind]:
                if value == "-99" and parameter.name in ANY_SIGN:
                    continue
                name = f"{cls.__name__}.{parameter.name} {value}"
                yield Case(name, ("explain", "r.yaml", f"--{key}={value}"), (key,), files)


CASES = tuple(cases())
