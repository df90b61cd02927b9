"""Mathematics without networks: paths, predictions, times, guidance, samplers."""

from fewstep.diffusion.contract import Contract, Memory, Standing, Stream
from fewstep.diffusion.densities import DENSITIES, Grid, LogitNormal, TimeDensity, Uniform
from fewstep.diffusion.dynamic import DynamicCFG
from fewstep.diffusion.free_noise import FreeNoise
from fewstep.diffusion.grids import (
    Angles,
    Exact,
    FromVideo,
    LinearQuadratic,
    Shifted,
    StepCountError,
    TimeGrid,
    Timesteps,
    Trained,
)
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.path import NoisePath
from fewstep.diffusion.paths import EDM, PATHS, VP, Betas, RectifiedFlow, Trig
from fewstep.diffusion.prediction import KINDS, Kind, Prediction, from_x0, target
from fewstep.diffusion.samplers import (
    DDIM,
    SAMPLERS,
    DPMpp2M,
    Euler,
    FixedStride,
    Heun,
    Renoise,
    Sampler,
    SDEDPMpp2M,
    Staggered,
    Step,
    UniPC,
    WholeTimesteps,
)
from fewstep.diffusion.scheduler_grids import FlowSchedule, MultistepTimesteps
from fewstep.diffusion.stg import STG
from fewstep.diffusion.times import shifted, timestep, uniform_grid

GRIDS: tuple[type[TimeGrid], ...] = (
    Shifted,
    LinearQuadratic,
    Timesteps,
    Exact,
    Trained,
    FromVideo,
    Angles,
    FlowSchedule,
    MultistepTimesteps,
)
GUIDANCES: tuple[type[CFG], ...] = (CFG, DynamicCFG, STG)
NAMED: tuple[type, ...] = (*PATHS, *SAMPLERS, *GRIDS, *GUIDANCES)
"""What a card can name."""

__all__ = [
    "CFG", "DDIM", "DENSITIES", "EDM", "GRIDS", "GUIDANCES", "KINDS", "NAMED", "PATHS", "SAMPLERS", "STG", "VP", "Angles",
    "Betas", "Contract", "DPMpp2M", "DynamicCFG", "Euler", "Exact", "FixedStride", "FlowSchedule", "FreeNoise", "FromVideo",
    "Grid", "Heun", "Kind", "LinearQuadratic", "LogitNormal", "Memory", "MultistepTimesteps", "NoisePath", "Prediction",
    "RectifiedFlow", "Renoise", "SDEDPMpp2M", "Sampler", "Shifted", "Staggered", "Standing", "Step", "StepCountError", "Stream",
    "TimeDensity", "TimeGrid", "Timesteps", "Trained", "Trig", "UniPC", "Uniform", "WholeTimesteps", "from_x0", "shifted",
    "target", "timestep", "uniform_grid",
]  # fmt: skip
