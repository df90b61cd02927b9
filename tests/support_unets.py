"""What tests share: tiny pipelines of diffusers' real classes around a U-Net, with random weights, none of them zero."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH, FRAMES = 12, 4
SIZES: dict[str, Any] = {
    "block_out_channels": [8, 16, 16], "norm_num_groups": 4, "cross_attention_dim": WIDTH, "layers_per_block": 1,
    "sample_size": 8,
}  # fmt: skip
VIDEO = SIZES | {
    "down_block_types": ["CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"],
    "up_block_types": ["UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"],
    "num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 8,
}  # fmt: skip
IMAGE = SIZES | {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
}  # fmt: skip


def awake(network: nn.Module, seed: int = 0) -> Any:
    """The network with every parameter moved, so that nothing that starts at zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def tokenizer() -> CLIPTokenizer:
    """It knows letters and digits."""
    signs = string.ascii_lowercase + string.digits
    words = ["<|startoftext|>", "<|endoftext|>", *signs, *(f"{sign}</w>" for sign in signs)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()), hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return awake(CLIPTextModel(config))


def vae() -> AutoencoderKL:
    return awake(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=16,
        )
    )  # fmt: skip


def scheduler(schedule: str, **changes: Any) -> DDIMScheduler:
    """As it is published: leading timesteps with an offset, ending at the first level of the table."""
    plain = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    return DDIMScheduler(**({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": schedule} | plain | changes))


def animatediff(**changes: Any) -> AnimateDiffPipeline:
    motion = MotionAdapter(
        block_out_channels=VIDEO["block_out_channels"], motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=2, motion_max_seq_length=8,
    )  # fmt: skip
    unet = awake(UNetMotionModel(**VIDEO))
    return _quiet(AnimateDiffPipeline(vae(), text_encoder(), tokenizer(), unet, motion, scheduler("linear", **changes)))


def stable_diffusion(**changes: Any) -> StableDiffusionPipeline:
    parts = (vae(), text_encoder(), tokenizer(), awake(UNet2DConditionModel(**IMAGE), seed=1))
    return _quiet(
        StableDiffusionPipeline(
            *parts, scheduler("scaled_linear", **changes), None, None, requires_safety_checker=False
        )
    )


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
