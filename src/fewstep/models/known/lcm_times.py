"""The timesteps of latent consistency models (2310.04378), which are not spaced as those of their teachers.

A student was trained on every 20th of 1000 timesteps: 19, 39, ..., 999. In n steps it visits n of these 50, from the last on,
each the whole part of k 50 / n before it.
"""

from fewstep.diffusion import Exact, Timesteps


def lcm_times(counts: range, trained: int = 50) -> Exact:
    """The grid of `LCMScheduler` of diffusers with `original_inference_steps=trained`, for each number of steps.

    >>> lcm_times(range(4, 5)).times(4)
    (1.0, 0.76, 0.5, 0.26, 0.0)
    """
    grids = []
    for steps in counts:
        chosen = [trained - k * trained // steps for k in range(steps)]
        grids.append((*(place / trained for place in chosen), 0.0))
    return Exact(grids=tuple(grids), otherwise=Timesteps())
