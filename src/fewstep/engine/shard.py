"""Networks sharded with FSDP2: every process holds its share of each weight and gathers a block when it runs.

A denoiser is cut along its three parts: each block is one unit; embedding and head together are another. All other networks
(discriminator heads, codecs, encoders) are small: every process holds them whole, and their gradients are summed over the
processes; so with adapters. The frozen blocks that adapters borrow, and narrow ones, are divided by a `models.depot`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import register_dataclass

from fewstep.diffusion.prediction import Prediction, Tangent
from fewstep.engine.mesh import Processes
from fewstep.models.backbone import State
from fewstep.models.denoiser import Denoiser
from fewstep.models.depot import depot_of, withdrawn


def hollow(network: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes but no memory (the meta device); buffers are copied."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    shell: nn.Module = copy.deepcopy(network, memo)
    return shell


def shard(network: Denoiser, weights: Mapping[str, Tensor], mesh: DeviceMesh) -> None:
    """Cut a hollow denoiser over the processes of `mesh`, and give each process its share of `weights`, on its device.

    The network is frozen at first, like every network of a run. Master weights, gradients and their sums stay float32;
    autocast decides in which precision a gathered block computes.
    """
    # FSDP warns that such a tensor must not be changed in place; no method changes a network's output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    _let_fsdp_see_inside()
    for unit in (*network.backbone.blocks, network):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for unit in network.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)  # the loss is divided already, and gloo cannot average
            unit.set_force_sum_reduction_for_comms(True)
    for way in ("features", "jvp"):  # ways to call it, besides forward
        register_fsdp_forward_method(network, way)
    network.backbone.text_first = False  # a block's weights are gathered for its forward alone
    shares: dict[str, Tensor] = {}
    for name, empty in network.state_dict().items():
        full = weights[name].detach().to(mesh.device_type, empty.dtype)
        if isinstance(empty, DTensor):  # every process has the whole tensor and takes its part: nothing is sent
            share = distribute_tensor(full, mesh, empty.placements, src_data_rank=None)
            shares[name] = nn.Parameter(share.clone(), requires_grad=False)  # a view would keep the whole tensor
        else:
            shares[name] = full.clone()
    network.load_state_dict(shares, assign=True)


def whole(network: nn.Module, shell: nn.Module, processes: Processes) -> nn.Module:
    """The network in one piece on the CPU, for the leader to save. Every process must call; the others get an empty shell.
    Adapters are never divided."""
    if not divided(network):
        return network
    tensors = {}
    for name, tensor in _pieces(network):
        if processes.leads:
            tensors[name] = tensor.cpu()
    return filled(shell, tensors) if processes.leads else copy.deepcopy(shell)


def filled(shell: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A network of the structure `shell` around these `weights`."""
    piece: nn.Module = copy.deepcopy(shell)
    piece.load_state_dict(weights, assign=True)
    return piece


def gathered(network: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a divided network, whole, on the CPU of this process. Every process must call."""
    return {name: tensor.cpu() for name, tensor in _pieces(network)}


def divided(network: nn.Module) -> bool:
    """Whether a network's own weights are not all here: they are sharded, or a depot has those of its blocks."""
    return isinstance(network, FSDPModule) or any(parameter.is_meta for parameter in network.parameters())


def _pieces(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a divided network, whole, one after the other."""
    if depot_of(network) is not None:
        yield from withdrawn(network)
    for name, tensor in network.state_dict().items():
        if not tensor.is_meta:
            yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def add_gradients(network: nn.Module, processes: Processes) -> None:
    """Sum the gradients of a network that every process holds whole; FSDP does this for the other networks."""
    if processes.world == 1 or isinstance(network, FSDPModule):
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _let_fsdp_see_inside() -> None:
    """FSDP's hooks search the inputs and outputs of a unit for tensors; earlier versions search registered types only."""
    for cls in (*_below(State), Prediction, Tangent):
        _register(cls)


def _below(cls: type) -> Iterator[type]:
    """Every class that inherits from `cls`, at any depth."""
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _below(child)


@cache
def _register(cls: type) -> None:
    register_dataclass(cls)
