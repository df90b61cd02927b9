"""Tiny models of the diffusers ecosystem: the real classes with random weights, saved as the published ones are.

A new family is one function that saves a pipeline, and one entry of `TINY`.
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx import pipeline_ltx, pipeline_ltx_condition
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from fewstep.core import Rng
from fewstep.diffusion import CFG, Betas, Contract, LinearQuadratic, Shifted
from fewstep.models import VideoModel
from fewstep.models.runtime import Runtime
from fewstep.models.source import Diffusers

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


def sample(pipeline: Any, noise: Tensor, **options: Any) -> Tensor:
    return torch.as_tensor(pipeline(latents=noise, **options).frames)


def sigmas(pipeline: Any) -> tuple[float, ...]:
    return tuple(map(float, pipeline.scheduler.sigmas))


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One family: how its pipeline is made, and what diffusers' own classes do where the tests compare."""

    make: Callable[..., Any]
    """The pipeline."""
    size: dict[str, int]
    """Arguments of `Diffusers` for a clip that is quick to make."""
    card: dict[str, Any]
    """Fields that the card must have by itself."""
    encode: Callable[[Any, Tensor], Tensor]
    """Latents of frames as the pipeline's denoiser knows them."""
    sample: Callable[..., Tensor] = sample
    """The pipeline's clips of given noise, with its own options: frames, or latents in the order of fewstep."""
    times: Callable[[Any], tuple[float, ...]] = sigmas
    """Where the pipeline's scheduler has been in its last call."""
    text_arguments: dict[str, Any] = field(default_factory=lambda: {"do_classifier_free_guidance": False})
    """Arguments of the pipeline's `encode_prompt`."""
    unread: tuple[str, ...] = ()
    """Parts of names of weights that nothing depends on."""
    causal: bool = False
    """Whether it takes a pattern, a cache and a time per frame."""


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


def wan_ends() -> WanImageToVideoPipeline:
    """Wan 2.1 FLF2V: it sees the first and the last image, each as 5 tokens."""
    return wan_image(
        transformer=wan_transformer(in_channels=12, image_dim=20, added_kv_proj_dim=24, pos_embed_seq_len=10)
    )


def wan_ti2v_image() -> WanImageToVideoPipeline:
    """The 5B model of Wan 2.2 with an image."""
    parts = {name: part for name, part in wan_ti2v().components.items() if not name.startswith("image")}
    return WanImageToVideoPipeline(**parts, expand_timesteps=True)


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


def wan_encode(pipeline: WanPipeline, frames: Tensor) -> Tensor:
    config = pipeline.vae.config
    mean, std = (torch.tensor(x)[None, :, None, None, None] for x in (config.latents_mean, config.latents_std))
    return (pipeline.vae.encode(frames).latent_dist.mode() - mean) / std


def ltx() -> LTXPipeline:
    """LTX-Video; its width is no multiple of 6, so that some values are not rotated."""
    transformer = LTXVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=10, in_channels=4, out_channels=4, cross_attention_dim=20,
        caption_channels=TEXT_WIDTH, num_layers=2,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=8, scaling_factor=0.9,
        timestep_conditioning=True,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.tensor([-0.7, 0.2, 0.0, 0.1]))
    vae.latents_std.copy_(torch.tensor([2.8, 1.4, 0.5, 1.0]))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.95, max_shift=2.05,
        shift_terminal=0.1,
    )  # fmt: skip
    return LTXPipeline(tokenizer=tokenizer(), text_encoder=t5(), vae=vae, transformer=transformer, scheduler=scheduler)


def ltx_encode(pipeline: LTXPipeline, frames: Tensor) -> Tensor:
    vae, shape = pipeline.vae, (1, -1, 1, 1, 1)
    latents = vae.encode(frames).latent_dist.mode() - vae.latents_mean.reshape(shape)
    return latents * vae.config.scaling_factor / vae.latents_std.reshape(shape)


LTX_SHIFT = math.exp(0.95 + (2.05 - 0.95) * (41 * 16 * 22 - 1024) / (4096 - 1024))
"""Shift for a clip of 161 frames of 512 x 704, with this codec."""


def ltx_sample(pipeline: LTXPipeline, noise: Tensor, **options: Any) -> Tensor:
    tokens = noise.flatten(2).transpose(1, 2)
    options |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025, "frame_rate": 20}
    with patch.object(pipeline_ltx, "randn_tensor", side_effect=[decoder_noise(noise)]):
        made = torch.as_tensor(pipeline(latents=tokens, **options).frames)
    return made.transpose(1, 2).reshape(noise.shape) if options["output_type"] == "latent" else made


def decoder_noise(latents: Tensor) -> Tensor:
    """The noise that is given to LTX's decoder."""
    shape = latents.shape[1], *latents.shape[3:]
    drawn = torch.stack([Rng(0).randn(shape, f"decode/{frame}") for frame in range(latents.shape[2])], 1)
    return drawn.expand_as(latents)


def ltx_condition() -> LTXConditionPipeline:
    """LTX-Video 0.9.5: another autoencoder, and a plain scheduler."""
    parts = ltx().components
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 16, 16), down_block_types=("LTXVideo095DownBlock3D",) * 2,
        decoder_block_out_channels=(8, 16), layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3,
        spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3, downsample_type=("spatiotemporal",) * 2, upsample_residual=(True, True),
        upsample_factor=(2, 2), timestep_conditioning=True, patch_size=8, scaling_factor=1.0,
        spatial_compression_ratio=32, temporal_compression_ratio=4,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.tensor([-0.7, 0.2, 0.0, 0.1]))
    return LTXConditionPipeline(**parts | {"vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler()})


def ltx_condition_sample(pipeline: LTXConditionPipeline, noise: Tensor, **options: Any) -> Tensor:
    """It draws its noise itself, for the latents and for the decoder."""
    options |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025, "frame_rate": 20}
    with patch.object(pipeline_ltx_condition, "randn_tensor", side_effect=[noise, decoder_noise(noise)]):
        return torch.as_tensor(pipeline(**options).frames)


def cogvideox(**config: Any) -> CogVideoXPipeline:
    """CogVideoX 1.0 with rotary positions, as its 5B model."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=64,
        sample_width=80,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing",
        clip_sample=False,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(**COGVIDEOX | config)
    return CogVideoXPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=vae, transformer=transformer, scheduler=scheduler
    )


COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 12,
    "text_embed_dim": TEXT_WIDTH, "num_layers": 2, "sample_width": 10, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 16, "use_rotary_positional_embeddings": True,
}  # fmt: skip


def cogvideox15(**config: Any) -> CogVideoXPipeline:
    """CogVideoX 1.5: patches of two frames, made by a linear layer."""
    return cogvideox(**{"patch_size_t": 2, "patch_bias": False, **config})


def cogvideox15_encode(pipeline: CogVideoXPipeline, frames: Tensor) -> Tensor:
    """An odd number of latent frames, after one more that fills the first patch."""
    latents = scaled_encode(pipeline, frames)
    return torch.cat([latents[:, :, :1], latents], 2)


def cogvideox_image(**config: Any) -> CogVideoXImageToVideoPipeline:
    """CogVideoX 1.0 image to video: 4 channels of noise and 4 of the image, and learned positions."""
    pipeline = cogvideox(**{"in_channels": 8, "use_learned_positional_embeddings": True, **config})
    pipeline.vae.register_to_config(scaling_factor=0.7)
    return CogVideoXImageToVideoPipeline(**pipeline.components)


def cogvideox15_image() -> CogVideoXImageToVideoPipeline:
    """CogVideoX 1.5 image to video: it is told an offset, and images are divided by the factor of the latents."""
    pipeline = cogvideox_image(
        use_learned_positional_embeddings=False, patch_size_t=2, patch_bias=False, ofs_embed_dim=12
    )
    pipeline.vae.register_to_config(invert_scale_latents=True)
    return pipeline


def cogvideox_sample(pipeline: CogVideoXPipeline, noise: Tensor, **options: Any) -> Tensor:
    made = torch.as_tensor(pipeline(latents=noise.transpose(1, 2), max_sequence_length=16, **options).frames)
    return made.transpose(1, 2) if options["output_type"] == "latent" else made


def levels(pipeline: CogVideoXPipeline) -> tuple[float, ...]:
    return (*((int(k) + 1) / 1000 for k in pipeline.scheduler.timesteps), 0.0)


COGVIDEOX_PATH = Betas(snr_shift=3.0, zero_snr=True)


def hunyuan(**config: Any) -> HunyuanVideoPipeline:
    """HunyuanVideo with embedded guidance, one block of each kind."""
    transformer = HunyuanVideoTransformer3DModel(**HUNYUAN | config)
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(4,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        mid_block_add_attention=False,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        pad_token_id=0,
    )  # fmt: skip
    clip = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=WORDS.index("</s>"),
    )  # fmt: skip
    return HunyuanVideoPipeline(
        tokenizer=tokenizer("</s> " * 38), text_encoder=LlamaModel(llama), tokenizer_2=tokenizer(),
        text_encoder_2=CLIPTextModel(clip), vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 10, "in_channels": 4, "out_channels": 4, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT_WIDTH, "pooled_projection_dim": 12,
    "rope_axes_dim": (2, 4, 4),
}  # fmt: skip


def hunyuan_sample(pipeline: HunyuanVideoPipeline, noise: Tensor, guidance_scale: float, **options: Any) -> Tensor:
    """With classifier-free guidance beside the embedded one."""
    made = pipeline(latents=noise, true_cfg_scale=guidance_scale, guidance_scale=6.0, **options)
    return torch.as_tensor(made.frames)


def hunyuan15(**config: Any) -> HunyuanVideo15Pipeline:
    """HunyuanVideo 1.5: two blocks, and no image."""
    transformer = HunyuanVideo15Transformer3DModel(**HUNYUAN15 | config)
    vae = AutoencoderKLHunyuanVideo15(
        block_out_channels=(8, 8, 8, 8, 8), latent_channels=4, layers_per_block=1, scaling_factor=1.04
    )
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(WORDS), hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, rope_scaling={"type": "default", "mrope_section": [2, 2, 2]},
    )  # fmt: skip
    byt5 = T5Config(vocab_size=384, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    words = tokenizer()
    words.chat_template = (
        "</s> " * (108 - 65) + "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}</s>"
    )
    return HunyuanVideo15Pipeline(
        tokenizer=words, text_encoder=Qwen2_5_VLTextModel(qwen), tokenizer_2=ByT5Tokenizer(),
        text_encoder_2=T5EncoderModel(byt5), vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip


HUNYUAN15 = {
    "num_attention_heads": 2, "attention_head_dim": 10, "in_channels": 9, "out_channels": 4, "num_layers": 2,
    "num_refiner_layers": 1, "text_embed_dim": TEXT_WIDTH, "text_embed_2_dim": 12, "image_embed_dim": 8,
    "rope_axes_dim": (2, 4, 4), "task_type": "t2v",
}  # fmt: skip


def hunyuan15_sample(
    pipeline: HunyuanVideo15Pipeline, noise: Tensor, guidance_scale: float, negative_prompt: str, **options: Any
) -> Tensor:
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
    pipeline.vae.enable_slicing()  # which it does not work without, for more than one clip
    return sample(pipeline, noise, negative_prompt=[negative_prompt] * len(noise), **options)


def scaled_encode(pipeline: Any, frames: Tensor) -> Tensor:
    return pipeline.vae.encode(frames).latent_dist.mode() * pipeline.vae.config.scaling_factor


TINY = {
    "wan": Tiny(
        make=wan, size={"num_frames": 5, "height": 32, "width": 48}, encode=wan_encode, causal=True,
        card={"num_frames": 81, "fps": 16, "contract": Contract(steps=50, grid=Shifted(shift=3.0), guidance=CFG(scale=5.0))},
        text_arguments={"do_classifier_free_guidance": False, "max_sequence_length": 512},
    ),
    "ltx": Tiny(
        make=ltx, size={"num_frames": 5, "height": 64, "width": 96, "fps": 20}, encode=ltx_encode,
        sample=ltx_sample, causal=True,
        card={
            "num_frames": 161, "height": 512, "width": 704, "fps": 25,
            "contract": Contract(steps=50, grid=Shifted(shift=LTX_SHIFT, terminal=0.1), guidance=CFG(scale=3.0)),
        },
    ),
    "ltx_condition": Tiny(
        make=ltx_condition, size={"num_frames": 5, "height": 64, "width": 96, "fps": 20}, encode=ltx_encode,
        sample=ltx_condition_sample, causal=True,
        card={
            "num_frames": 161, "height": 512, "width": 704, "fps": 25,
            "contract": Contract(steps=50, grid=LinearQuadratic(threshold=0.025), guidance=CFG(scale=3.0)),
        },
        text_arguments={"do_classifier_free_guidance": False, "max_sequence_length": 256},
    ),
    "cogvideox": Tiny(
        make=cogvideox, size={"num_frames": 9, "height": 48, "width": 96}, encode=scaled_encode,
        sample=cogvideox_sample, times=levels,
        card={"num_frames": 9, "height": 64, "width": 80, "fps": 8, "kind": "v", "path": COGVIDEOX_PATH},
        text_arguments={"do_classifier_free_guidance": False, "max_sequence_length": 16},
    ),
    "cogvideox15": Tiny(
        make=cogvideox15, size={"num_frames": 9, "height": 48, "width": 80}, encode=cogvideox15_encode,
        sample=cogvideox_sample, times=levels,
        card={"num_frames": 81, "height": 768, "width": 1360, "fps": 16, "kind": "v", "path": COGVIDEOX_PATH},
        text_arguments={"do_classifier_free_guidance": False, "max_sequence_length": 16},
    ),
    "hunyuan": Tiny(
        make=hunyuan, size={"num_frames": 5, "height": 48, "width": 80}, encode=scaled_encode,
        sample=hunyuan_sample, text_arguments={},
        card={
            "num_frames": 129, "height": 720, "width": 1280, "fps": 24,
            "contract": Contract(steps=50, grid=Shifted(shift=7.0)),
        },
    ),
    "hunyuan15": Tiny(
        make=hunyuan15, size={"num_frames": 5, "height": 48, "width": 80},
        encode=scaled_encode, sample=hunyuan15_sample, text_arguments={"batch_size": 3},
        unread=("image_embedder.", "context_embedder_2.", "blocks.1.inner.norm1_context.", "blocks.1.inner.attn.to_add_out.",
                "blocks.1.inner.attn.add_q_proj.", "blocks.1.inner.attn.norm_added_q.", "blocks.1.inner.ff_context."),
        card={
            "num_frames": 121, "height": 480, "width": 848, "fps": 24,
            "contract": Contract(steps=50, grid=Shifted(shift=5.0), guidance=CFG(scale=6.0)),
        },
    ),
    "wan_ti2v": Tiny(
        make=wan_ti2v, size={"num_frames": 5, "height": 64, "width": 96}, encode=wan_encode, causal=True,
        card={
            "num_frames": 121, "height": 704, "width": 1280, "fps": 24,
            "contract": Contract(steps=50, grid=Shifted(shift=3.0), guidance=CFG(scale=5.0)),
        },
        text_arguments={"do_classifier_free_guidance": False, "max_sequence_length": 512},
    ),
    "wan_experts": Tiny(
        make=wan_experts, size={"num_frames": 5, "height": 32, "width": 48}, encode=wan_encode, causal=True,
        card={
            "num_frames": 81, "height": 720, "width": 1280, "fps": 16,
            "contract": Contract(steps=40, grid=Shifted(shift=3.0), guidance=CFG(scale=4.0, low=0.6, outside=3.0)),
        },
        text_arguments={"do_classifier_free_guidance": False, "max_sequence_length": 512},
    ),
}  # fmt: skip


IMAGE = {
    "wan_image": wan_image, "wan_image_experts": wan_image_experts, "wan_ends": wan_ends, "wan_ti2v_image": wan_ti2v_image,
}  # fmt: skip
"""Image-to-video families."""
IMAGE_SIZE = {"num_frames": 5, "height": 32, "width": 64}
COGVIDEOX_IMAGE = {"cogvideox_image": cogvideox_image, "cogvideox15_image": cogvideox15_image}
"""The same of CogVideoX, at the size that learned positions are for."""
COGVIDEOX_IMAGE_SIZE = {"num_frames": 9, "height": 64, "width": 80}


def shared(name: str, seed: int = 0, **config: Any) -> Path:
    """The tiny model `name` (its denoiser with other `config`) in diffusers' layout, made once and read by many tests.

    Nobody may change it, which is checked at the end (`changed`): `save_tiny` gives a copy of one's own.
    """
    key = f"{name}-{seed}-{sorted(config.items())}"
    if key not in SHARED:
        folder = Path(tempfile.mkdtemp(prefix=name, dir=HOME))
        _save(name, folder, seed, config)
        SHARED[key] = folder, digests(folder)
    return SHARED[key][0]


def load_tiny(name: str, runtime: Runtime = Runtime()) -> VideoModel:
    """The shared model `name` at the size of its tests."""
    chosen = Diffusers(source=str(shared(name)), **(TINY[name].size if name in TINY else IMAGE_SIZE))
    return VideoModel.load(chosen.card(), chosen.source, runtime=runtime)


def save_tiny(name: str, folder: Path, seed: int = 0, **config: Any) -> Path:
    """A copy of the shared model in `folder`, to do with as one likes."""
    return shutil.copytree(shared(name, seed, **config), folder, dirs_exist_ok=True)


HOME = Path(tempfile.mkdtemp(prefix="tiny"))
"""Goes with the process that made it, and not with those that were forked from it."""
OWNER = os.getpid()
atexit.register(lambda: shutil.rmtree(HOME, ignore_errors=True) if os.getpid() == OWNER else None)
SHARED: dict[str, tuple[Path, dict[str, str]]] = {}
"""Folder of every shared model, and its files' digests when it was made."""


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changed() -> list[str]:
    """Shared models that are not as they were made."""
    return [key for key, (folder, before) in SHARED.items() if digests(folder) != before]


def _save(name: str, folder: Path, seed: int, config: dict[str, Any]) -> None:
    """No weight of the denoiser is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = (TINY[name].make if name in TINY else (IMAGE | COGVIDEOX_IMAGE)[name])(**config)
        with torch.no_grad():
            for network in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
                for parameter in network.parameters() if network else ():
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    pipeline.save_pretrained(folder)


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    )


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    )


def tokenizer(start: str = "") -> PreTrainedTokenizerFast:
    """Words between spaces, after those of `start`, and the end token of T5."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(
        single=f"{start}$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
    )  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
