"""Samplers: from noise to a clip, step by step. One per file, listed in SAMPLERS."""

from fewstep.diffusion.samplers.base import Denoise, Here, Sampler, Step, Time, Times, finish, full
from fewstep.diffusion.samplers.ddim import DDIM
from fewstep.diffusion.samplers.dpmpp_2m import DPMpp2M
from fewstep.diffusion.samplers.euler import Euler
from fewstep.diffusion.samplers.fixed_stride import FixedStride
from fewstep.diffusion.samplers.heun import Heun
from fewstep.diffusion.samplers.renoise import Renoise
from fewstep.diffusion.samplers.sde_dpmpp_2m import SDEDPMpp2M
from fewstep.diffusion.samplers.staggered import Staggered
from fewstep.diffusion.samplers.unipc import UniPC
from fewstep.diffusion.samplers.whole_timesteps import WholeTimesteps

SAMPLERS: tuple[type[Sampler], ...] = (
    Euler,
    Heun,
    DDIM,
    FixedStride,
    DPMpp2M,
    SDEDPMpp2M,
    UniPC,
    Renoise,
    Staggered,
    WholeTimesteps,
)

__all__ = [
    "DDIM", "SAMPLERS", "DPMpp2M", "Denoise", "Euler", "FixedStride", "Here", "Heun", "Renoise", "SDEDPMpp2M", "Sampler",
    "Staggered", "Step", "Time", "Times", "UniPC", "WholeTimesteps", "finish", "full",
]  # fmt: skip
