"""Where a run's model comes from: a folder of weights, a diffusers model, or new networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from fewstep.attention import Pattern
from fewstep.compress import Transform, transformed
from fewstep.core import RecipeError
from fewstep.core.bounds import FrameRate, Size
from fewstep.diffusion import Contract, Kind, NoisePath, RectifiedFlow
from fewstep.models import adapters
from fewstep.models.bundle import VideoModel, read_card
from fewstep.models.card import PARTS, Card, allocate, latent_shape_of
from fewstep.models.spec import Spec

MADE_NEW = "made new"
"""What stands for the fingerprint of a network that has no weights yet: nothing was made by it."""


@dataclass(frozen=True, kw_only=True)
class ModelSource(ABC):
    """A model before it is loaded: `card` reads no weight, `load` does."""

    @abstractmethod
    def card(self) -> Card:
        """What the model will be. FileNotFoundError or RecipeError where it cannot be had."""

    @abstractmethod
    def load(self, leave: Collection[str] = (), parts: Collection[str] = PARTS) -> VideoModel:
        """The model, with weights, on the CPU; those of parts to `leave` may stay where they are stored.

        Of its parts only those that are among `parts` are read, and are there.
        """


@dataclass(frozen=True, kw_only=True)
class Pretrained(ModelSource):
    """A model that has been trained: what distillation starts from."""

    source: str = "world"
    """Model folder (such as a run's `student/`), or `world`, the teacher in the package."""
    lora: str | None = None
    """LoRA to merge into the teacher: a file or folder, or a hub name (owner/name, owner/name/FILE.safetensors). The student then
    learns its style. null: none."""
    transforms: tuple[Transform, ...] = ()
    """Transforms applied to the denoiser, after those of its card and after the LoRA. They change teacher and student."""

    def card(self) -> Card:
        return _changed(_restyled(read_card(self.source), self.lora), self.transforms)

    def load(self, leave: Collection[str] = (), parts: Collection[str] = PARTS) -> VideoModel:
        return _load(_only(read_card(self.source), parts), self, leave)


@dataclass(frozen=True, kw_only=True)
class Diffusers(ModelSource):
    """A model of the diffusers ecosystem: a folder with `model_index.json`, or its name on the Hugging Face hub.

    null keeps what the family recommends. The denoiser's weights are kept as float32.
    """

    source: str
    preset: Literal["layout", "authors"] | None = None
    """How to sample it: with the sampler and times of the layout's own scheduler (layout), or as its authors do (authors). null:
    Euler or DDIM over plain times."""
    num_frames: Size | None = None
    height: Size | None = None
    width: Size | None = None
    fps: FrameRate | None = None
    negative_prompt: str | None = None
    """Negative prompt for guidance. null: the family's recommended one."""
    pattern: Pattern | None = None
    """Attention pattern of the denoiser: BlockCausal makes a bidirectional model causal. null: unchanged."""
    tiling: bool | None = None
    """Decode and encode in overlapping tiles: less memory, nearly the same frames. null: the family's default."""
    text_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the text encoder's weights. null: bfloat16 for T5, float32 for CLIP."""
    lora: str | None = None
    """LoRA to merge into the teacher: a file or folder, or a hub name (owner/name, owner/name/FILE.safetensors). The student then
    learns its style. null: none."""
    transforms: tuple[Transform, ...] = ()
    """Transforms applied to the denoiser, after the LoRA. They change teacher and student."""

    def card(self) -> Card:
        return _changed(_restyled(self._plain(), self.lora), self.transforms)

    def _plain(self) -> Card:
        """The card without the LoRA."""
        card = read_card(self.source)
        if not card.sources:
            raise RecipeError(
                f"recipe: model.source: {self.source} is a folder of fewstep's own; write type: Pretrained"
            )
        pattern = None if self.pattern is None else self.pattern.tree()
        parts = dict(card.parts)
        for part, key, value in (
            ("denoiser", "pattern", pattern),
            ("codec", "tiling", self.tiling),
            ("text", "dtype", self.text_dtype),
        ):
            if value is not None:
                parts[part] = _with(parts[part], key, value)
        sizes = ("num_frames", "height", "width", "fps", "negative_prompt")
        chosen = {name: getattr(self, name) for name in sizes if getattr(self, name) is not None}
        preset = None if self.preset is None else adapters.preset(card, self.preset)
        card = replace(card, parts=parts, **({} if preset is None else preset.fields) | chosen)
        latent_shape_of(card)
        card = adapters.at_size(card)
        return card if preset is None else preset.sampled(card, str(self.preset))

    def load(self, leave: Collection[str] = (), parts: Collection[str] = PARTS) -> VideoModel:
        return _load(_only(self._plain(), parts), self, leave)


@dataclass(frozen=True, kw_only=True)
class Previous(ModelSource):
    """In a recipe with stages: the student of the stage before, as the teacher of this one."""

    def card(self) -> Card:
        raise RecipeError("recipe: model: Previous is for the second and later of a recipe's stages; name a model")

    def load(self, leave: Collection[str] = (), parts: Collection[str] = PARTS) -> VideoModel:
        raise RecipeError("recipe: model: Previous is for the second and later of a recipe's stages; name a model")


@dataclass(frozen=True, kw_only=True)
class Scratch(ModelSource):
    """A model with fresh networks, for training from nothing.

    Each part is a network to make, a folder of an earlier run (or `world`) to take that part from, or null.
    """

    denoiser: Spec | str | None = None
    text: Spec | str | None = None
    codec: Spec | str | None = None
    features: Spec | str | None = None
    transforms: tuple[Transform, ...] = ()
    """Transforms applied to the denoiser; if it comes from a folder, after those of its card."""
    path: NoisePath = RectifiedFlow()
    kind: Kind = "flow"
    """What the denoiser predicts."""
    contract: Contract = Contract()
    """How to sample the trained model."""
    num_frames: Size = 16
    height: Size = 32
    width: Size = 32
    fps: FrameRate = 8
    name: str = "scratch"
    seed: int = 0
    """Seed of the initial weights."""

    made: ClassVar[tuple[str, ...]] = ("denoiser", "text", "codec", "features")

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"every part is null; give at least one of {', '.join(self.made)}")

    @property
    def parts(self) -> dict[str, Spec | str]:
        """The parts this model has."""
        every = {name: getattr(self, name) for name in self.made}
        return {name: part for name, part in every.items() if part is not None}

    def card(self) -> Card:
        specs = {name: part if isinstance(part, Spec) else _spec_in(part, name) for name, part in self.parts.items()}
        _require_fitting(specs)
        taken = {name: part for name, part in self.parts.items() if isinstance(part, str)}
        cards = {name: read_card(folder) for name, folder in taken.items()}
        prints = {name: card.fingerprints.get(name, "") for name, card in cards.items()}
        taken_with = cards["denoiser"].transforms if "denoiser" in cards else ()
        made = Card(
            name=self.name, parts=specs, transforms=taken_with, path=self.path, kind=self.kind, contract=self.contract,
            num_frames=self.num_frames, height=self.height, width=self.width, fps=self.fps,
            fingerprints={name: prints.get(name, MADE_NEW) for name in specs},
            provenance={f"{name}.{key}": value for name, card in cards.items() for key, value in card.provenance.items()},
        )  # fmt: skip
        return _changed(made, self.transforms)

    def load(self, leave: Collection[str] = (), parts: Collection[str] = PARTS) -> VideoModel:
        card, made = self.card(), {}
        plain = replace(card, transforms=())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for name, part in self.parts.items():  # all: a part's first weights do not depend on which are asked for
                made[name] = allocate(name, plain) if isinstance(part, Spec) else _part_in(part, name)
        if "denoiser" in made:
            made["denoiser"].backbone = transformed(made["denoiser"].backbone, self.transforms)
        return VideoModel(_only(card, parts), {name: part for name, part in made.items() if name in parts})


def outline(card: Card) -> VideoModel:
    """The model of `card` without memory for its weights: every tensor is on the meta device."""
    with torch.device("meta"):
        return VideoModel(replace(card), {name: allocate(name, card) for name in card.parts})


def _restyled(card: Card, lora: str | None) -> Card:
    """With a LoRA: the denoiser's weights are not those that the card knew. FileNotFoundError where it is not there."""
    if lora is None:
        return card
    if not adapters.is_lora(lora):
        raise FileNotFoundError(f"model.lora: {lora} is not there; give a LoRA file or folder, or a hub name")
    prints = {part: known for part, known in card.fingerprints.items() if part != "denoiser"}
    return replace(card, fingerprints=prints, provenance=card.provenance | {"lora": lora})


def _changed(card: Card, transforms: tuple[Transform, ...]) -> Card:
    """With further transforms: the denoiser's weights are not those that the card knew. RecipeError without a denoiser."""
    if not transforms:
        return card
    if "denoiser" not in card.parts:
        raise RecipeError(
            f"recipe: model.transforms change a denoiser, and this model has none; it has {', '.join(card.parts)}"
        )
    prints = {part: known for part, known in card.fingerprints.items() if part != "denoiser" or known == MADE_NEW}
    return replace(card, fingerprints=prints, transforms=(*card.transforms, *transforms))


def _load(card: Card, source: Pretrained | Diffusers, leave: Collection[str]) -> VideoModel:
    """With a LoRA or transforms every weight is read, because every weight may change."""
    if source.lora is not None or source.transforms:
        leave = set(leave) - {"denoiser"}
    model = VideoModel.load(card, source.source, leave=leave)
    if "denoiser" not in model.parts:
        return model
    model = model if source.lora is None else model.with_lora(source.lora)
    return model.transformed(*source.transforms)


def _only(card: Card, parts: Collection[str]) -> Card:
    return replace(card, parts={name: spec for name, spec in card.parts.items() if name in parts})


def _with(spec: Spec, key: str, value: object) -> Spec:
    if key not in spec.args:
        raise RecipeError(f"recipe: model: a {spec.type} has no {key}; leave it out")
    return Spec(spec.type, {**spec.args, key: value})


def _spec_in(folder: str, part: str) -> Spec:
    card = read_card(folder)
    if part not in card.parts:
        raise RecipeError(f"recipe: model.{part}: {folder} has no {part}; it has {', '.join(card.parts)}")
    return card.parts[part]


def _part_in(folder: str, part: str) -> nn.Module:
    return VideoModel.from_pretrained(folder).part(part)


def _require_fitting(specs: dict[str, Spec]) -> None:
    """Widths that meet must agree."""
    args = {name: spec.args for name, spec in specs.items()}
    meetings = (
        ("denoiser", "text_width", "text", "width"),
        ("denoiser", "channels", "codec", "latent_channels"),
    )
    for mine, key, other, its_key in meetings:
        here, there = args.get(mine, {}).get(key), args.get(other, {}).get(its_key)
        if here is not None and there is not None and here != there:
            raise RecipeError(
                f"recipe: model.{mine}.{key} is {here}, but model.{other}.{its_key} is {there}; make them equal"
            )
