"""A video model in one folder: text encoder, denoiser, codec, and a card with its sampling contract.

A folder holds `card.json` and one `<part>.safetensors` per network. Nothing else is read, and nothing is unpickled.
A folder in diffusers' layout (`model_index.json`) is read through `adapters`. A student of such a model has its denoiser in
its own folder and names the source of its text encoder and codec, which it did not change and which are large.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.compress import Transform, transformed
from fewstep.core import Cond, dump
from fewstep.core.atomic import replacing
from fewstep.core.call import Runner, every_block
from fewstep.core.shipped import command_for
from fewstep.core.stamp import stamp_of
from fewstep.core.yaml import load_json
from fewstep.diffusion import Step
from fewstep.diffusion.samplers import finish
from fewstep.models import adapters
from fewstep.models.autoencoder import FrameAutoencoder
from fewstep.models.card import PARTS, Card, parse_card
from fewstep.models.decoding import Decoded
from fewstep.models.denoiser import Denoiser
from fewstep.models.depot import depot_of
from fewstep.models.fingerprint import describe, print_of
from fewstep.models.images import Images, blank_images, image_conditions, image_latents
from fewstep.models.loading import loaded
from fewstep.models.lora import add
from fewstep.models.offload import Blockwise, bring
from fewstep.models.results import result_in
from fewstep.models.runtime import Dtype, Runtime, decoded, require_exact, settled, typed
from fewstep.models.sampling import Request, Texts, sampling, streaming
from fewstep.models.scalars import scalar_conditions, with_blank_inputs
from fewstep.models.served import Served
from fewstep.models.spec import lacking
from fewstep.models.stored import write_tensors
from fewstep.models.text import TextEncoder
from fewstep.streaming import LiveSession, LiveSnapshot

BUILT_IN = Path(__file__).parent.parent / "world" / "weights"
"""Where the built-in world's networks are shipped: one folder each."""

_BUILT_INS = {
    "world": BUILT_IN / "teacher",
    "world/features": BUILT_IN / "features",
    "world/stream": BUILT_IN / "stream",
}
"""Folders by the names they go by, which look like names on the hub and are none."""


class VideoModel:
    """Networks by part, and their card. `model(prompts)` makes clips.

    Parts: `denoiser`, `text`, `codec`, `features`, and `image` of image-to-video models; a folder may hold only some.
    """

    def __init__(self, card: Card, parts: Mapping[str, nn.Module], runtime: Runtime = Runtime()) -> None:
        unknown = sorted(set(parts) - set(PARTS))
        if unknown:
            raise ValueError(f"unknown parts {unknown}; a video model has {', '.join(PARTS)}")
        self.card = card
        self.parts = {name: part.eval() for name, part in parts.items()}
        self.runtime = runtime
        """How the model is run."""
        self.stored: dict[str, Mapping[str, Tensor]] = {}
        """Weights elsewhere, mostly in their files: of parts that have no memory for them, or have them rounded."""
        self.rounded: dict[str, str] = {}
        """Fingerprints of parts that have their weights rounded, and nowhere else."""

    def part(self, name: str) -> nn.Module:
        if name not in self.parts:
            raise ValueError(f"model {self.card.name!r} {lacking(name, self.parts)}; name one in the recipe's model")
        return self.parts[name]

    @property
    def denoiser(self) -> Denoiser:
        return self.part("denoiser")  # type: ignore[return-value]

    @property
    def text(self) -> TextEncoder:
        return self.part("text")  # type: ignore[return-value]

    @property
    def codec(self) -> FrameAutoencoder:
        return self.part("codec")  # type: ignore[return-value]

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """What was done to the denoiser, if there is one."""
        return self.denoiser.backbone.transforms if "denoiser" in self.parts else ()

    def weights(self, name: str) -> Mapping[str, Tensor]:
        """A part's tensors by name; those of a part that is only stored are read one at a time, when asked for."""
        return self.stored[name] if name in self.stored else self.part(name).state_dict()

    def fingerprint(self, name: str) -> str:
        """Fingerprint of a part, wherever its weights are: of those that were loaded, in whatever type they are run."""
        return self.rounded.get(name) or print_of(self.part(name), self.weights(name))

    @property
    def device(self) -> torch.device:
        """Where clips are made. The text encoder may wait elsewhere."""
        if self.runtime.offload != "none":
            return torch.device(self.runtime.device)
        network = self.parts.get("denoiser", next(iter(self.parts.values())))
        depot = depot_of(network)
        return next(network.parameters()).device if depot is None else depot.device

    def to(self, place: str | torch.device | torch.dtype) -> VideoModel:
        """On another device, or in other arithmetic (`Runtime.dtype`); as `prepared`, in place."""
        if isinstance(place, torch.dtype):
            return self.prepared(replace(self.runtime, dtype=str(place).removeprefix("torch.")))  # type: ignore[arg-type]
        for part in self.parts.values():
            part.to(place)
        self.runtime = replace(self.runtime, device=str(place), offload="none")
        return self

    def prepared(self, runtime: Runtime) -> VideoModel:
        """This model, which from now on runs as `runtime` says. ValueError for what cannot be; see also `from_pretrained`.

        Its networks are changed in place: they move, and change their types.
        """
        runtime.require(self)
        if runtime.dtype != self.runtime.dtype and "denoiser" in self.parts:
            if self.runtime.dtype != "float32":
                raise ValueError(
                    f"the weights are {self.runtime.dtype} already; load the model again with this runtime"
                )
            self.retype(runtime.dtype)
        settled(self, runtime)
        self.runtime = runtime
        return self

    def retype(self, dtype: Dtype) -> None:
        """Give the denoiser's tensors the types of `dtype`, in place; its fingerprint stays that of the weights it had."""
        if not any(tensor.is_meta for tensor in self.denoiser.parameters()):  # without values there is none
            self.rounded["denoiser"] = self.fingerprint("denoiser")
        typed(self.denoiser, dtype)

    def with_card(self, **changes: Any) -> VideoModel:
        """The same networks, run alike, with fields of the card exchanged."""
        made = copy.copy(self)
        made.card = replace(self.card, **changes)
        return made

    def bring(self, *names: str) -> None:
        """Put these networks, and with offload no others, on the device."""
        if self.runtime.offload != "none":
            bring(self.parts, names, self.device, whole=self.runtime.offload == "model")

    def runner(self, inner: Runner = every_block) -> Runner:
        """`inner`, and before it what brings blocks to the device, where they wait elsewhere (`Runtime.offload`). For one run."""
        if self.runtime.offload != "block":
            return inner
        return Blockwise(self.denoiser.backbone.blocks, self.device, inner)

    @property
    def reader(self) -> Served:
        """The denoiser as this model runs it."""
        return Served(self)

    def with_part(self, name: str, network: nn.Module, **card: Any) -> VideoModel:
        """The same model with one network (and fields of its card) exchanged; the other networks are shared."""
        known = {part: value for part, value in self.card.fingerprints.items() if part != name}
        elsewhere = {part: source for part, source in self.card.sources.items() if part != name}
        changes = {"fingerprints": known, "sources": elsewhere, **card}
        if isinstance(network, Denoiser):
            changes["transforms"] = network.backbone.transforms
        made = VideoModel(replace(self.card, **changes), {**self.parts, name: network}, self.runtime)
        made.stored = {part: weights for part, weights in self.stored.items() if part != name}
        made.rounded = {part: known for part, known in self.rounded.items() if part != name}
        if self.runtime.compile:
            settled(made, self.runtime)
        return made

    def with_lora(self, source: Path | str) -> VideoModel:
        """The same model with a LoRA merged into its denoiser: a file or folder that diffusers, ComfyUI, kohya or peft reads.
        Or its name on the hub: `owner/name`, or `owner/name/FILE.safetensors` where the repository has several. A model of two
        experts takes a folder with a file for each of them.

        FileNotFoundError or ValueError say why it does not fit.
        """
        updates, network = adapters.read_lora(self.denoiser, str(source)), copy.deepcopy(self.denoiser)
        add(network, updates.layers, updates.whole)
        return self.with_part("denoiser", network, provenance={**self.card.provenance, "lora": str(source)})

    def transformed(self, *transforms: Transform) -> VideoModel:
        """The same model with `transforms` applied to a copy of its denoiser. ValueError where that cannot be."""
        if not transforms:
            return self
        network = copy.deepcopy(self.denoiser)
        network.backbone = transformed(network.backbone, transforms)
        return self.with_part("denoiser", network)

    # --- sampling -----------------------------------------------------------------------------------------------------

    def __call__(self, prompts: Sequence[str] | Cond, **options: Any) -> Tensor:
        """Clips `[B, 3, F, H, W]` in [-1, 1] for `prompts`; `options` are the fields of `Request`."""
        latents = self.latents(prompts, **options)  # without inference mode, which sharded networks do not bear
        with torch.inference_mode():
            return self.decode(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Clips `[B, 3, F, H, W]` in [-1, 1] of latents, whole, in tiles or in chunks (`Runtime.tiling`)."""
        self.bring("codec")
        return decoded(self.codec, latents, self.runtime)

    def stream(self, start: Sequence[str] | LiveSnapshot, **options: Any) -> LiveSession:
        """A live stream of one clip per prompt, or one that goes on after a snapshot, of a model whose contract has a `stream`;
        `options` are those of `sampling.streaming` (`video`, `image`) and of `Session`, such as `seed`."""
        return streaming(self, start, **options)

    @torch.no_grad()
    def decode_next(self, latents: Tensor, past: Any = None, *, last: bool = False) -> Decoded:
        """Frames in [-1, 1] of latents that follow those of `past`: as `ChunkCodec.decode_next`, run as this model is."""
        self.bring("codec")
        with self.runtime.precision():
            made = self.codec.decode_next(latents, past, last=last)
        return replace(made, frames=made.frames.clamp(-1, 1))

    def clip_frames(self, latents: int) -> int:
        """Frames of a clip of so many latent frames."""
        return self.codec.clip_frames(latents) if latents else 0

    def image_latents(self, pictures: Tensor) -> Tensor:
        """Latents `[B, C, 1, h, w]` of pictures `[B, 3, H, W]` in [-1, 1], each the only frame of a clip."""
        return image_latents(self, pictures)

    def latents(self, prompts: Sequence[str] | Cond, **options: Any) -> Tensor:
        """Sample latents `[B, C, F, h, w]` by the card's contract: `sampling`, run to its end."""
        return finish(self.sampling(prompts, **options))

    def sampling(self, prompts: Sequence[str] | Cond, **options: Any) -> Iterator[Step]:
        """Sample by the card's contract, step by step; the latents of the last step are the clips'.

        `options` are the fields of `Request`, such as `scalars={"guidance": 4.0}`.
        Refused at once unless `force`: a step count the model was not trained for
        (StepCountError), another number of frames than its card's, and a guidance scale on a student that has its guidance
        distilled in (ValueError). To stop is to ask for no more steps.
        """
        return sampling(self, Request(prompts=prompts, **options))

    def latent_shape(self, num_frames: int | None = None) -> tuple[int, int, int, int]:
        """`(C, F, h, w)` of this model's clips."""
        frames = self.card.num_frames if num_frames is None else num_frames
        return self.codec.latent_shape(frames, self.card.height, self.card.width)

    def encode_text(
        self, prompts: Sequence[str], *, guided: bool = True, texts: Texts | None = None
    ) -> tuple[Cond, Cond]:
        """Conditions of `prompts`, and the card's negative prompt as many times; if not `guided`, where nobody reads it, the
        conditions a second time. `texts` has them in place of the text encoder."""
        if texts is None and self.runtime.offload != "block":  # there it works on the CPU
            self.bring("text")
        encode = self.text.encode if texts is None else texts
        with torch.no_grad():
            given = encode(prompts).to(self.device)
            if not guided:
                return given, given
            return given, encode([self.card.negative_prompt]).to(self.device).expand(len(prompts))

    def conditions(
        self,
        prompts: Sequence[str],
        image: Images | None = None,
        last_image: Tensor | None = None,
        num_frames: int | None = None,
        *,
        scalars: Mapping[str, float] = MappingProxyType({}),
        guided: bool = True,
        texts: Texts | None = None,
    ) -> tuple[Cond, Cond]:
        """Conditions of `prompts` and of the negative prompt, both with the images where this model makes clips of them, and
        with the `scalars` that it reads (`ScalarInput`). `guided` and `texts` as in `encode_text`. `latents` takes both in place
        of prompts.

        ValueError where an image or scalar is missing or of no use.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts are a list of texts, one for each clip, such as ['a red ball']; got {prompts!r}")
        frames = self.card.num_frames if num_frames is None else num_frames
        self.bring("image", "codec")
        extra = image_conditions(self, len(prompts), image, last_image, frames)
        extra |= scalar_conditions(self, len(prompts), scalars)
        cond, uncond = self.encode_text(prompts, guided=guided, texts=texts)
        return cond.with_extra(extra), uncond.with_extra(extra)

    def blank_cond(self, batch: int, num_frames: int | None = None) -> Cond:
        """Conditions that say nothing, as long and wide as this model's longest; of width 1 without a text encoder."""
        if "text" not in self.parts:
            blank = Cond(torch.zeros(batch, 1, 1), torch.zeros(batch, 1, dtype=torch.bool))
        else:
            blank = self.text.blank(batch).with_extra(blank_images(self, batch, num_frames or self.card.num_frames))
        return with_blank_inputs(self, blank, num_frames)

    # --- folders ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write the card and every part; floating-point tensors are stored as `dtype` and load as float32.

        A text encoder or codec that came from a source of its own (`card.sources`) is named, not copied. ValueError for a
        model that runs with rounded weights.
        """
        require_exact(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        elsewhere = {name: source for name, source in self.card.sources.items() if name != "denoiser"}
        card = replace(self.card, parts={name: describe(part) for name, part in self.parts.items()}, sources=elsewhere)
        prints, files = {}, {}
        for name, part in self.parts.items():
            if name in elsewhere:
                prints[name] = self.card.fingerprints.get(name) or self.fingerprint(name)
                continue
            own, tensors = part.state_dict(), self.weights(name)
            like = {k: v.to("meta", dtype if v.is_floating_point() else v.dtype) for k, v in own.items()}
            prints[name] = print_of(part, tensors, {key: empty.dtype for key, empty in like.items()})
            with replacing(folder / f"{name}.safetensors") as draft:
                write_tensors(draft, like, tensors.__getitem__)
            files[name] = stamp_of(folder / f"{name}.safetensors")
        card = replace(card, fingerprints=prints, files=files, transforms=self.transforms)
        (folder / "card.json").write_text(json.dumps(dump(card), indent=2) + "\n")
        return folder

    def export(
        self,
        folder: Path | str,
        *,
        names: Literal["diffusers", "comfyui"] = "diffusers",
        link: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        recipe: str = "",
        engine: Literal["vllm-omni", "sglang", "lightx2v"] | None = None,
    ) -> Path:
        """Write a folder in diffusers' layout that makes the same clips without this package; `from_pretrained` reads it.

        What was not trained is copied from its source (`link`: linked). ValueError where diffusers (`engine`) would do otherwise.
        With `comfyui` the denoiser alone, in one file, by its authors' names. The denoiser is stored as `dtype`: in half the
        memory its clips differ by rounding. `recipe` is the text of it, for the page. With `engine`, what that engine serves.
        """
        require_exact(self)
        return adapters.export_model(
            self, Path(folder), names=names, link=link, dtype=dtype, recipe=recipe, engine=engine
        )

    @classmethod
    def from_pretrained(
        cls, source: Path | str, *, leave: Collection[str] = (), trust: bool = False, runtime: Runtime = Runtime()
    ) -> VideoModel:
        """Load a folder, a model in diffusers' layout (a folder or its hub name), or a built-in: `world` (the teacher),
        `world/stream` (a student that streams), `world/features`.

        Networks come in eval mode. The weights of parts to `leave` stay in their files: `weights` reads them when wanted.
        Files that fewstep wrote are compared with what their card says of them when they are read, unless you `trust` them.
        Tensors are read one by one, each into the type that `runtime` keeps it in.
        """
        return cls.load(read_card(source), source, leave=leave, trust=trust, runtime=runtime)

    @classmethod
    def load(
        cls, card: Card, source: Path | str, *, leave: Collection[str] = (), trust: bool = False,
        runtime: Runtime = Runtime(),
    ) -> VideoModel:  # fmt: skip
        """As `from_pretrained`, by a card that may say more than the source does (another size, another pattern)."""
        folder = folder_of(source) if card.parts.keys() - card.sources.keys() else Path()
        return loaded(cls(card, {}), folder, leave=leave, trust=trust, runtime=runtime)


def read_card(source: Path | str) -> Card:
    """The card of a folder, without its weights. FileNotFoundError or RecipeError say what is wrong with it.

    A card may name classes outside this package only from modules that the caller has imported: reading it runs no code.
    """
    if str(source) not in _BUILT_INS and adapters.is_layout(source):
        return adapters.card(source)
    path = folder_of(source) / "card.json"
    return parse_card(load_json(path, "a card"), str(path))


def folder_of(source: Path | str) -> Path:
    """Where the files of a fewstep model are. FileNotFoundError for a folder without a card; it says how to make one."""
    folder = _BUILT_INS.get(str(source), Path(source))
    if not (folder / "card.json").is_file():
        made, command = result_in(folder.parent) or result_in(folder), command_for(folder)
        hint = f"Give {made}. " if made else f"Make it first: {command}. " if command else ""
        raise FileNotFoundError(
            f"{source}: no card.json there. {hint}A model is a folder that fewstep wrote (such as a run's student/), a folder "
            f"in diffusers' layout (with model_index.json), a hub name (owner/name), or a built-in: {', '.join(_BUILT_INS)}."
        )
    return folder
