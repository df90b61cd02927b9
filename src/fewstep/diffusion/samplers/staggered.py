"""A time per frame: the later a frame, the later it is denoised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fewstep.core import Noise
from fewstep.core.bounds import Natural, Size
from fewstep.diffusion.samplers.base import Denoise, Here, Sampler, Step, Time, Times
from fewstep.diffusion.samplers.euler import Euler


@dataclass(frozen=True, kw_only=True)
class Staggered(Sampler):
    """Each group of frames starts `delay` steps after the group before it (the pyramid of Diffusion Forcing, 2407.01392).

    In call m, group g is at the (m - g delay)-th time of the grid: it waits at the first and rests at the last. With a
    delay of 0 this is `sampler` itself, bit for bit; with one as long as the grid, groups are made one after the other.
    The network must take a time per frame.
    """

    sampler: Sampler = Euler()
    """Sampler that moves a frame from one time to the next."""
    groups: Size = 4
    """Number of groups of frames; their sizes differ by at most one frame. A clip needs at least this many latent frames."""
    delay: Natural = 1
    """Steps between the starts of two neighbouring groups."""

    def __post_init__(self) -> None:
        if self.groups < 1 or self.delay < 0:
            raise ValueError(
                f"a staggered sampler needs groups >= 1 and delay >= 0, got {self.groups} and {self.delay}"
            )
        if not self.sampler.one_time:
            raise ValueError("a staggered sampler holds one that gives all frames one time, such as Euler")
        if not self.sampler.by_frame:
            raise ValueError(
                f"a staggered sampler holds one that can move each frame by its own time, such as Euler, not {self.sampler}"
            )

    @property
    def deterministic(self) -> bool:
        return self.sampler.deterministic

    @property
    def one_time(self) -> bool:
        return self._last == 0

    def calls(self, steps: int) -> int:
        """Those of `sampler` in `steps + (groups - 1) delay` steps."""
        return self.sampler.calls(steps + self._last)

    def move(self, here: Here) -> Tensor:
        return self.sampler.move(here)

    def sampling(self, denoise: Denoise, x: Tensor, times: Times, *, rng: Noise) -> Iterator[Step]:
        yield from self.sampler.sampling(denoise, x, self.schedule(times, x.shape[2]), rng=rng)

    def schedule(self, times: Times, frames: int) -> Times:
        """The times of all `frames` before every call, and at the end.

        >>> Staggered(groups=2).schedule((1.0, 0.5, 0.0), 2)
        ((1.0, 1.0), (0.5, 1.0), (0.0, 0.5), (0.0, 0.0))
        """
        if frames < self.groups:
            raise ValueError(
                f"a clip of {frames} latent frames cannot be cut into {self.groups} groups; give the staggered sampler at "
                f"most {frames}"
            )
        if self._last == 0:
            return times
        late = [frame * self.groups // frames * self.delay for frame in range(frames)]
        return tuple(self._row(times, step, late) for step in range(len(times) + self._last))

    def _row(self, times: Times, step: int, late: list[int]) -> Time:
        return tuple(float(times[min(max(step - wait, 0), len(times) - 1)]) for wait in late)  # type: ignore[arg-type]

    @property
    def _last(self) -> int:
        """Steps that the last group waits."""
        return (self.groups - 1) * self.delay
