"""Make a student of public few-step weights: merged or read into the base's denoiser, with the contract that is known of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from fewstep.core.bounds import Size
from fewstep.core.stamp import stamp_of
from fewstep.models import adapters
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card, allocate
from fewstep.models.denoiser import Denoiser
from fewstep.models.known.guidance import told
from fewstep.models.known.recognise import named, names_of, recognise
from fewstep.models.known.system import Known
from fewstep.models.known.weights import Weights, files_in, open_weights, with_lora
from fewstep.models.lora import add
from fewstep.models.source import Diffusers
from fewstep.streaming.plan import fitting

_PREFIXES = (
    "", "net.", "model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "generator.model.", "module.",
)  # fmt: skip
"""What other tools write before the names of the denoiser's weights."""
_MOTION = ".motion_modules."


@dataclass(frozen=True, kw_only=True)
class Import:
    """Public weights, and the base that they need. Nothing is read before it is asked for."""

    source: str
    """File or folder of the weights; of whole models in diffusers' layout also the hub name."""
    system: str | None = None
    """Name of the known system. None: told by the name of `source`, or by its tensors."""
    base: str | None = None
    """Model whose other parts are used: a folder in diffusers' layout, or its hub name. None: the system's own."""
    steps: int | None = None
    """Step count, of systems with a file for each, or another default of the others. None: by the name of the file."""
    num_frames: Size | None = None
    height: Size | None = None
    width: Size | None = None

    @cached_property
    def known(self) -> Known:
        """ValueError where `source` is not recognised, or fewstep lacks what it takes to run it."""
        found = named(self.system) if self.system is not None else recognise(self.source, self._tensors)
        if found.missing:
            raise ValueError(
                f"{found.name} cannot be imported: fewstep lacks {found.missing}. `fewstep list students` says which can be"
            )
        return found

    def student(self) -> VideoModel:
        """The student, ready to be saved: its card has the contract, where it comes from, and the licences.

        FileNotFoundError, RecipeError or ValueError say what is wrong.
        """
        known, name = self.known, Path(self.source).name
        contract, card = known.for_file(name, self.steps), self._card()
        network = self._network(card)  # before the other parts are read: it is here that files do not fit
        model = _loaded(card, self._home, [part for part in card.parts if part != "denoiser"])
        made = model.with_part("denoiser", network.requires_grad_(False), role="student", contract=contract)
        if contract.stream is not None:  # a clip of half chunks is refused here, and not when it is sampled
            fitting(contract.stream, card.num_frames, lambda frames: made.latent_shape(frames)[1])
        return made.with_card(name=known.name, provenance=self._provenance(card))

    @property
    def _is_layout(self) -> bool:
        """Whether `source` is a whole model, whose text encoder and codec are used."""
        whole = self.known.holds == "weights" and self.known.guidance_input is None
        return whole and self.base is None and adapters.is_layout(self.source)

    @property
    def _home(self) -> str:
        """Where the other parts are."""
        return self.source if self._is_layout else self._base

    @property
    def _path(self) -> Path:
        """Where the weights are; those of a whole model in diffusers' layout are in a folder of their own."""
        source = Path(self.source)
        return next((source / part for part in ("unet", "transformer") if (source / part).is_dir()), source)

    @property
    def _files(self) -> list[Path]:
        """What is read of the student, besides a layout."""
        if self.known.holds != "adapted":
            return files_in(self._path)
        return [file for file in with_lora(self._path, "weights", required=True) if file is not None]

    @property
    def _base(self) -> str:
        """ValueError where the system has no base of its own and none is given."""
        if self.base is not None:
            return self.base
        if not adapters.is_layout(self.known.bases[0]):
            raise ValueError(f"{self.known.name} needs a base; give --base FOLDER, a folder of {self.known.bases[0]}")
        return self.known.bases[0]

    def _card(self) -> Card:
        """The card of the base at the student's size. ValueError where it is no base for this system."""
        known, base = self.known, self._home
        if not Path(self.source).exists() and base != self.source:
            raise FileNotFoundError(
                f"{self.source}: no such file or folder; download the files of {known.source} and give their path"
            )
        own = {key: getattr(self, key) for key in ("num_frames", "height", "width")}
        size = dict(known.size) | {key: value for key, value in own.items() if value is not None}
        card = Diffusers(source=base, **size).card()
        network = card.parts["denoiser"].type
        if network != known.network:
            raise ValueError(
                f"{base} is a {network}, and {known.name} belongs to a {known.network}; give --base, for example "
                f"{known.bases[0]}"
            )
        if (card.path, card.kind) != (known.path, known.kind):
            raise ValueError(
                f"{base} predicts {card.kind} on {card.path}, and {known.name} was trained for {known.kind} on {known.path}; "
                "give a base with the scheduler that it was trained with"
            )
        self._require_same_task(card, base)
        return card

    def _require_same_task(self, card: Card, base: str) -> None:
        """ValueError for image-to-video weights over a text-to-video base, or the reverse: their LoRAs have the same shapes."""
        for name in names_of(self.source):
            task = re.search(r"(?<![a-z])(i2v|t2v)(?![a-z])", name, re.IGNORECASE)
            if task:
                if (task[1].lower() == "i2v") != ("image" in card.parts):
                    own = "images" if "image" in card.parts else "text"
                    raise ValueError(
                        f"{name} says {task[1]}, and {base} is for {own} to video; give the base that it belongs to with --base"
                    )
                return

    def _tensors(self) -> Collection[str]:
        """Names of the tensors, where there is something to read."""
        path = self._path
        if not path.exists():
            raise FileNotFoundError(f"{self.source}: no such file or folder; give --as NAME with a hub name, or a path")
        return [name for file in files_in(path) for name in open_weights(file).names]

    def _network(self, card: Card) -> Denoiser:
        """The student's denoiser."""
        if self.known.holds in ("weights", "adapted") and not self._is_layout:
            return self._whole(card)
        network = _loaded(card, self._home, ["denoiser"]).denoiser
        return network if self._is_layout else self._changed(network)

    def _changed(self, network: Denoiser) -> Denoiser:
        """The base's denoiser with the LoRA added, in place; of motion modules with these in place of its own."""
        source: Path | None = Path(self.source)
        if self.known.holds == "motion":
            motion, source = with_lora(Path(self.source), "motion modules", required=False)
            own = {name: tensor for name, tensor in network.state_dict().items() if _MOTION in name}
            _fill(own, open_weights(motion), network, str(motion))
        if source is not None:
            updates = adapters.read_lora(network, source)
            add(network, updates.layers, updates.whole)
        return network

    def _whole(self, card: Card) -> Denoiser:
        """A denoiser with the weights of the file, and what the LoRA beside it adds."""
        network: Denoiser = allocate("denoiser", card)  # type: ignore[assignment]
        source, lora = self._path, None
        if self.known.holds == "adapted":
            source, lora = with_lora(source, "weights", required=True)
        weights = open_weights(source, self.known.inside)
        if self.known.guidance_input is not None:
            weights = told(weights, self.known.guidance_input)
        _fill(network.state_dict(), weights, network, self.source)
        if lora is not None:
            tensors = open_weights(lora, "generator_lora")
            updates = adapters.lora_of(network, {name: tensors.read(name) for name in tensors.names}, lora)
            add(network, updates.layers, updates.whole)
        return network

    def _provenance(self, card: Card) -> dict[str, str]:
        known, path = self.known, self._path
        files = self._files if path.exists() and not self._is_layout else []
        return {
            "source": known.source,
            "licence": known.licence,
            "system": known.name,
            "weights": ", ".join(f"{file.name} {stamp_of(file)}" for file in files) or self.source,
            **{f"teacher.{key}": value for key, value in card.provenance.items()},
            **{f"fact: {what}": where for what, where in known.facts.items()},
            **({"unverified": known.unverified} if known.unverified else {}),
            **({} if known.guidance_input is None else {"guidance input": f"{known.guidance_input:g}"}),
        }


def _loaded(card: Card, source: str, parts: Collection[str]) -> VideoModel:
    """Some parts of the base; those that are only named in the student are left in their files."""
    some = replace(card, parts={part: card.parts[part] for part in parts})
    return VideoModel.load(some, source, leave=("text", "codec"))


def _fill(own: Mapping[str, Tensor], weights: Weights, network: Denoiser, where: str) -> None:
    """Read the `own` tensors of a network, one by one, from `weights`. ValueError names the first that does not fit."""
    names = _matched(own, weights, network, where)
    for name, tensor in own.items():
        stored = weights.read(names[name])
        if stored.ndim == 2 < tensor.ndim and stored.shape == tensor.flatten(1).shape:
            stored = stored.view_as(tensor)  # a convolution over patches that do not overlap is a matrix
        if stored.shape != tensor.shape:
            raise ValueError(
                f"{where}: {names[name]} is {tuple(stored.shape)}, and the base's {tuple(tensor.shape)}; give the base that "
                "these weights belong to with --base"
            )
        tensor.copy_(stored)


def _matched(own: Collection[str], weights: Weights, network: Denoiser, where: str) -> dict[str, str]:
    """The names of `own` tensors in a file, which may be diffusers' or the authors', behind any prefix."""
    backbone = network.backbone
    namings: list[Callable[[str], str]] = [backbone.foreign]  # type: ignore[list-item]
    if hasattr(backbone, "authors"):
        namings.append(backbone.authors)  # type: ignore[arg-type]
    tables = [
        {f"{prefix}{naming(name.removeprefix('backbone.'))}": name for name in own}
        for naming in namings
        for prefix in _PREFIXES
    ]
    table = max(tables, key=lambda table: len(table.keys() & set(weights.names)))
    extra, lacking = sorted(set(weights.names) - table.keys()), sorted(table.keys() - set(weights.names))
    if extra or lacking:
        odd = f"it has no {lacking[0]}" if lacking else f"{extra[0]} belongs to no part of the network"
        raise ValueError(
            f"{where}: these are not the weights of this {type(backbone).__name__}: {odd} ({len(lacking)} tensors are missing, "
            f"{len(extra)} are too many); give the base that they belong to with --base, or the right file"
        )
    return {own_name: name for name, own_name in table.items()}
