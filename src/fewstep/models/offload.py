"""Networks, and blocks of a denoiser, that wait in the memory of the CPU until they work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.core.call import Place, Runner, S

Weights = dict[str, Tensor]


def bring(parts: Mapping[str, nn.Module], names: tuple[str, ...], device: torch.device, *, whole: bool = True) -> None:
    """Put the networks of these `names` on the device, after all others have made room; if not `whole`, a denoiser without
    its blocks, which a `Blockwise` runner brings.
    """
    for name in sorted(parts, key=lambda name: name in names):
        wanted = device if name in names else torch.device("cpu")
        if name == "denoiser" and not whole:
            for tensor in _ends(parts[name]):
                tensor.data = tensor.data.to(wanted)
        elif next(parts[name].parameters(), torch.empty(0)).device != wanted:
            parts[name].to(wanted)


def pin(denoiser: nn.Module) -> None:
    """Keep the blocks where a GPU reads them while it computes."""
    for tensor in (*denoiser.backbone.blocks.parameters(), *denoiser.backbone.blocks.buffers()):  # type: ignore[union-attr]
        tensor.data = tensor.data.pin_memory()


class Blockwise:
    """A runner that brings the weights of each block to the device: those of the next one while a block runs. At most two
    blocks are there at a time, and nothing is written on the network.

    For one run of sampling of the network with these `blocks`; `inner` runs them.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, inner: Runner) -> None:
        self.blocks, self.device, self.inner = blocks, device, inner
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: tuple[int, Weights] | None = None

    def __call__(self, block: Callable[[S], S], state: S, place: Place) -> S:
        weights = self._brought(place.layer)
        following = (place.layer + 1) % place.layers  # after the last block the next call begins
        self._coming = following, self._copied(following)
        return self.inner(partial(functional_call, self.blocks[place.layer], weights), state, place)

    def _brought(self, layer: int) -> Weights:
        if self._coming is None or self._coming[0] != layer:
            self._coming = None  # before its room is needed
            self._coming = layer, self._copied(layer)
        weights = self._coming[1]
        if self._beside is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self._beside)
            for tensor in weights.values():
                tensor.record_stream(here)
        return weights

    def _copied(self, layer: int) -> Weights:
        block = self.blocks[layer]
        tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        if self._beside is None:
            return {name: tensor.detach().to(self.device, copy=True) for name, tensor in tensors.items()}
        with torch.cuda.stream(self._beside):
            return {name: tensor.detach().to(self.device, non_blocking=True) for name, tensor in tensors.items()}


def _ends(denoiser: nn.Module) -> list[Tensor]:
    """What is not in its blocks."""
    named = (*denoiser.named_parameters(), *denoiser.named_buffers())
    return [tensor for name, tensor in named if not name.startswith("backbone.blocks.")]
