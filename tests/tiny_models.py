"""Tiny models of the diffusers ecosystem: the real classes with random weights, saved as the published ones are.

A new family is one function that saves a pipeline, and one entry of `TINY`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from fewstep.core import Cond
from fewstep.diffusion import CFG, Contract

WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    "a",
    "red",
    "ball",
    "blue",
    "box",
    "cat",
    "walks",
    "in",
    "the",
    "rain",
    "dark",
    "frames",
]
TEXT_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One family: how its pipeline is made, and what diffusers' own classes do where the tests compare."""

    make: Callable[[], Any]
    """The pipeline."""
    size: dict[str, int]
    """Arguments of `Diffusers` for a clip that is quick to make."""
    card: dict[str, Any]
    """Fields that the card must have by itself."""
    forward: Callable[[Any, Tensor, Tensor, Cond], Tensor]
    """Diffusers' network (the pipeline's) on x, t and conditions; t is that of fewstep, per sample or per token."""
    encode: Callable[[Any, Tensor], Tensor]
    """Latents of frames as the pipeline's denoiser knows them."""
    text_arguments: dict[str, Any] = field(default_factory=dict)
    """Of the pipeline's `encode_prompt`."""
    causal: bool = False
    """Whether it takes a pattern, a cache and a time per frame."""

    @staticmethod
    def times(pipeline: Any) -> tuple[float, ...]:
        """Where the pipeline's scheduler has been in its last call."""
        return tuple(map(float, pipeline.scheduler.sigmas))


def wan(**vae: Any) -> WanPipeline:
    """Wan 2.1 text to video."""
    return WanPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=wan_codec(**vae), transformer=wan_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def wan_ti2v() -> WanPipeline:
    """The 5B model of Wan 2.2: its autoencoder takes patches of 2 x 2 pixels, and adds what it down- and upsamples."""
    pipeline = wan(
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, is_residual=True, decoder_base_dim=8
    )
    pipeline.register_to_config(expand_timesteps=True)
    return pipeline


def wan_experts() -> WanPipeline:
    """The A14B model of Wan 2.2."""
    pipeline = wan()
    pipeline.register_modules(transformer_2=wan_transformer())
    pipeline.register_to_config(boundary_ratio=0.6)
    return pipeline


def wan_image(**more: Any) -> WanImageToVideoPipeline:
    """Wan 2.1 image to video: 4 channels of noise, 4 of a mask and 4 of the image."""
    eye = CLIPVisionConfig(
        hidden_size=20, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    parts = {
        "image_encoder": CLIPVisionModel(eye),
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        "transformer": wan_transformer(in_channels=12, image_dim=20, added_kv_proj_dim=24),
    }
    return WanImageToVideoPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=wan_codec(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **(parts | more),
    )  # fmt: skip


def wan_image_experts() -> WanImageToVideoPipeline:
    """Wan 2.2 I2V-A14B: no vision encoder."""
    first, second = (wan_transformer(in_channels=12) for _ in range(2))
    return wan_image(
        image_encoder=None, image_processor=None, transformer=first, transformer_2=second, boundary_ratio=0.9
    )


def wan_experts_forward(pipeline: WanPipeline, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    early, late = (
        network(x, 1000 * t, cond.text, return_dict=False)[0]
        for network in (pipeline.transformer, pipeline.transformer_2)
    )
    return torch.where((t >= 0.6)[:, None, None, None, None], early, late)


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": TEXT_WIDTH,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**(config | changes))


def wan_codec(**changes: Any) -> AutoencoderKLWan:
    config = {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "latents_mean": [-0.7, 0.2, 0.0, 0.1], "latents_std": [2.8, 1.4, 0.5, 1.0],
    }  # fmt: skip
    return AutoencoderKLWan(**(config | changes))


def wan_forward(pipeline: WanPipeline, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return pipeline.transformer(x, 1000 * t, cond.text, return_dict=False)[0]


def wan_encode(pipeline: WanPipeline, frames: Tensor) -> Tensor:
    config = pipeline.vae.config
    mean, std = (torch.tensor(x)[None, :, None, None, None] for x in (config.latents_mean, config.latents_std))
    return (pipeline.vae.encode(frames).latent_dist.mode() - mean) / std


TINY = {
    "wan": Tiny(
        make=wan, size={"num_frames": 5, "height": 32, "width": 48}, forward=wan_forward, encode=wan_encode, causal=True,
        card={"num_frames": 81, "fps": 16, "contract": Contract(steps=50, shift=3.0, guidance=CFG(scale=5.0))},
        text_arguments={"max_sequence_length": 512},
    ),
    "wan_ti2v": Tiny(
        make=wan_ti2v, size={"num_frames": 5, "height": 64, "width": 96}, forward=wan_forward, encode=wan_encode, causal=True,
        card={
            "num_frames": 121, "height": 704, "width": 1280, "fps": 24,
            "contract": Contract(steps=50, shift=3.0, guidance=CFG(scale=5.0)),
        },
        text_arguments={"max_sequence_length": 512},
    ),
    "wan_experts": Tiny(
        make=wan_experts, size={"num_frames": 5, "height": 32, "width": 48}, forward=wan_experts_forward, encode=wan_encode,
        card={
            "num_frames": 81, "height": 720, "width": 1280, "fps": 16,
            "contract": Contract(steps=40, shift=3.0, guidance=CFG(scale=4.0, low=0.6, outside=3.0)),
        },
        text_arguments={"max_sequence_length": 512},
    ),
}  # fmt: skip


IMAGE = {"wan_image": wan_image, "wan_image_experts": wan_image_experts}
"""Families that make clips of images."""
IMAGE_SIZE = {"num_frames": 5, "height": 32, "width": 48}


def save_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """The tiny model `name` in diffusers' layout; no weight of its denoiser is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = TINY[name].make() if name in TINY else IMAGE[name]()
        with torch.no_grad():
            for network in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
                for parameter in network.parameters() if network else ():
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    pipeline.save_pretrained(folder)
    return folder


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces, and the end token of T5."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
    )  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
