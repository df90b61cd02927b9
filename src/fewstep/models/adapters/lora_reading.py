"""Read LoRA files of other tools: which layer each tensor changes, whatever the tool calls it.

A tensor's name is a layer and an ending. Layers are called as in diffusers (`transformer.blocks.0.attn1.to_q`), by the names
that a family's authors gave them (`diffusion_model.blocks.0.self_attn.q`: ComfyUI), with underscores for dots (`lora_unet_...`:
kohya's tools), or as here (peft's folders); the prefix may be missing. Endings are two matrices and their `alpha`, or a
difference: `diff` of a weight, `diff_b` of a bias, `diff_m` of Wan's modulation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fewstep.compress.linear import linears
from fewstep.core.yaml import load_json
from fewstep.models.adapters.lora_file import Names, names_of
from fewstep.models.adapters.lora_hub import local
from fewstep.models.denoiser import Denoiser
from fewstep.models.lora import CONFIG, PREFIX, WEIGHTS, LowRank, Updates
from fewstep.models.stored import open_tensors, read_tensors

_ENDS = MappingProxyType({
    "lora_A.weight": "down", "lora_down.weight": "down", "lora.down.weight": "down", "lora_A.default.weight": "down",
    "lora_B.weight": "up", "lora_up.weight": "up", "lora.up.weight": "up", "lora_B.default.weight": "up",
    "alpha": "alpha", "lora_B.bias": "bias of up", "diff": "weight", "diff_b": "bias", "diff_m": "modulation",
})  # fmt: skip
"""Endings, and what such a tensor is."""
_CHANGED = MappingProxyType({"bias": "bias", "bias of up": "bias", "modulation": "modulation"})
"""The parameter of a layer that such a tensor changes, where it is not the weight."""
_OLD = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
"""Diffusers' names before peft: the matrices of an attention layer belong to its processor."""
_PREFIXES = ("", PREFIX, "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_UNDERSCORED = ("lora_unet_", "lora_transformer_")
_HIGH = re.compile(r"(?<![a-z])high(?![a-z])", re.IGNORECASE)
_LOW = re.compile(r"(?<![a-z])low(?![a-z])", re.IGNORECASE)
"""What files of Wan 2.2's experts are called by: how noisy the clips are that they see."""
_BOTH = (
    "give a folder with a file for each, called NAME.safetensors and NAME_2.safetensors, or with high and low in their names; "
    "put a LoRA of a single network there twice"
)


def read_lora(denoiser: Denoiser, source: Path | str) -> Updates:
    """What a LoRA changes in the denoiser; every tensor of it must find its layer.

    `source` is a safetensors file, or a folder with one (also as peft writes it). For a network of two experts it is a folder
    with a file for each. Or it is a name on the hub (`lora_hub`). FileNotFoundError or ValueError say what is wrong.
    """
    experts = _experts(denoiser)
    source = local(str(source), max(1, len(experts)))
    files, config = _find(source, experts)
    layers, whole = dict[str, LowRank](), dict[str, Tensor]()
    for file, expert in files.items():
        tensors = read_tensors(file)
        if not tensors:
            raise ValueError(
                f"{file}: there are no tensors in it; give a LoRA as a .safetensors file, or a folder with one"
            )
        found = lora_of(denoiser, tensors, file, strength=_strength(file, config), expert=expert)
        layers |= found.layers
        whole |= found.whole
    _require_all_experts(denoiser, source, (*layers, *whole))
    return Updates(layers=layers, whole=whole)


def lora_of(
    denoiser: Denoiser, tensors: Mapping[str, Tensor], path: Path, *, strength: float = 1.0, expert: str | None = None
) -> Updates:
    """What the `tensors` of a LoRA's file at `path` change in the denoiser, or in one `expert` of it.

    `strength` is `alpha / rank` of layers that have no alpha of their own. ValueError says what is wrong.
    """
    found = _File(path, tensors, _Names(denoiser, expert), strength)
    return Updates(layers=found.layers(), whole=found.whole())


@dataclass(frozen=True)
class _Names:
    """What others call the parameters of a denoiser; with an `expert`, of that alone."""

    denoiser: Denoiser
    expert: str | None

    @cached_property
    def own(self) -> dict[str, str]:
        """Own names of parameters by every other name. A linear layer has a weight even where that is no parameter."""
        backbone, found = self.denoiser.backbone, dict[str, str]()
        renames = [names_of(self.denoiser, names) for names in _known(self.denoiser)]
        for name in (*(f"{layer.name}.weight" for layer in linears(backbone)), *dict(backbone.named_parameters())):
            found[f"backbone.{name}"] = f"backbone.{name}"
            for rename in renames:
                folder, _, within = rename(name).rpartition("/")
                if not folder or folder == self.expert:
                    found[within] = f"backbone.{name}"
                elif self.expert is None:  # a file for all experts says which is meant
                    found[f"{folder}.{within}"] = f"backbone.{name}"
        return found

    @cached_property
    def underscored(self) -> dict[str, str]:
        return {name.replace(".", "_"): own for name, own in self.own.items()}

    def find(self, name: str, kind: str) -> str | None:
        """The parameter that a tensor of this `kind` changes."""
        end = _CHANGED.get(kind, "weight")
        for start in _UNDERSCORED:
            if name.startswith(start):
                return self.underscored.get(f"{name.removeprefix(start)}_{end}")
        for start in _PREFIXES:
            if name.startswith(start):
                rest = name.removeprefix(start)
                found = self.own.get(f"{rest}.{end}") or (self.own.get(rest) if kind == "weight" else None)
                if found:
                    return found
        return None

    @property
    def told(self) -> str:
        """Names that are read, by the example of one layer."""
        layer = next((f.name for f in linears(self.denoiser.backbone) if f.name.endswith((".to_q", ".qkv"))), "")
        names = {names: names_of(self.denoiser, names)(layer).rpartition("/")[2] for names in _known(self.denoiser)}
        starts = {"diffusers": "transformer.", "comfyui": "diffusion_model."}
        dotted = [f"{starts[kind]}{name}" for kind, name in names.items()] or [f"{PREFIX}backbone.{layer}"]
        return ", ".join([*dotted, *(f"lora_unet_{name.replace('.', '_')}" for name in list(names.values())[-1:])])


@dataclass(frozen=True)
class _File:
    """The tensors of one file."""

    path: Path
    tensors: Mapping[str, Tensor]
    names: _Names
    strength: float
    """`alpha / rank` of layers that have no alpha of their own."""

    @cached_property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by what they are, by the parameter that they change. ValueError names the first that is not understood."""
        found, odd = dict[str, dict[str, Tensor]](), list[str]()
        for name, value in self.tensors.items():
            layer, kind = _split(name)
            parameter = self.names.find(layer, kind) if kind else None
            if parameter is None:
                odd.append(name)
                continue
            if kind in found.setdefault(parameter, {}):
                raise ValueError(f"{self.path}: {name} says again what another tensor says; leave one of them out")
            found[parameter][kind] = value
        if odd:
            network = type(self.names.denoiser.backbone).__name__
            advice = _BOTH if self._for_one_expert else f"layers may be called {self.names.told}, also without prefix"
            raise ValueError(
                f"{self.path}: {len(odd)} of {len(self.tensors)} tensors belong to no layer of this {network}, first "
                f"{min(odd)}; {advice}; tensors end in lora_A.weight and lora_B.weight, lora_down.weight and lora_up.weight, "
                "alpha, diff, diff_b or diff_m"
            )
        return found

    @property
    def _for_one_expert(self) -> bool:
        """Whether the file could be read if it were known which expert it belongs to."""
        experts = _experts(self.names.denoiser)
        if len(experts) < 2 or self.names.expert is not None:
            return False
        alone = _Names(self.names.denoiser, experts[0])
        return all(kind and alone.find(layer, kind) for layer, kind in map(_split, self.tensors))

    def layers(self) -> dict[str, LowRank]:
        """Low-rank updates by layer."""
        return {
            parameter.removesuffix(".weight"): self._low_rank(parameter)
            for parameter, parts in self.parts.items()
            if parts.keys() & {"down", "up", "alpha"}
        }

    def whole(self) -> dict[str, Tensor]:
        """Differences by parameter."""
        made, own = dict[str, Tensor](), dict(self.names.denoiser.named_parameters())
        for parameter, parts in self.parts.items():
            for kind in parts.keys() - {"down", "up", "alpha"}:
                scale = self._low_rank(f"{parameter.removesuffix('bias')}weight").scale if kind == "bias of up" else 1.0
                if parameter not in own:
                    raise ValueError(f"{self.path}: {parameter} is quantised here; merge the LoRA before you quantise")
                if own[parameter].shape != parts[kind].shape:
                    raise ValueError(
                        f"{self.path}: the difference of {parameter} is {tuple(parts[kind].shape)}, and the parameter "
                        f"{tuple(own[parameter].shape)}; this LoRA was made for another model"
                    )
                made[parameter] = scale * parts[kind].float() + made.get(parameter, 0.0)
        return made

    def _low_rank(self, parameter: str) -> LowRank:
        parts, layer = self.parts.get(parameter, {}), parameter.removesuffix(".weight")
        for part, called in (("down", "lora_A or lora_down"), ("up", "lora_B or lora_up")):
            if part not in parts:
                raise ValueError(f"{self.path}: {layer} has no {called}; the file is incomplete, copy it again")
        down, up = parts["down"], parts["up"]
        layer_weight: Any = self.names.denoiser.get_submodule(layer).weight
        shape = layer_weight.shape
        if (
            up.shape[0] != shape[0]
            or up[0].numel() != len(down)
            or down[0].numel() != shape[1:].numel()
            or len(shape) < 2
        ):
            raise ValueError(
                f"{self.path}: {layer} is {tuple(up.shape)} times {tuple(down.shape)}, and the layer {tuple(shape)}; this LoRA "
                "was made for another model"
            )
        alpha = parts.get("alpha")
        return LowRank(up, down, self.strength if alpha is None else float(alpha) / len(down))


def _split(name: str) -> tuple[str, str]:
    """Layer, and what the tensor is; nothing for an ending that is not known."""
    name = _OLD.sub(lambda found: f".to_{found[1]}{'.0' if found[1] == 'out' else ''}.lora_{found[2]}.weight", name)
    end = next((end for end in _ENDS if name.endswith(f".{end}")), "")
    return name.removesuffix(f".{end}"), _ENDS.get(end, "")


def _experts(denoiser: Denoiser) -> Sequence[str]:
    """Folders of the networks that a denoiser is made of."""
    folders: Sequence[str] = getattr(denoiser.backbone, "folders", ())
    return folders


def _require_all_experts(denoiser: Denoiser, source: Path, changed: Sequence[str]) -> None:
    """ValueError where a LoRA changes one of two experts: a file of which the other half is missing."""
    experts = _experts(denoiser)
    if len(experts) < 2:
        return
    reached = {denoiser.backbone.foreign(name.removeprefix("backbone.")).rpartition("/")[0] for name in changed}
    if missing := [expert for expert in experts if expert not in reached]:
        raise ValueError(f"{source} changes nothing in {missing[0]}, and this model has two experts; {_BOTH}")


def _known(denoiser: Denoiser) -> list[Names]:
    """Whose names there are for this network."""
    names: list[Names] = ["diffusers"] if hasattr(denoiser.backbone, "folders") else []
    return [*names, "comfyui"] if hasattr(denoiser.backbone, "authors") else names


def _find(source: Path, experts: Sequence[str]) -> tuple[dict[Path, str | None], dict[str, Any]]:
    """The safetensors files, each with the expert that it is for (None: for the whole network), and peft's settings where they
    lie beside them."""
    if source.is_file():
        return {source: None}, {}
    if (source / CONFIG).is_file():
        return {source / WEIGHTS: None}, load_json(source / CONFIG, "a LoRA's settings")
    files = sorted(source.glob("*.safetensors"))
    if len(files) == 1:
        return {files[0]: None}, {}
    if len(experts) == 2 and len(files) == 2:
        return dict(zip(in_order(files), experts, strict=True)), {}
    found = f"there are {len(files)} .safetensors files in it" if source.is_dir() else "no such file or folder"
    advice = _BOTH if len(experts) == 2 else "give a LoRA as a .safetensors file, or a folder with one"
    raise FileNotFoundError(f"{source}: {found}; {advice}")


def in_order(files: Sequence[Path]) -> tuple[Path, Path]:
    """Two files, that of the expert for noisy times first. ValueError where their names do not say which it is."""
    for one, two in (files, files[::-1]):
        by_noise = _says(one, _HIGH, _LOW) and _says(two, _LOW, _HIGH)
        if two.stem == f"{one.stem}_2" or by_noise:
            return one, two
    raise ValueError(f"{files[0].parent}: {files[0].name} and {files[1].name} do not say whose they are; {_BOTH}")


def _says(file: Path, word: re.Pattern[str], other: re.Pattern[str]) -> bool:
    return bool(word.search(file.stem)) and not other.search(file.stem)


def _strength(file: Path, config: dict[str, Any]) -> float:
    """`alpha / rank` of tensors that have no alpha of their own."""
    if not config:
        with open_tensors(file) as opened:
            written = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        config = {key.rpartition(".")[2]: value for key, value in written.items()}
    special = [key for key in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora") if config.get(key)]
    if special:
        raise ValueError(f"{file}: LoRAs with {', '.join(special)} are not read; merge it with the tool that made it")
    return float(config["lora_alpha"] / config["r"]) if config else 1.0
