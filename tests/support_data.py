"""A small model for data, and a prepared folder of any number of tiny clips."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.core.peers import Peers
from fewstep.data.store import PartedWriter
from fewstep.models import Card, FrameAutoencoder, TextEncoder, VideoModel, fingerprint

PART, SHARD = 16_384, 4096
"""Few files: making them is not what is tested or measured."""


def tiny() -> VideoModel:
    torch.manual_seed(0)
    parts = {"codec": FrameAutoencoder(width=8, depth=1), "text": TextEncoder(width=16, length=8, buckets=64, depth=1)}
    return VideoModel(Card(name="tiny", num_frames=1, height=4, width=4), parts)


def synthetic_index(folder: Path, count: int) -> Path:
    """A prepared folder of `count` clips of one pixel, whose latents are their numbers."""
    cut = {"num_frames": 1, "height": 4, "width": 4}
    settings = {"codec": fingerprint(tiny().codec), "cut": cut}
    writer = PartedWriter(folder, "latents", settings, -(-count // PART), Peers())
    for number in writer.mine:
        part = writer.part(number, SHARD)
        for i in range(number * PART, min(count, (number + 1) * PART)):
            caption = (
                f"clip {i} of a man in a blue coat who walks along a rainy street at night while cars pass by " * 3
            )
            row = {"caption": caption, "video": f"part{number}/video{i:08d}.mp4", "start": 0}
            part.add(row, {"latents": torch.full((4, 1, 1, 1), float(i))}, {})
        part.finish({})
    writer.finish(latent_shape=[4, 1, 1, 1])
    return folder
