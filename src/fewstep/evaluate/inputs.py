"""Inputs for external feature networks, and digests of these networks."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from fewstep.core.pixels import covering


def require_transformers(what: str) -> None:
    """ValueError if transformers is not installed; the message says how to install it."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f'{what} needs transformers, which is not installed: pip install "fewstep[diffusers]"')


def as_read(frames: Tensor, size: tuple[int, int], num_frames: int | None = None) -> Tensor:
    """Fit clips `[B, 3, F, H, W]` in [-1, 1] to a network that reads `num_frames` frames of `size` (height, width).

    Frames are picked at equal distances from the first to the last (all frames for None). Each frame is scaled to cover the
    size and cropped at the centre (`core.pixels.cover`). Clips that fit are not changed. ValueError for clips with fewer
    frames.
    """
    count = frames.shape[2]
    if num_frames is not None and num_frames != count:
        if count < num_frames:
            raise ValueError(
                f"the network reads {num_frames} frames, and the clips have {count}; generate longer clips"
            )
        frames = frames[:, :, [round(i * (count - 1) / (num_frames - 1)) for i in range(num_frames)]]
    return covering(frames, size)


def fingerprint_files(paths: Iterable[Path]) -> str:
    """A digest of 12 hexadecimal characters, which changes if the content of any file changes."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(paths):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    return digest.hexdigest()


def fingerprint_folder(folder: Path) -> str:
    """`fingerprint_files` of the weights and settings in a folder written by `save_pretrained`."""
    return fingerprint_files(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json", ".txt"))
