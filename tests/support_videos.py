"""Your own videos, as the README tells it: small video files, and the commands from them to a measured student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from fewstep.cli import main
from fewstep.data import write_video

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clips"
COLORS = {"red": (1, -1, -1), "green": (-1, 0.6, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}

Said = Callable[..., tuple[int, str, str]]
"""Runs a command in process: exit code, standard output, standard error."""


def make_videos(folder: Path, count: int = 3, *, frames: int = 24, size: int = 32, waves: bool = False) -> Path:
    """A square of one colour that moves right over black, one video per colour, and a captions.jsonl.

    With `waves` over slow waves of light: an autoencoder that sees little but black learns black.
    """
    lines = []
    for number, (color, value) in enumerate(list(COLORS.items())[:count]):
        clip = torch.full((3, frames, size, size), -1.0)
        if waves:
            phase = torch.arange(size)[:, None] + 2 * torch.arange(size) + 3 * torch.arange(frames)[:, None, None]
            clip[:] = torch.stack([0.8 * torch.sin(phase / (8 + 3 * channel) + number) for channel in range(3)])
        for frame in range(frames):
            left = (frame + 5 * number) % (size - 12)
            clip[:, frame, 10:22, left : left + 12] = torch.tensor(value)[:, None, None]
        write_video(folder / f"{color}.mp4", clip, fps=24)
        lines.append({"video": f"{color}.mp4", "caption": f"a {color} square moves to the right"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(*words: object) -> None:
    """One command that must succeed."""
    assert main([str(word) for word in words]) == 0, words


def sized(frames: int, size: int, *places: str) -> list[object]:
    """Overrides that give the recipes' `places` (model, data) another clip size."""
    return [w for p in places for w in (f"--{p}.num-frames", frames, f"--{p}.height", size, f"--{p}.width", size)]
