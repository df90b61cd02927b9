"""Optimisers of one role, the memory of their states, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.engine.memory import EIGHT_BIT, eight_bit_bytes, optimizer_bytes
from fewstep.engine.muon import Muon
from fewstep.engine.settings import Optim


class RoleOptimizer:
    """The optimiser(s) of one role: AdamW, also with moments of 8 bits, or Muon on the blocks' matrices and AdamW on the rest.

    ValueError if Muon is asked for and the network has no such matrices, if 8 bits are and its weights are divided over
    processes, or if `lr_of`, `only` or `frozen` names no parameter of it.
    """

    def __init__(self, network: nn.Module, optim: Optim, steps: int, *, rest: bool = False) -> None:
        """With `rest`, the optimiser's tensors stay on the CPU between steps."""
        self.optim, self.steps, self.network, self.rest = optim, steps, network, rest
        self.parts: dict[str, torch.optim.Optimizer] = {}
        require_named(network, optim)
        self.trained = chosen(network, optim)
        matrices, others = _split(self.trained) if optim.type == "muon" else ({}, self.trained)
        if optim.type == "muon":
            if not matrices:
                raise ValueError(
                    f"muon works on the matrices inside `blocks`, and this {type(network).__name__} trains none; "
                    "give its role an entry of type adamw in settings.optim"
                )
            self.parts["muon"] = Muon(_groups(matrices, optim), lr=optim.lr, weight_decay=optim.weight_decay)
        if optim.type in EIGHT_BIT:
            self.parts[optim.type] = _eight_bit(others, optim)
        elif others:  # there are none with adapters, which are all matrices inside `blocks`
            # fused: one kernel does the whole update of a weight, three times as fast on a CPU as the default
            self.parts["adamw"] = torch.optim.AdamW(
                _groups(others, optim), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
            )

    def clip(self) -> Tensor:
        """Scale the role's gradient down to the largest norm allowed, and return its norm before that. ValueError without
        a gradient."""
        if all(parameter.grad is None for parameter in self.trained.values()):
            raise ValueError(
                f"this update trains {type(self.network).__name__}, and no loss of the update depends on it; "
                "correct the method's `updates`"
            )
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # the norm over all shards; each process scales its own shard
        nn.utils.clip_grads_with_norm_(list(self.trained.values()), self.optim.clip, norm)
        return norm

    def step(self, step: int) -> float:
        """Update the weights, clear the gradient, and return the learning rate of iteration `step`, which was used."""
        rate = learning_rate(self.optim, step, self.steps)
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = rate * group["share"]
            if self.rest:
                self._move(part, None)
            part.step()
            if self.rest:
                self._move(part, "cpu")
            part.zero_grad(set_to_none=True)
        return rate

    def _move(self, part: torch.optim.Optimizer, where: str | None) -> None:
        """Move every tensor to the device `where`, or each to the device of its parameter."""
        for parameter, slots in part.state.items():
            for slot, value in slots.items():
                slots[slot] = value.to(where or parameter.device)

    def state(self) -> dict[str, Tensor]:
        """Every optimiser tensor by `<optimiser>/<slot>/<parameter name>`."""
        names = {id(p): name for name, p in self.trained.items()}
        return {
            f"{kind}/{slot}/{names[id(p)]}": value
            for kind, part in self.parts.items()
            for p, slots in part.state.items()
            for slot, value in slots.items()
        }

    def allocate(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Make empty optimiser tensors for the keys of an earlier `state`, in place; the caller fills them.

        Keys of parameters that this role does not train are left out.
        """
        for kind, slot, name in (key.split("/", 2) for key in keys):
            if kind in self.parts and name in self.trained:
                parameter = self.trained[name]
                if kind in EIGHT_BIT:
                    self.parts[kind].begin(parameter)  # type: ignore[attr-defined]
                    continue
                empty = torch.zeros((), device=parameter.device) if slot == "step" else torch.zeros_like(parameter)
                self.parts[kind].state[parameter][slot] = empty.requires_grad_(False)
        return self.state()


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of iteration `step`, counted from 0, out of `steps`. A decay reaches 0 one iteration after the last."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / (optim.warmup + 1)
    progress = (step - optim.warmup) / max(1, steps - optim.warmup)
    match optim.decay:
        case "constant":
            return optim.lr
        case "linear":
            return optim.lr * (1 - progress)
        case "cosine":
            return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


def chosen(network: nn.Module, optim: Optim) -> dict[str, nn.Parameter]:
    """The parameters of a network that `optim` trains, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if optim.trains(name)}


def begin(network: nn.Module, optim: Optim | None) -> None:
    """Ready for an update: what `optim` trains has gradients, and nothing else; None: the network is frozen."""
    network.requires_grad_(False).train(optim is not None)
    for parameter in chosen(network, optim).values() if optim is not None else ():
        parameter.requires_grad_(True)


def state_bytes(network: nn.Module, optim: Optim) -> int:
    """Bytes of the moments that the optimiser of a whole network keeps."""
    trained = chosen(network, optim)
    sizes = [p.numel() for p in trained.values()]
    if optim.type in EIGHT_BIT:
        return eight_bit_bytes(sizes)
    matrices = _split(trained)[0].values() if optim.type == "muon" else ()
    return optimizer_bytes(sum(sizes), momentum_only=sum(p.numel() for p in matrices))


def require_named(network: nn.Module, optim: Optim) -> None:
    """Refuse (ValueError) parameters that `network` lacks, two learning rates for one, or none to train."""
    names = [name for name, _ in network.named_parameters()]
    for field in ("lr_of", "only", "frozen"):
        for key in getattr(optim, field):
            if not any(key in name for name in names):
                raise ValueError(
                    f"{field}: no parameter of this {type(network).__name__} has {key!r} in its name, as "
                    f"{names[len(names) // 2]} has; a role without an entry in settings.optim takes the student's"
                )
    if not any(optim.trains(name) for name in names):
        raise ValueError(
            f"only and frozen leave no parameter of this {type(network).__name__} to train; shorten frozen, or add to only"
        )
    for name in names:
        if len(found := [key for key in optim.lr_of if key in name]) > 1:
            raise ValueError(
                f"lr_of: {' and '.join(found)} are both part of the name {name}; use keys of which only one fits a name"
            )


def _eight_bit(named: Mapping[str, nn.Parameter], optim: Optim) -> torch.optim.Optimizer:
    if any(isinstance(parameter, DTensor) for parameter in named.values()):
        raise ValueError(
            f"settings.optim: {optim.type} keeps blocks of whole weights, and processes divide the weights of this network; "
            "write type: adamw, which divides its states, or train adapters (settings.lora: {}), which stay whole"
        )
    from fewstep.engine.eightbit import EightBitAdamW

    return EightBitAdamW(
        _groups(named, optim), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay,
        paged=optim.type == "paged_adamw8bit",
    )  # fmt: skip


def _groups(named: Mapping[str, nn.Parameter], optim: Optim) -> list[dict[str, Any]]:
    """Parameters grouped by learning rate; `share` is a group's rate divided by `optim.lr`, which the schedule changes."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        rate = next((rate for key, rate in optim.lr_of.items() if key in name), optim.lr)
        groups.setdefault(rate / optim.lr, []).append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in groups.items()]


def _split(named: Mapping[str, nn.Parameter]) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Matrices inside `blocks`, and all other parameters (embeddings, heads, vectors, modulation tables)."""
    matrices: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in named.items():
        inside = "blocks." in name and parameter.ndim == 2 and name.endswith("weight")
        (matrices if inside else others)[name] = parameter
    return matrices, others
