"""Memory that sampling takes, before anything is loaded: weights by network, and what each phase needs besides.

The networks' own code runs once with tensors that have no values, and every tensor is counted for as long as it lives. So a
new model needs no second description. All sizes are bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, TypedDict, Unpack, cast, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.attention import NAG, KVCache
from fewstep.core import Call, Rng
from fewstep.core.call import Constants, Negative
from fewstep.core.ledger import Ledger
from fewstep.diffusion.guidance import Calls
from fewstep.models import adapters
from fewstep.models.bundle import folder_of
from fewstep.models.card import Card
from fewstep.models.hollow import imagine
from fewstep.models.runtime import Dtype, Offload, Runtime, decoded, tile, typed
from fewstep.models.source import outline
from fewstep.models.stored import Stored

READING, DENOISING, DECODING = "reading the prompt", "denoising", "decoding"
_WORKERS = {READING: "text", DENOISING: "denoiser", DECODING: "codec"}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What clips made at once need."""

    weights: Mapping[str, int]
    """Of each network, in the types in which it is run."""
    ends: int
    """Of the denoiser without its blocks."""
    block: int
    """Of its largest block."""
    alone: int = 0
    """Of a text encoder that is loaded, and works, before the other networks are loaded."""
    working: Mapping[str, int]
    """Tensors of each phase beside the weights, at their most. The text encoder's own are left out: they are small."""

    def resident(self, phase: str, offload: Offload) -> int:
        """Weights on the device during a phase."""
        if phase == READING and "text" not in self.weights:
            return 0 if offload == "block" else self.alone
        if offload == "none":
            return sum(self.weights.values())
        if offload == "block" and phase != DECODING:  # the text encoder works on the CPU
            return self.ends + 2 * self.block if phase == DENOISING else 0  # one block runs, the next is on its way
        return self.weights.get(_WORKERS[phase], 0)

    def total(self, phase: str, offload: Offload) -> int:
        return self.resident(phase, offload) + self.working[phase]

    def peak(self, offload: Offload) -> int:
        """At the phase that needs most."""
        return max(self.total(phase, offload) for phase in self.working)


@dataclass(frozen=True)
class Way:
    """A runtime, and what sampling needs with it at its peak."""

    runtime: Runtime
    needs: Needs

    @property
    def peak(self) -> int:
        return self.needs.peak(self.runtime.offload)


Encoder = Literal["beside", "alone", "absent"]
"""Where a text encoder is: beside the other networks, loaded before them and then no more (alone), or not loaded, because the
text states are stored (absent)."""


class Plan(TypedDict, total=False):
    """What a plan may know besides card and runtime."""

    clips: int
    num_frames: int | None
    nag: NAG | None
    encoder: Encoder


def needs(
    card: Card,
    runtime: Runtime,
    *,
    clips: int = 1,
    num_frames: int | None = None,
    nag: NAG | None = None,
    encoder: Encoder = "beside",
) -> Needs:
    """What a model of this card needs to make `clips` at once. ValueError for sizes that it cannot make."""
    mode, model = FakeTensorMode(allow_non_fake_inputs=True), outline(card)
    typed(model.denoiser, runtime.dtype)
    for part in model.parts.values():
        imagine(part, mode)
    blocks = model.denoiser.backbone.blocks
    weights = {name: _size(part.state_dict().values()) for name, part in model.parts.items() if name != "features"}
    alone = weights.pop("text", 0) if encoder != "beside" else 0
    each = [_size(block.state_dict().values()) for block in blocks]
    codec = cast(Any, model.parts.get("codec"))
    tile(codec, runtime)
    guidance, wide = card.contract.guidance, torch.float64 if runtime.dtype == "float64" else torch.float32
    here = replace(runtime, device="cpu", offload="none")  # where tensors without values are
    with torch.no_grad(), mode:
        start = torch.empty(clips, *model.latent_shape(num_frames), dtype=wide)
        with Ledger(model.parts) as reading:
            cond = model.blank_cond(clips, num_frames)
            reading.note(start)
            for tensor in cond.tensors:
                reading.note(tensor)
            uncond = model.blank_cond(clips, num_frames) if guidance.active or nag is not None else cond
        with Ledger(model.parts) as denoising, here.denoising():
            for tensor in (start, *cond.tensors, *uncond.tensors):
                denoising.note(tensor)
            constants = None if runtime.offload == "block" else Constants()
            negative = None if nag is None else Negative(uncond, nag)
            call = Call(constants=constants, negative=negative, rng=Rng(0))
            for _ in range(2):  # the second step finds what a run keeps
                calls = runtime.guidance_calls
                x = guidance(model.denoiser, start, torch.ones(clips), cond, uncond, call, calls=calls).x0
        with Ledger(model.parts) as decoding:
            decoding.note(x)
            if codec is not None:
                decoded(codec, x.float(), here)
    return Needs(
        weights=weights, ends=weights["denoiser"] - sum(each), block=max(each), alone=alone if encoder == "alone" else 0,
        working={READING: reading.peak, DENOISING: denoising.peak, DECODING: decoding.peak},
    )  # fmt: skip


def remembered(card: Card, runtime: Runtime) -> int:
    """Bytes of keys and values, in all blocks, that a stream of this card remembers of one latent frame of a clip."""
    mode, model = FakeTensorMode(allow_non_fake_inputs=True), outline(card)
    network = model.denoiser
    typed(network, runtime.dtype)
    imagine(network, mode)
    here = replace(runtime, device="cpu", offload="none")
    with torch.no_grad(), mode, here.denoising():
        channels, _, height, width = model.latent_shape()
        x = torch.empty(1, channels, 1, height, width, dtype=torch.float64 if runtime.dtype == "float64" else None)
        memory = KVCache(start=torch.tensor(0))  # a number that this mode knows the value of
        call = Call(kv=network.recall(memory, x))
        found = network(x, torch.ones(1), model.blank_cond(1), call).kv or ()
    stream = card.contract.stream
    levels = card.contract.steps if stream is not None and stream.commit == "levels" else 1
    return sum(map(_size, found)) * levels * (2 if card.contract.guidance.active else 1)


def placements(card: Card, runtime: Runtime) -> list[tuple[Offload, Calls]]:
    """What may wait in the memory of the CPU, and the calls of a step with guidance: those of `runtime`, and then others that
    need less memory of the device. Two calls cost less time than blocks that come one by one, and more than networks that do.
    """
    every: list[tuple[Offload, Calls]] = [("none", "one"), ("model", "one"), ("none", "two"), ("model", "two")]
    every += [] if runtime.compile else [("block", "one"), ("block", "two")]
    elsewhere, guided = torch.device(runtime.device).type != "cpu", card.contract.guidance.active
    offloads = get_args(Offload)[get_args(Offload).index(runtime.offload) :] if elsewhere else ("none",)
    calls = ("one", "two") if guided and runtime.guidance_calls == "one" else (runtime.guidance_calls,)
    return [(offload, count) for offload, count in every if offload in offloads and count in calls]


def ways(card: Card, runtime: Runtime, **plan: Unpack[Plan]) -> Iterator[Way]:
    """`runtime`, and then others that need less memory of the device, the simplest first. They are measured one by one, when
    they are asked for."""
    codec = outline(card).parts.get("codec")
    tilings = [runtime.tiling, *(["tiles"] if hasattr(codec, "tile") else []), "chunks"]
    dtypes = dict.fromkeys((runtime.dtype, "bfloat16"))
    known: dict[tuple[str, ...], Needs] = {}
    for dtype, tiling, (offload, calls) in product(dtypes, dict.fromkeys(tilings), placements(card, runtime)):
        chosen = replace(runtime, dtype=dtype, tiling=tiling, offload=offload, guidance_calls=calls)  # type: ignore[arg-type]
        if (dtype, tiling, calls) not in known:
            known[dtype, tiling, calls] = needs(card, chosen, **plan)
        yield Way(chosen, known[dtype, tiling, calls])


def stored_dtype(card: Card, source: str) -> Dtype:
    """bfloat16 if that is how the denoiser's matrices are stored, else float32. Errors as of reading the weights."""
    part = outline(card).denoiser
    if "denoiser" in card.sources:
        weights = adapters.stored(part, card.sources["denoiser"])
    else:
        weights = Stored([folder_of(source) / "denoiser.safetensors"], part.state_dict())
    kinds = Counter(piece.get_dtype() for _, piece in weights.slices()) if weights is not None else Counter()
    return "bfloat16" if kinds and kinds.most_common(1)[0][0] == "BF16" else "float32"


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
