"""Wan (2503.20314), text-to-video and image-to-video, over diffusers' WanTransformer3DModel.

Legend: as in `backbone.py`; p, q rows and columns of a patch, P values per patch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from fewstep.attention import Dense, Grid3, Pattern
from fewstep.core import Call, Cond, RecipeError
from fewstep.diffusion import CFG, Contract, Shifted
from fewstep.models.adapters.conditions.wan_image import Reads
from fewstep.models.adapters.dits.wan_begun import Begun, begun, ended
from fewstep.models.adapters.dits.wan_block import WanBlock
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.network import DiffusersBackbone
from fewstep.models.adapters.presets.wan import FACTS, SMALL, kind_of
from fewstep.models.backbone import Avoided, Context, Tokens
from fewstep.models.card import Card
from fewstep.models.experts import Experts
from fewstep.models.rotary import FrameRotary
from fewstep.models.spec import Spec
from fewstep.models.video_dit import modulate, time_groups

_TIMESTEPS = 1000
_ROTARY_BASE = 10000.0
_TEXT_LENGTH = 512
_AUTHORS = MappingProxyType(
    {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0", "attn1": "self_attn", "to_q": "q",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2", "attn2": "cross_attn", "to_k": "k",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0", "ffn.net.0.proj": "ffn.0", "to_v": "v",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2", "ffn.net.2": "ffn.2", "to_out.0": "o",
        "condition_embedder.time_proj": "time_projection.1", "scale_shift_table": "modulation", "norm2": "norm3",
        "proj_out": "head.head", "condition_embedder.image_embedder.norm1": "img_emb.proj.0", "add_k_proj": "k_img",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1", "add_v_proj": "v_img",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3", "norm_added_k": "norm_k_img",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    }
)  # fmt: skip
"""Parts of diffusers' names, and what Wan's authors call them; what is not here has one name."""
_PART = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, _AUTHORS))})(?![^.])")


def card(layout: Layout) -> Card:
    """Wan at its authors' size and with their negative prompt, sampled as diffusers does: the layout's shift, guidance 5, 50
    steps of text-to-video at 480p. The preset `authors` has the rest."""
    scheduler, transformer = layout.scheduler(), layout.config("transformer")
    text = {"config": layout.config("text_encoder"), "length": _TEXT_LENGTH, "plain": False, "dtype": "bfloat16"}
    patch = transformer["patch_size"][1]
    codec = {"config": layout.config("vae"), "kind": "AutoencoderKLWan", "patch": patch, "tiling": False}
    boundary, reads = layout.index.get("boundary_ratio"), _of_images(layout, transformer)
    if boundary is not None:
        denoiser = _experts(layout, boundary)
        early, late = (4.0, 3.0) if reads is None else (3.5, 3.5)
        steps, guidance = 40, CFG(scale=early, low=boundary, outside=late)
    else:
        network = {"config": transformer, "pattern": Dense().tree(), "first_frame": reads == "frame"}
        denoiser = Spec("Wan", network)
        steps, guidance = 40 if reads == "image" else 50, CFG(scale=5.0)
    published = FACTS[kind := kind_of(layout, reads)]
    parts = {"denoiser": denoiser, "text": Spec("T5Text", text), "codec": Spec("VideoCodec", codec)}
    if reads is not None:
        config = layout.config("image_encoder") if transformer.get("image_dim") else None
        parts["image"] = Spec("WanImage", {"config": config, "reads": reads, "dtype": "float32"})
    return Card(
        name=Path(layout.source).name,
        parts=parts,
        sources=dict.fromkeys(parts, layout.source),
        contract=Contract(
            grid=Shifted(shift=float(scheduler.get("flow_shift", scheduler.get("shift", 1.0)))),
            steps=steps,
            guidance=guidance,
        ),
        negative_prompt=published.negative,
        provenance={"source": layout.source, "licence": "Apache-2.0"},
        **(
            SMALL if kind == "T2V-14B" else published.size
        ),  # diffusers' example size; the layout's shift is that of 480p
    )


def _of_images(layout: Layout, transformer: Mapping[str, Any]) -> Reads | None:
    """How its pipeline reads images; None for a text-to-video model."""
    if transformer["in_channels"] != transformer["out_channels"]:
        return "image" if transformer.get("pos_embed_seq_len") is None else "ends"
    if layout.index["_class_name"] == "WanPipeline":
        return None
    if not layout.index.get("expand_timesteps"):
        raise RecipeError(
            f"{layout.source} has no channels for an image, and no expand_timesteps in its model_index.json"
        )
    return "frame"


def _experts(layout: Layout, boundary: float) -> Spec:
    config = layout.config("transformer")
    if layout.config("transformer_2") != config:
        raise RecipeError(
            f"{layout.source}: the experts transformer and transformer_2 differ in more than their weights"
        )
    return Spec("WanExperts", {"config": config, "boundaries": [boundary], "pattern": Dense().tree()})


class Wan(DiffusersBackbone):
    """The modules and weight names are diffusers' own; `config` is its constructor's arguments.

    Every frame may have its own time, and with `pattern` and a cache view it is a causal model. A network with more input
    than output channels is an image-to-video network: it reads `image_latents` and, if it can, `image_states` of `Cond.extra`.

    With `first_frame` (Wan 2.2 TI2V with an image) `image_latents` are the clip's first latent frame. It is read clean, at
    time 0, whatever is in its place, and the prediction's x0 there is the image itself: no sampler changes it, and no loss
    has a gradient there.
    """

    network = WanTransformer3DModel
    shares = True
    text_first = True
    unmixes = True
    takes_scalars = True
    takes_signals = True

    def __init__(self, *, config: dict[str, Any], pattern: Pattern = Dense(), first_frame: bool = False) -> None:
        super().__init__()
        self.args = {"config": config, "pattern": pattern.tree(), "first_frame": first_frame}
        self.pattern, self.first_frame = pattern, first_frame
        self._hold(self.network.from_config(config))

    def _hold(self, network: WanTransformer3DModel) -> None:
        config = network.config
        if config.patch_size[0] != 1:
            raise ValueError(f"Wan is read with patches of one frame; this network has {list(config.patch_size)}")
        self.heads, self.head_width = config.num_attention_heads, config.attention_head_dim
        self.width, self.patch = self.heads * self.head_width, tuple(config.patch_size[1:])
        self.rotary = FrameRotary(self.head_width, _ROTARY_BASE, longest=config.rope_max_seq_len)
        self.channels = config.out_channels
        self.patch_embedding, self.condition_embedder = network.patch_embedding, network.condition_embedder
        self.blocks = nn.ModuleList(
            WanBlock(block, self.pattern.operation(layer, self.heads, self.head_width))
            for layer, block in enumerate(network.blocks)
        )
        self.norm_out, self.proj_out = network.norm_out, network.proj_out
        self.scale_shift_table = network.scale_shift_table
        self.by_age = self.first_frame or self._reads_image

    def embed(self, x: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Tokens:
        grid, start = self.grid(x), 0 if call.kv is None else int(call.kv.number.max())
        known = None
        if call.kv is None and self.first_frame:
            self._require_whole(x.shape[2] > 1, x)
        elif call.kv is None and self._reads_image:
            self._require_whole(x.shape[2] == self._of_image(cond, "image_latents").shape[2], x)
        if self.first_frame and not start:
            x, t, known = begun(x, t, self._of_image(cond, "image_latents"))
        embedder = self.condition_embedder
        with torch.autocast(x.device.type, enabled=False):
            x_BNE = self.patch_embedding(self._beside_image(x, cond, start)).flatten(2).transpose(1, 2)
            time_BG = time_groups(t, x)
            waves = embedder.timesteps_proj(_TIMESTEPS * time_BG.flatten()).to(x.dtype)
            time_BGE = self.with_scalars(embedder.time_embedder(waves).unflatten(0, time_BG.shape), cond)
            modulation = embedder.time_proj(F.silu(time_BGE)).unflatten(-1, (6, self.width))
            modulation = self.with_signals(modulation, cond, grid.frames)
            text = call.constant("words", lambda: embedder.text_embedder(cond.text.to(x.dtype)))
            image = call.constant("image", lambda: self._image(cond, x.dtype))
            avoided = Avoided.of(call, lambda negative: embedder.text_embedder(negative.text.to(x.dtype)), masked=False)
        context = Context(
            modulation_BG6E=modulation,
            text_BLE=text,
            text_mask_B11L=None,  # Wan was trained to read the zeros after a prompt
            rotary=self.rotary,
            table=self.turns(grid, x, call),
            site=self.site(self.pattern, grid, call, x.device),
            image_BKE=image,
            avoided=avoided,
        )
        return Begun(x_BNE, time_BGE, grid, context, known)

    def head(self, state: Begun) -> Tensor:
        with torch.autocast(state.x_BNE.device.type, enabled=False):
            shift, scale = (self.scale_shift_table + state.time_BGE[:, :, None]).unbind(2)
            tokens_BNP = self.proj_out(modulate(self.norm_out(state.x_BNE), shift, scale))
        x = tokens_BNP.unflatten(2, (*self.patch, -1)).unflatten(1, state.grid)  # B F h w p q C
        return ended(x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4), state.known_BC1HW)

    def by_time(self, boundaries: Sequence[float]) -> Experts[Wan]:
        return Experts([self, *(copy.deepcopy(self) for _ in boundaries)], boundaries)

    def by_original(self, network: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        known, states = None, cond.extra.get("image_states")
        if self.first_frame:
            x, t, known = begun(x, t, self._of_image(cond, "image_latents"))
            t = t.repeat_interleave(self.grid(x).per_frame, 1)  # diffusers wants a time per token
        states = None if states is None else self._seen(states)
        x = self._beside_image(x, cond, 0)
        made: Tensor = network(x, _TIMESTEPS * t, cond.text.to(x.dtype), states, return_dict=False)[0]
        return ended(made, known)

    def _beside_image(self, x: Tensor, cond: Cond, start: int) -> Tensor:
        """The latents, and in further channels those of the image, of the frames from `start` on."""
        if not self._reads_image:
            return x
        image = self._of_image(cond, "image_latents")[:, :, start : start + x.shape[2]]
        return torch.cat([x, image.to(x)], 1)

    @property
    def _reads_image(self) -> bool:
        """Whether it reads the latents of the image beside those of the clip."""
        return bool(self.patch_embedding.in_channels != self.channels)

    def _image(self, cond: Cond, dtype: torch.dtype) -> Tensor | None:
        """The image as blocks read it, beside the text."""
        seen = self.condition_embedder.image_embedder
        return None if seen is None else seen(self._seen(self._of_image(cond, "image_states")).to(dtype))

    def _seen(self, states_BKD: Tensor) -> Tensor:
        """As the embedder takes them: those of two images one after the other in the batch."""
        two = self.condition_embedder.image_embedder.pos_embed is not None
        return states_BKD.unflatten(1, (2, -1)).flatten(0, 1) if two else states_BKD

    @staticmethod
    def authors(name: str) -> str:
        """What Wan's authors, and ComfyUI, call the parameter or module `name`."""
        head = "head." if name == "scale_shift_table" else ""
        return head + _PART.sub(lambda part: _AUTHORS[part[0]], name)

    def grid(self, x: Tensor) -> Grid3:
        _, channels, frames, height, width = x.shape
        rows, columns = self.patch
        if channels != self.channels or height % rows or width % columns:
            raise ValueError(
                f"latents [B, C, F, H, W] need C = {self.channels}, H a multiple of {rows} and W of "
                f"{columns}, got {tuple(x.shape)}"
            )
        return Grid3(frames, height // rows, width // columns)
