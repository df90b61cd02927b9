"""Low-rank adapters (LoRA, 2106.09685): a network that owns a few small matrices and borrows every other weight.

Each role is a network of its own over one set of frozen weights: nothing says "this adapter is active now". A shared
network with a switch would compute something else when a block is computed again in the backward pass, after the switch
was turned. Borrowed weights are buffers that are not saved, so parameters, gradients, optimiser states, averages and
checkpoints hold the adapters alone, without a special case anywhere. The files are those of the library peft.

Legend: W weight `[out, in]`, A `[rank, in]`, B `[out, rank]`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.core import Rng
from fewstep.models.denoiser import Denoiser

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter folder, as peft names them."""
PREFIX = "base_model.model."
"""What peft writes before the name of every adapted module."""
_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters on the linear layers of the blocks: `W + alpha / rank * B A`, with B = 0 in the beginning."""

    rank: int = 32
    alpha: float = 32.0
    """Strength: the update is multiplied by `alpha / rank`."""
    targets: tuple[str, ...] = ()
    """Last parts of the names of the layers that are adapted, such as `qkv` or `mlp.up`; empty: all in the blocks."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha positive, got rank={self.rank}, alpha={self.alpha}")


class LoraLinear(nn.Module):
    """`x W^T + b + scale (x A^T) B^T`: W and b are borrowed, A and B are its own."""

    weight: Tensor

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("weight", base.weight.detach(), persistent=False)
        self.register_buffer("bias", None if base.bias is None else base.bias.detach(), persistent=False)
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, rank, bias=False, **place)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base.out_features, bias=False, **place)

    def forward(self, input: Tensor) -> Tensor:
        """The argument has `nn.Linear`'s name, by which some networks give it."""
        return F.linear(input, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(input))

    @property
    def update(self) -> Tensor:
        """What is added to W."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


class LowRank(NamedTuple):
    """What a LoRA file holds of one layer."""

    up: Tensor
    """B, `[out, rank]`."""
    down: Tensor
    """A, `[rank, in]`."""
    scale: float

    @property
    def update(self) -> Tensor:
        """What is added to W, float32."""
        return self.scale * (self.up.float() @ self.down.float())


def adapt(base: Denoiser, lora: Lora, rng: Rng) -> Denoiser:
    """A network that equals `base` until its adapters, its only parameters, are trained. It follows `base`'s weights.

    ValueError names a target that no layer has.
    """
    chosen = set(_targets(base, lora.targets))
    twin = _borrow(base)
    for parent, child, name, linear in list(_linears(twin)):
        if name not in chosen:
            continue
        layer = LoraLinear(linear, lora.rank, lora.alpha / lora.rank)
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
    """A plain network with the weights of `base` plus the adapters of `network`; `network` itself if it has none."""
    layers = adapters(network)
    return updated(base, layers) if layers else network


@torch.no_grad()
def updated(base: _Network, layers: Mapping[str, LoraLinear] | Mapping[str, LowRank]) -> _Network:
    """A copy of `base` with each update added to the weight of the layer it is named after."""
    whole = copy.deepcopy(base)
    for name, layer in layers.items():
        weight: Tensor = whole.get_submodule(name).weight  # type: ignore[assignment]
        weight += layer.update.to(weight)
    return whole


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
    config, stored = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
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


def _targets(base: Denoiser, wanted: tuple[str, ...]) -> list[str]:
    """Names of the linear layers to adapt."""
    names = [name for _, _, name, _ in _linears(base)]
    inside = [name for name in names if name.startswith("backbone.blocks.")]
    for target in wanted:
        if not any(_ends(name, target) for name in names):
            known = sorted({name.split(".", 3)[-1] for name in inside})
            raise ValueError(f"lora.targets: no linear layer is called {target!r}; the blocks have {', '.join(known)}")
    return [name for name in names if any(_ends(name, target) for target in wanted)] if wanted else inside


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _linears(network: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Linear]]:
    """Parent, name within it, full name and layer of every linear layer."""
    for path, parent in network.named_modules():
        for child, layer in parent.named_children():
            if type(layer) is nn.Linear:
                yield parent, child, f"{path}.{child}" if path else child, layer


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
