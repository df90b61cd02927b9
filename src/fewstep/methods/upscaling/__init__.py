"""Methods for students that make low-resolution clips sharp in one step."""

from fewstep.methods.upscaling.latent_pixel import LatentPixel
from fewstep.methods.upscaling.time_aware import TimeAwareDistillation

__all__ = ["LatentPixel", "TimeAwareDistillation"]
