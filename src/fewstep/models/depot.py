"""Weights of frozen blocks that are not where the blocks run: they come for a block while it runs, and go when it is done.

Each process keeps its share of every block, or a block waits in the memory of the CPU, or both. Other networks may borrow the
blocks (adapters over one frozen network). All of them share the depot, so one block is there at a time, whatever the number of
roles. In the networks the tensors have shapes and no memory (the meta device); who reads one outside of its block gets an error
of torch, and never another block's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.core.call import S, T

ALIGNED = 256
"""Bytes; every tensor of a block begins at a multiple of it, as in memory that is requested for it alone."""


class _Slot(NamedTuple):
    """Where a tensor is in its block."""

    storage: Any
    """Of the tensor without memory, and of all that borrow it."""
    share: Tensor
    """The process' share of the block, as bytes."""
    first: int
    """First byte in the block."""
    dtype: torch.dtype
    shape: torch.Size

    def view(self, block: Tensor) -> Tensor:
        size = prod(self.shape) * self.dtype.itemsize
        return block[self.first : self.first + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class Depot:
    """Keeps blocks and brings them. Gradients may flow through a block, not to what the depot brings."""

    device: torch.device
    """Where blocks run."""
    group: dist.ProcessGroup | None = None
    """Processes that keep a share of every block; each must run the same blocks in the same order. None: this one keeps all."""
    waits: bool = False
    """Whether shares wait in the memory of the CPU, pinned if a GPU reads them."""
    _slots: dict[int, _Slot] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Depot:
        """Networks that borrow weights have them from the same place."""
        return self

    def put(self, block: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Keep the `weights` of a block, by the names of its tensors, in their types there. It has no memory for them then."""
        kept = {}
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            if name in weights and id(tensor.untyped_storage()) not in self._slots:
                kept[name] = tensor
        if not kept:
            return  # another block's, of which it is a part
        first, places = 0, dict[str, int]()
        for name, tensor in kept.items():
            places[name], first = first, _rounded(first + tensor.numel() * tensor.element_size(), ALIGNED)
        size, rank = (1, 0) if self.group is None else (dist.get_world_size(self.group), dist.get_rank(self.group))
        whole = torch.zeros(_rounded(first, size * ALIGNED), dtype=torch.uint8)
        for name, tensor in kept.items():
            value = weights[name].detach().to("cpu", tensor.dtype).contiguous().view(-1).view(torch.uint8)
            whole[places[name] : places[name] + len(value)] = value
        share = self._home(whole.chunk(size)[rank])
        empty = {id(tensor): _hollow(tensor) for tensor in kept.values()}  # what two modules share, they share still
        tensors: Any
        for module in block.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: empty[id(tensor)] for name, tensor in tensors.items() if id(tensor) in empty})
        for name, tensor in kept.items():
            storage = empty[id(tensor)].untyped_storage()
            self._slots[id(storage)] = _Slot(storage, share, places[name], tensor.dtype, tensor.shape)

    def bring(self, block: nn.Module) -> dict[str, Tensor]:
        """The tensors of a block that have no memory there, by name; they go when nobody holds them. Every process of the group
        must call. ValueError for a tensor that was not put here."""
        here: dict[int, Tensor] = {}
        brought = {}
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            if tensor.is_meta:
                slot = self._slots.get(id(tensor.untyped_storage()))
                if slot is None:
                    raise ValueError(
                        f"{name} has no memory and is not in the depot: a copy of a network has other tensors; borrow them "
                        "(models.lora), or make the copy before its blocks are put away"
                    )
                if id(slot.share) not in here:
                    here[id(slot.share)] = self._fetched(slot.share)
                brought[name] = slot.view(here[id(slot.share)])
        return brought

    def around(self, block: nn.Module) -> Callable[[S], S]:
        """`block`, with its weights while it runs. If it is run again in the backward pass, they come again."""
        return partial(self._run, block)

    def reading(self, block: nn.Module, read: Callable[[nn.Module], T]) -> T:
        """What `read` finds in a block that has its weights."""
        brought = {f"block.{name}": tensor for name, tensor in self.bring(block).items()}
        found: T = functional_call(_Read(block), brought, (read,))
        return found

    @property
    def held(self) -> int:
        """Bytes of all shares that this process keeps."""
        return sum({id(slot.share): slot.share.nbytes for slot in self._slots.values()}.values())

    def _run(self, block: nn.Module, state: S) -> S:
        made: S = functional_call(block, self.bring(block), (state,))
        return made

    def _home(self, share: Tensor) -> Tensor:
        if not self.waits:
            return share.to(self.device, copy=True)  # a view would keep the whole block
        return share.pin_memory() if self.device.type == "cuda" else share.clone()

    def _fetched(self, share: Tensor) -> Tensor:
        """A whole block, as bytes on the device."""
        share = share.to(self.device, non_blocking=True, copy=self.waits)
        if self.group is None:
            return share
        whole = torch.empty(len(share) * dist.get_world_size(self.group), dtype=torch.uint8, device=self.device)
        dist.all_gather_into_tensor(whole, share, group=self.group)
        return whole


class _Read(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, read: Callable[[nn.Module], T]) -> T:
        return read(self.block)


def deposit(denoiser: Any, weights: Mapping[str, Tensor], depot: Depot) -> None:
    """Let `depot` keep the blocks of a denoiser with these `weights`, and the network the rest, on the depot's device.

    It may be hollow; its blocks are then read one after the other.
    """
    backbone, prefix = denoiser.backbone, "backbone.blocks."
    for index, block in enumerate(backbone.blocks):
        depot.put(block, _Below(f"{prefix}{index}.", weights))
    ends = {name: tensor for name, tensor in denoiser.state_dict().items() if not name.startswith(prefix)}
    own = {name: weights[name].detach().to(depot.device, tensor.dtype) for name, tensor in ends.items()}
    denoiser.load_state_dict(own, assign=True, strict=False)
    for module in denoiser.modules():  # what is in no file: tables
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(depot.device)
    backbone.depot = depot
    backbone.text_first = False  # a block's weights are there while it runs, and not before


def depot_of(network: nn.Module) -> Depot | None:
    """Where the weights of a network's blocks are; None where it has them itself."""
    depot: Depot | None = getattr(getattr(network, "backbone", None), "depot", None)
    return depot


def withdrawn(denoiser: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the blocks that a denoiser's depot keeps, by its name in the denoiser, block by block, on the depot's
    device. Every process of the group must go through all of them."""
    for index, block in enumerate(denoiser.backbone.blocks):
        for name, tensor in denoiser.backbone.depot.bring(block).items():
            yield f"backbone.blocks.{index}.{name}", tensor


class _Below(Mapping[str, Tensor]):
    """The tensors whose names begin with `prefix`, by the rest of their names; each is read when it is asked for."""

    def __init__(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        self._prefix, self._tensors = prefix, tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def _hollow(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
