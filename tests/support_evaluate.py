"""What tests share: the teacher whose clips evaluation is tried on."""

from __future__ import annotations

import torch

from fewstep.diffusion import CFG, Contract, RectifiedFlow
from fewstep.models import Card, Denoiser, FrameAutoencoder, TextEncoder, VideoDiT, VideoModel


def guided_teacher(steps: int, num_frames: int) -> VideoModel:
    """A tiny model with fixed random weights, sampled with guidance; what it predicts depends on what it sees."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = VideoDiT(channels=4, width=32, depth=1, heads=2, text_width=16)
        parts = {
            "denoiser": Denoiser(backbone, RectifiedFlow(), "flow"),
            "text": TextEncoder(width=16),
            "codec": FrameAutoencoder(latent_channels=4, width=8),
        }
        for parameter in backbone.parameters():  # a new network predicts 0 whatever it sees
            torch.nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    contract = Contract(steps=steps, guidance=CFG(scale=3.0))
    return VideoModel(Card(name="tiny teacher", contract=contract, num_frames=num_frames), parts)
