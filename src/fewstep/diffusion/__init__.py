"""Mathematics without networks: paths, predictions, times, guidance, samplers."""

from fewstep.diffusion.contract import Contract, StepCountError
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.path import EDM, PATHS, VP, Betas, NoisePath, RectifiedFlow, Trig
from fewstep.diffusion.prediction import KINDS, Kind, Prediction, from_x0, target
from fewstep.diffusion.samplers import ddim, dpmpp_2m, euler, heun, renoise, solve
from fewstep.diffusion.times import (
    DENSITIES,
    Grid,
    LogitNormal,
    TimeDensity,
    Timesteps,
    Uniform,
    shifted,
    timestep,
    uniform_grid,
)

__all__ = [
    "CFG", "DENSITIES", "Betas", "EDM", "KINDS", "PATHS", "VP", "Contract", "Grid", "Kind", "LogitNormal", "NoisePath",
    "Prediction", "RectifiedFlow", "StepCountError", "TimeDensity", "Timesteps", "Trig", "Uniform", "ddim", "dpmpp_2m", "euler",
    "from_x0", "heun", "renoise", "shifted", "solve", "target", "timestep", "uniform_grid",
]  # fmt: skip
