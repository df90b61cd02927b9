"""Low-rank adapters (LoRA, 2106.09685): a network with a few small matrices that borrows all other weights.

Each role is a network of its own over one set of frozen weights: nothing says "this adapter is active now". A shared
network with a switch would compute something else when a block is computed again in the backward pass, after the switch
was turned. Borrowed weights are buffers that are not saved, so parameters, gradients, optimiser states and checkpoints
hold the adapters alone, without a special case anywhere. Averages are of what the adapters add to the weights, because the
product of two averages is not the average of the products. The files are those of the library peft.

Legend: W weight `[out, in]`, A `[rank, in]`, B `[out, rank]`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.compress import Branches, transformed
from fewstep.compress.linear import Found, chosen
from fewstep.core import Rng
from fewstep.core.bounds import Positive, Size, require_bounds
from fewstep.core.yaml import load_json
from fewstep.models.denoiser import Denoiser
from fewstep.models.depot import depot_of
from fewstep.models.stored import read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter folder, as peft names them."""
PREFIX = "base_model.model."
"""What peft writes before the name of every adapted module."""
_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters on the linear layers of the blocks: `W + alpha / rank * B A`, with B = 0 in the beginning."""

    rank: Size = 32
    alpha: Positive = 32.0
    """Strength: the update is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = ()
    """Layers to adapt, by the last parts of their names, such as `qkv` or `mlp.up`; empty: all linear layers of the blocks."""

    def __post_init__(self) -> None:
        require_bounds(self)


class LoraLinear(nn.Module):
    """`base(x) + scale (x A^T) B^T`: `base` is a linear layer of any class whose tensors are borrowed, A and B are its own."""

    def __init__(self, base: nn.Module, rank: int, scale: float, device: torch.device | None = None) -> None:
        """On the `device` of its base, if none is given."""
        super().__init__()
        self.in_features, self.out_features, self.base, self.scale = base.in_features, base.out_features, base, scale
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        place = {"device": device or base.weight.device, "dtype": dtype}
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, rank, bias=False, **place)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base.out_features, bias=False, **place)

    @property
    def weight(self) -> Tensor:
        """W, which some networks look at."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        """The argument has `nn.Linear`'s name, by which some networks give it."""
        return self.base(input) + self.scale * self.lora_B(self.lora_A(input))

    @property
    def up(self) -> Tensor:
        """B."""
        return self.lora_B.weight

    @property
    def down(self) -> Tensor:
        """A."""
        return self.lora_A.weight

    @property
    def update(self) -> Tensor:
        """What is added to W."""
        return self.scale * (self.up @ self.down)

    @torch.no_grad()
    def average(self, other: LoraLinear, decay: float) -> None:
        """Make the update `decay` of its own and `1 - decay` of the `other`'s: the nearest of this rank (Eckart and Young 1936).

        Exact while the two rank-r updates span r directions together; what both add beyond them is cut off.
        """
        b, a = self.lora_B.weight, self.lora_A.weight
        share = (1 - decay) * other.scale / self.scale
        left = torch.cat([decay * b.float(), share * other.lora_B.weight.to(b.device).float()], 1)
        right = torch.cat([a.float(), other.lora_A.weight.to(a.device).float()])
        (left, inner), (right, outer) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
        u, size, v = torch.linalg.svd(inner @ outer.mT, full_matrices=False)
        root = size[: len(a)].sqrt()
        kept = len(root)  # fewer than the rank where a side of the layer is narrower than it
        b.zero_()[:, :kept] = left @ u[:, :kept] * root
        a.zero_()[:kept] = (right @ v[:kept].mT * root).mT


class LowRank(NamedTuple):
    """What a LoRA file holds of one layer."""

    up: Tensor
    """B, `[out, rank]`; of a convolution `[out, rank, 1, ...]`."""
    down: Tensor
    """A, `[rank, in]`; of a convolution `[rank, in, ...]`, with the sizes of its kernel."""
    scale: float

    @property
    def update(self) -> Tensor:
        """What is added to W, float32, `[out, in]`; of a convolution, its kernel's places are beside the inputs."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What a LoRA file changes in a network."""

    layers: dict[str, LowRank]
    """Low-rank updates by the layer whose weight they are added to."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Differences by the parameter they are added to, in its shape: biases, norms, or a whole weight."""


def adapt(base: Denoiser, lora: Lora, rng: Rng) -> Denoiser:
    """A network that equals `base` until its adapters, its only parameters, are trained. It follows `base`'s weights.

    ValueError names a target that no layer has, and refuses a network that has adapters already.
    """
    if adapters(base):
        raise ValueError("this network has adapters already; merge them into it first")
    twin, depot = _borrow(base), depot_of(base)
    for name, parent, child, linear in _targets(twin, lora.targets):
        layer = LoraLinear(linear, lora.rank, lora.alpha / lora.rank, None if depot is None else depot.device)
        with torch.no_grad():
            first = rng.rand(tuple(layer.lora_A.weight.shape), name)
            layer.lora_A.weight.copy_((2 * first - 1) * linear.in_features**-0.5)  # as peft draws it
            layer.lora_B.weight.zero_()
        setattr(parent, child, layer)
    return twin


def weaken(network: Denoiser, scale: float) -> Denoiser:
    """A view of `network` whose adapters count `scale` times: no parameters, it follows the adapters it looks at.

    ValueError for a network without adapters.
    """
    if not adapters(network):
        raise ValueError("only the adapters of a network can be weakened, and this one has none; set settings.lora")
    view = _borrow(network)
    for layer in adapters(view).values():
        layer.scale *= scale
    return view


def duplicate(network: _Network) -> _Network:
    """An independent copy; what the network borrows stays borrowed."""
    loans = [
        tensor
        for module in network.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None and name in module._non_persistent_buffers_set
    ]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in loans})


def adapters(network: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers of a network, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLinear)}


def merge(base: nn.Module, network: nn.Module) -> nn.Module:
    """A network without adapters that computes what `base` with those of `network` does; `network` itself if it has none."""
    layers = adapters(network)
    return updated(base, layers) if layers else network


def mergeable(base: nn.Module, network: nn.Module) -> bool:
    """Whether every layer with an adapter has a float weight, to which the update can be added."""
    return all(base.get_submodule(name)._parameters.get("weight") is not None for name in adapters(network))


class Merged(Mapping[str, Tensor]):
    """Weights with the adapters of a network in them, each computed when it is asked for: as `merge` does, for those that are
    `mergeable`."""

    def __init__(self, weights: Mapping[str, Tensor], network: nn.Module) -> None:
        self._weights, self._layers = weights, adapters(network)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        value, layer = self._weights[name], self._layers.get(name.removesuffix(".weight"))
        return value if layer is None else value + layer.update.to(value).view_as(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def updated(base: _Network, layers: Mapping[str, LoraLinear] | Mapping[str, LowRank]) -> _Network:
    """A copy of `base` with each update added to the weight of the layer it is named after."""
    whole = copy.deepcopy(base)
    add(whole, layers)
    return whole


@torch.no_grad()
def add(
    network: nn.Module,
    layers: Mapping[str, LoraLinear] | Mapping[str, LowRank],
    whole: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Add each update of `layers` to the weight of the layer it is named after, and each of `whole` to its parameter, in place.

    Where a layer has no float weight (`Int8`), the update stays beside it, as one of `Branches`.
    """
    beside: dict[str, LoraLinear | LowRank] = {}
    for name, layer in layers.items():
        weight = network.get_submodule(name)._parameters.get("weight")
        if weight is None:
            beside[name] = layer
        else:
            weight.add_(layer.update.to(weight).view_as(weight))
    for name, difference in whole.items():
        parameter = network.get_parameter(name)
        parameter.add_(difference.to(parameter))
    if beside:
        _put_beside(network, beside)


def _put_beside(denoiser: Any, layers: Mapping[str, LoraLinear | LowRank]) -> None:
    """Make each update a low-rank branch of its layer. Ranks that are smaller than the largest are filled up with zeros."""
    rank = max(len(layer.down) for layer in layers.values())
    branches = Branches(rank=rank, targets=tuple(name.removeprefix("backbone.") for name in layers))
    denoiser.backbone = transformed(denoiser.backbone, [branches])
    for name, layer in layers.items():
        branch, own = denoiser.get_submodule(name), len(layer.down)
        branch.down.weight.zero_()[:own] = layer.down
        branch.up.weight.zero_()[:, :own] = layer.scale * layer.up


def save_adapter(network: nn.Module, folder: Path, base: str) -> Path:
    """Write the adapters of `network` as peft reads them: `PeftModel.from_pretrained(model.denoiser, folder)`.

    `base` names the model they belong to, for people. ValueError for a network without adapters.
    """
    layers = adapters(network)
    if not layers:
        raise ValueError("this network has no adapters to save")
    rank = next(iter(layers.values())).lora_A.out_features
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}.{end}": value for name, end, value in _matrices(layers)}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True, "r": rank,
        "lora_alpha": next(iter(layers.values())).scale * rank, "target_modules": sorted(layers), "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


@torch.no_grad()
def load_adapter(base: Denoiser, folder: Path | str) -> Denoiser:
    """`base` with the adapters of a folder written by `save_adapter`. FileNotFoundError or ValueError say what is wrong."""
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; give a folder with {CONFIG} and {WEIGHTS}")
    config, stored = load_json(folder / CONFIG, "a LoRA's settings"), read_tensors(folder / WEIGHTS)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or config.get("use_dora"):
        raise ValueError(
            f"{folder / CONFIG} describes {config.get('peft_type')} with extras; plain LoRA is what is read"
        )
    lora = Lora(rank=config["r"], alpha=config["lora_alpha"], targets=tuple(config["target_modules"]))
    network = adapt(base, lora, Rng(0))
    mine = {f"{PREFIX}{name}.{end}": value for name, end, value in _matrices(adapters(network))}
    odd = sorted(mine.keys() ^ stored.keys()) + [k for k in mine if k in stored and mine[k].shape != stored[k].shape]
    if odd:
        raise ValueError(f"{folder / WEIGHTS} does not fit this network: {', '.join(odd[:3])}")
    for name, value in mine.items():
        value.copy_(stored[name])
    return network


def _targets(network: Denoiser, targets: tuple[str, ...]) -> list[Found]:
    """The linear layers to adapt."""
    try:
        return chosen(network, targets)
    except ValueError as error:
        raise ValueError(f"lora.targets: {error}") from None


def _matrices(layers: dict[str, LoraLinear]) -> Iterator[tuple[str, str, Tensor]]:
    for name, layer in layers.items():
        yield name, "lora_A.weight", layer.lora_A.weight
        yield name, "lora_B.weight", layer.lora_B.weight


def _borrow(network: _Network) -> _Network:
    """A second tree of modules over the same tensors, none of which is a parameter of it or is saved with it."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, shared)
    for module in twin.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach(), persistent=False)
        module._non_persistent_buffers_set.update(module._buffers)
    return twin
