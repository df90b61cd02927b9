"""Optimisers of one role, and the learning rate of a step as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.engine.settings import Optim


class RoleOptimizer:
    """The optimiser(s) of one role: AdamW, or Muon on the blocks' matrices and AdamW on the rest.

    ValueError where Muon is asked for and the network has no such matrices.
    """

    def __init__(self, network: nn.Module, optim: Optim, steps: int) -> None:
        self.optim, self.steps, self.network = optim, steps, network
        self.parts: dict[str, torch.optim.Optimizer] = {}
        matrices, others = _split(network) if optim.type == "muon" else ([], list(network.parameters()))
        if optim.type == "muon":
            if not matrices:
                raise ValueError(
                    f"muon works on the matrices inside `blocks`, and this {type(network).__name__} has none; "
                    "give its role an entry of type adamw in settings.optim"
                )
            # match_rms_adamw gives Muon's update the RMS of AdamW's, so that one learning rate serves both (2502.16982).
            self.parts["muon"] = torch.optim.Muon(
                matrices, lr=optim.lr, weight_decay=optim.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        self.parts["adamw"] = torch.optim.AdamW(others, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)

    def clip(self) -> Tensor:
        """Scale the role's gradient to the largest norm allowed; its norm before. ValueError if there is no gradient."""
        if all(parameter.grad is None for parameter in self.network.parameters()):
            raise ValueError(f"no loss of this update depends on the {type(self.network).__name__} it should train")
        return nn.utils.clip_grad_norm_(self.network.parameters(), self.optim.clip)

    def step(self, step: int) -> float:
        """Update with the learning rate of iteration `step`, which is returned, and clear the gradient."""
        rate = learning_rate(self.optim, step, self.steps)
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)
        return rate

    def state(self) -> dict[str, Tensor]:
        """Every optimiser tensor by `<optimiser>/<slot>/<parameter name>`."""
        names = {id(p): name for name, p in self.network.named_parameters()}
        return {
            f"{kind}/{slot}/{names[id(p)]}": value
            for kind, part in self.parts.items()
            for p, slots in part.state.items()
            for slot, value in slots.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        parameters = dict(self.network.named_parameters())
        for key, value in state.items():
            kind, slot, name = key.split("/", 2)
            device = "cpu" if slot == "step" else parameters[name].device  # torch counts steps on the CPU
            self.parts[kind].state[parameters[name]][slot] = value.to(device)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of 0-based iteration `step` out of `steps`."""
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


def matrices_of(network: nn.Module) -> list[nn.Parameter]:
    """What Muon would work on."""
    return _split(network)[0]


def _split(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside `blocks`, and all other parameters (embeddings, heads, vectors, modulation tables)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = "blocks." in name and parameter.ndim == 2 and name.endswith("weight")
        (matrices if inside else others).append(parameter)
    return matrices, others
