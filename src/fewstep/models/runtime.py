"""How to run a model: number type, device, compilation, offload, tiling, attention. Never part of what a model is.

One object for sampling, evaluation and serving. `VideoModel.from_pretrained(source, runtime=Runtime(...))` loads a model so;
what is requested takes effect or is refused, and `effective` says what is in effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_type_hints

import torch
from torch import Tensor, nn

from fewstep.attention import Operation, Tier, attending, pick, require_tier
from fewstep.core.compiling import compile_problem
from fewstep.core.devices import emulated, require_device, require_device_name
from fewstep.diffusion.guidance import Calls
from fewstep.models.decoding import decode_stream
from fewstep.models.offload import pin

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel
    from fewstep.models.denoiser import Denoiser

Dtype = Literal["float32", "bfloat16", "float64"]
Tiling = Literal["auto", "whole", "tiles", "chunks"]
Offload = Literal["none", "model", "block"]

_NETWORKS: dict[Offload, str] = {
    "none": "all on the device",
    "model": "one at a time on the device",
    "block": "one at a time on the device, the denoiser block by block; the text encoder on the CPU",
}
_GUIDANCE: dict[Calls, str] = {"one": "one call", "two": "two calls"}
_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a model is run. The default is what a model does by itself, on the CPU."""

    dtype: Dtype = "float32"
    """Arithmetic of the denoiser. bfloat16: the matrices of its blocks are kept as bfloat16 (half the memory) and multiplied
    so; embeddings, norms and latents stay float32. float64: the denoiser as a whole, to tell rounding from mistakes."""
    device: str = "cpu"
    compile: bool = False
    """Compile the denoiser's blocks with `torch.compile`: minutes at the first call, faster after."""
    offload: Offload = "none"
    """What waits in the memory of the CPU. model: every network but the one that works (text encoder, then denoiser, then
    codec). block: also the blocks of the denoiser, which come to the device one after the other, the next while one runs; the
    text encoder works on the CPU."""
    guidance_calls: Calls = "one"
    """Calls of the denoiser for one step with guidance. one: prompt and negative prompt as one batch, the fastest. two: one after
    the other, the same clips up to rounding in half the memory of tensors."""
    tiling: Tiling = "auto"
    """How clips are decoded. auto: as the codec's card says. whole: at once. tiles: large frames in overlapping tiles, which
    are nearly the whole. chunks: a latent frame at a time, which gives the frames of the whole."""
    attention: Tier = "auto"
    """Kernel of the denoiser's attention."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            known, value = get_args(hints[field.name]), getattr(self, field.name)
            if known and value not in known:
                raise ValueError(f"{field.name} {value!r} is unknown; choose one of {', '.join(known)}")
        require_device_name(self.device, "device")
        if self.offload != "none" and torch.device(self.device).type == "cpu":
            raise ValueError("offload keeps idle networks on the CPU, and device is cpu already; leave offload out")
        if self.compile and self.attention == "reference":
            raise ValueError("compiled blocks cannot compute the reference of attention; leave compile out")
        if self.compile and self.offload == "block":
            raise ValueError(
                "compiled blocks cannot come to the device one by one; leave compile out, or offload model"
            )

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The arithmetic of whatever network runs inside; one that insists on float32 has it.

        No copy of a weight is kept for the next call: matrices have their type already.
        """
        if self.dtype != "bfloat16":
            yield
            return
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, cache_enabled=False):
            yield

    @contextmanager
    def denoising(self) -> Iterator[None]:
        """Arithmetic and attention of a call of the denoiser."""
        with self.precision(), attending(self.attention):
            yield

    def require(self, model: VideoModel) -> None:
        """ValueError for what this machine, or one of the model's networks, cannot do; it says what to do."""
        denoiser, codec = model.parts.get("denoiser"), model.parts.get("codec")
        require_device(self.device, "device")
        require_tier(self.attention, self.device, torch.bfloat16 if self.dtype == "bfloat16" else torch.float32)
        if self.compile and (problem := compile_problem(self.device)):
            raise ValueError(f"compile: {problem}. Leave compile out")
        if self.tiling == "tiles" and codec is not None and not hasattr(codec, "tile"):
            raise ValueError(f"tiling: {type(codec).__name__} decodes frame by frame and has no tiles; choose chunks")
        ours = denoiser is None or any(isinstance(module, Operation) for module in denoiser.modules())
        if self.attention == "reference" and not ours:
            raise ValueError(
                f"attention: the layers of {model.card.name!r} are those of its library, which have no reference; choose "
                "auto or sdpa-math"
            )


def typed(denoiser: Denoiser, dtype: Dtype) -> None:
    """Give a denoiser's tensors the types they are run in, in place; of the meta device or with memory."""
    if dtype == "float64":
        denoiser.double()
    elif dtype == "bfloat16":
        denoiser.rounded = True
        for module in matrices(denoiser):
            module.to(torch.bfloat16)


def matrices(denoiser: Denoiser) -> list[nn.Module]:
    """The layers that autocast casts in every call, and no others."""
    return [module for module in denoiser.backbone.blocks.modules() if isinstance(module, _MATRICES)]


def require_exact(model: VideoModel) -> None:
    """ValueError where the weights in memory are not those of the model's folder."""
    if model.runtime.dtype == "bfloat16":
        raise ValueError(
            "this model runs in bfloat16, so its weights are rounded; load it without a runtime to save it"
        )


def tile(codec: Any, runtime: Runtime) -> None:
    """Make a codec that has tiles decode in them, or whole, as `runtime` or its card says."""
    if hasattr(codec, "tile"):
        own = bool(codec.args["tiling"]) and (runtime.tiling == "auto" or codec.chunks_in_tiles)
        codec.tile({"tiles": True, "whole": False}.get(runtime.tiling, own))


def settled(model: VideoModel, runtime: Runtime) -> None:
    """Make a model run as `runtime` says: its tensors have their types already."""
    denoiser, codec = cast("Denoiser | None", model.parts.get("denoiser")), cast(Any, model.parts.get("codec"))
    for part in model.parts.values():
        if not any(tensor.is_meta for tensor in part.parameters()):  # left in its file
            part.to(runtime.device if runtime.offload == "none" else "cpu")
    if denoiser is not None and runtime.offload == "block" and torch.device(runtime.device).type == "cuda":
        pin(denoiser)
    tile(codec, runtime)
    if denoiser is not None and runtime.compile and not _compiled(denoiser):
        denoiser.backbone.compile_blocks()
    elif denoiser is not None and model.runtime.compile and not runtime.compile:
        for block in denoiser.backbone.blocks:
            block._compiled_call_impl = None


def decoded(codec: Any, latents: Tensor, runtime: Runtime) -> Tensor:
    """Frames `[B, 3, F, H, W]` in [-1, 1]."""
    with runtime.precision():
        if runtime.tiling != "chunks":
            frames = codec.decode(latents)
        else:
            frames = torch.cat(list(decode_stream(codec, latents.split(1, 2))), 2)
    clamped: Tensor = frames.clamp(-1, 1)
    return clamped


def decodes_in_chunks(model: VideoModel) -> bool:
    """Whether `decode_next`, a latent frame at a time, gives the frames of `decode`."""
    return model.runtime.tiling == "chunks" or bool(getattr(model.codec, "whole_in_chunks", False))


def effective(model: VideoModel) -> dict[str, str]:
    """What is in effect when `model` samples, by name: looked at where looking is cheap."""
    runtime, facts = model.runtime, dict[str, str]()
    device, denoiser = torch.device(runtime.device), model.parts.get("denoiser")
    half = runtime.dtype == "bfloat16"
    facts["device"] = str(model.device)
    facts["weights"] = "; ".join(f"{name} {types}" for name, types in types_of(model.parts).items())
    facts["arithmetic"] = runtime.dtype + emulated(runtime.dtype, device.type)
    facts["blocks"] = "compiled" if denoiser is not None and _compiled(denoiser) else "not compiled"
    chosen = pick(device.type, torch.bfloat16 if half else torch.float32).name
    facts["attention"] = f"auto ({chosen})" if runtime.attention == "auto" else runtime.attention
    facts["networks"] = _NETWORKS[runtime.offload]
    if runtime.guidance_calls == "two" or model.card.contract.guidance.active:
        facts["guidance"] = f"prompt and negative prompt in {_GUIDANCE[runtime.guidance_calls]}"
    facts["decoding"] = _decoding(model)
    return facts


def told(facts: Mapping[str, str]) -> str:
    """`effective` in one line, for people."""
    return ", ".join(f"{name}: {fact}" for name, fact in facts.items())


def types_of(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """The types of each network's own weights; one that has none of its own is left out."""
    types = {role: {str(p.dtype).removeprefix("torch.") for p in net.parameters()} for role, net in networks.items()}
    return {role: ", ".join(sorted(found)) for role, found in types.items() if found}


def _decoding(model: VideoModel) -> str:
    if model.runtime.tiling == "chunks":
        return "chunks"
    vae = getattr(model.parts.get("codec"), "vae", None)
    return "tiles" if getattr(vae, "use_tiling", False) else "whole"


def _compiled(denoiser: nn.Module) -> bool:
    return any(block._compiled_call_impl is not None for block in denoiser.backbone.blocks)  # type: ignore[union-attr]
