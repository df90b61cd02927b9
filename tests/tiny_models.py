"""Tiny models of the diffusers ecosystem: the real classes with random weights, saved as the published ones are.

A new family is one function that saves a pipeline, and one entry of `TINY`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

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


def wan() -> WanPipeline:
    """Wan 2.1 text to video."""
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=TEXT_WIDTH, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[-0.7, 0.2, 0.0, 0.1], latents_std=[2.8, 1.4, 0.5, 1.0],
    )  # fmt: skip
    return WanPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


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
    )
}  # fmt: skip


def save_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """The tiny model `name` in diffusers' layout; no weight of its denoiser is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = TINY[name].make()
        with torch.no_grad():
            for parameter in pipeline.transformer.parameters():
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
