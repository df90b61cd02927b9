"""Clips of whole chunks: which numbers of frames a stream can make, said in frames and in latent frames."""

from __future__ import annotations

from collections.abc import Callable

from fewstep.diffusion import Stream

_SEARCHED = 999
"""Frames above the number that was asked for among which the next one that fits is searched."""


def fitting(stream: Stream, frames: int, latents: Callable[[int], int]) -> tuple[int, ...]:
    """Latent frames of the chunks of a clip of so many frames. `latents` counts the latent frames of so many frames, or raises
    ValueError. ValueError names the nearest clips that whole chunks make.

    >>> fitting(Stream(chunks=(3,)), 117, lambda frames: (frames + 3) // 4)
    (3, 3, 3, 3, 3, 3, 3, 3, 3, 3)
    """

    def lengths(count: int) -> tuple[int, ...] | None:
        try:
            return stream.lengths(latents(count)) if count > 0 else None
        except ValueError:
            return None

    if (found := lengths(frames)) is not None:
        return found
    try:
        are = f"{frames} frames are {latents(frames)} latent frames, which are not whole chunks"
    except ValueError:
        are = f"{frames} frames are not whole latent frames"
    wider = range(frames - 1, 0, -1), range(frames + 1, frames + _SEARCHED)
    near = [next((n for n in counts if lengths(n)), None) for counts in wider]
    fit = " or ".join(f"{n} frames ({latents(n)} latent frames)" for n in near if n is not None)
    raise ValueError(f"chunks have {_said(stream.chunks)} latent frames, and {are}; ask for {fit}")


def _said(chunks: tuple[int, ...]) -> str:
    *first, last = map(str, chunks)
    return f"{', '.join(first)}, then {last}" if first else last
