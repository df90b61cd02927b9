"""A video that sampling changes or makes sharp: chunks, or whole clips, begin with its latents and not with noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fewstep.diffusion import NoisePath, TimeGrid
from fewstep.diffusion.samplers import full


@dataclass(frozen=True)
class Video:
    """A video that is given (video-to-video): sampling starts from its latents, noised, instead of from noise."""

    latents: Callable[[int], Tensor]
    """Latents `[B, C, f, h, w]` of a chunk, or one for all clips, by its number; 0 is the whole clip of a model that makes whole
    clips. Equal for equal numbers."""
    strength: float = 1.0
    """Each chunk starts at the largest time of the student's grid that is not above this one; 1: nothing of the video is left,
    unless the student begins with a video (`FromVideo`)."""

    def begins(self, times: tuple[float, ...]) -> int:
        """The step to begin with. ValueError where no time is low enough."""
        for step, time in enumerate(times[:-1]):
            if time <= self.strength + 1e-6:
                return step
        raise ValueError(
            f"strength {self.strength:g} is below the student's last step, at {times[-2]:.4g}; give one of its times, "
            f"{', '.join(f'{time:.4g}' for time in times[:-1])}"
        )

    def start(
        self, chunk: int, noise: Tensor, path: NoisePath, grid: TimeGrid, times: tuple[float, ...]
    ) -> tuple[Tensor, tuple[float, ...]]:
        """Latents with which a chunk begins, and the times that are left of `times`. ValueError where the video has another shape
        than `noise`."""
        clean, times = self.latents(chunk), times[self.begins(times) :]
        clean = clean.expand(len(noise), -1, -1, -1, -1) if len(clean) == 1 else clean
        if clean.shape != noise.shape:
            raise ValueError(
                f"chunk {chunk} has latents {tuple(noise.shape)}, and its video was given as {tuple(clean.shape)}"
            )
        return begun(clean, noise, path, grid, times[0]), times


def begun(clean: Tensor, noise: Tensor, path: NoisePath, grid: TimeGrid, time: float) -> Tensor:
    """The latents of a video at the first time of sampling: with the noise of that time, or with what the grid says."""
    amount = time if grid.video_noise is None else grid.video_noise
    return clean if amount == 0 else path.add_noise(clean, noise, full(amount, clean))


def require_noise(grid: TimeGrid) -> None:
    """ValueError for a student that cannot begin with noise."""
    if grid.video_noise is not None:
        raise ValueError(
            "this student begins with the latents of a video, such as a low-resolution one that it makes sharp, and none was "
            "given; give video (--video)"
        )
