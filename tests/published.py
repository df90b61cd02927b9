"""Folders in diffusers' layout of published models at their full size: configurations alone, without weights or tokenizer.

Enough for cards and plans. Sources: the `config.json` files of Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Wan2.1-T2V-14B-Diffusers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

UMT5_XXL: dict[str, Any] = {
    "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "vocab_size": 256384, "feed_forward_proj": "gated-gelu", "is_gated_act": True,
    "dense_act_fn": "gelu_new", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip
WAN_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0, "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}  # fmt: skip
_WAN: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6, "rope_max_seq_len": 1024, "image_dim": None, "added_kv_proj_dim": None,
}  # fmt: skip
WAN_13B = {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}


def wan(folder: Path, transformer: dict[str, Any]) -> Path:
    """A folder of Wan 2.1 text to video."""
    parts = {
        "model_index.json": {
            "_class_name": "WanPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"], "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "prediction_type": "flow_prediction",
            "use_flow_sigmas": True, "num_train_timesteps": 1000,
        },
        "transformer/config.json": transformer, "text_encoder/config.json": UMT5_XXL, "vae/config.json": WAN_VAE,
    }  # fmt: skip
    for name, content in parts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


SD15: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # fmt: skip
"""`unet/config.json` of stable-diffusion-v1-5, where it differs from diffusers' default."""
MOTION: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280), "motion_layers_per_block": 2, "motion_num_attention_heads": 8,
    "motion_norm_num_groups": 32, "motion_max_seq_length": 32, "use_motion_mid_block": False,
}  # fmt: skip
"""`config.json` of guoyww/animatediff-motion-adapter-v1-5-3."""
