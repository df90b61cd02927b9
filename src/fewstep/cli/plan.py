"""`--dry-run`: what a recipe would train, computed on networks that have shapes but no memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fewstep.cli.screen import screen, table
from fewstep.engine.nets import build_nets, trained_roles
from fewstep.models.bundle import Card, VideoModel
from fewstep.models.source import outline
from fewstep.recipe import Recipe


def show(recipe: Recipe, output: Path) -> int:
    card = recipe.check()
    out = screen()
    model = outline(card)
    out.print(
        f"recipe {recipe.hash}: {type(recipe.method).__name__} on {card.name}, would write {output}", markup=False
    )
    heads = ("role", "network", "parameters", "trained", "weights, gradients, optimiser")
    out.print(table(heads, roles(recipe, model)))
    out.print(table(("\nshapes", ""), shapes(recipe, card, model)))
    settings = recipe.settings
    clips = settings.batch * settings.accumulate
    work = f"{recipe.method.cost():g} forward-equivalents per clip and iteration"
    out.print(f"\n{settings.steps} iterations of {clips} clips, {work}")
    out.print("nothing was loaded or written")
    return 0


def roles(recipe: Recipe, model: VideoModel) -> list[tuple[str, ...]]:
    """One row per role, and one per part of the model that no role trains."""
    with torch.device("meta"):
        nets = dict(build_nets(model, recipe.method, recipe.settings.seed))
    trained = set(trained_roles(recipe.method, recipe.settings.steps))
    if recipe.settings.ema > 0:
        nets["student average"] = nets["student"]
    nets |= {name: part for name, part in model.parts.items() if name != recipe.method.part}
    return [_row(role, network, role in trained) for role, network in nets.items()]


def shapes(recipe: Recipe, card: Card, model: VideoModel) -> list[tuple[str, str]]:
    """Shapes of what flows through a run, by name."""
    batch = recipe.settings.batch
    frames = getattr(recipe.data, "num_frames", None) or card.num_frames
    rows = [("frames [B, 3, F, H, W]", str([batch, 3, frames, card.height, card.width]))]
    if "codec" in model.parts:
        rows.append(
            ("latents [B, C, F, h, w]", str([batch, *model.codec.latent_shape(frames, card.height, card.width)]))
        )
    if "text" in model.parts:
        rows.append(("text states [B, L, D]", str([batch, model.text.length, model.text.width])))
    if "denoiser" in model.parts:
        contract = recipe.method.contract(card.contract)
        grids = {steps: [round(t, 4) for t in times] for steps, times in contract.grids.items()}
        rows.append(
            (
                "sampled with",
                f"{contract.solver}, guidance {contract.guidance.scale:g}, times {grids or 'of any number'}",
            )
        )
    return rows


def _row(role: str, network: nn.Module, trained: bool) -> tuple[str, ...]:
    count = sum(p.numel() for p in network.parameters())
    copies = 4 if trained else 1  # weights, gradients and two moments, all float32
    inner = getattr(network, "backbone", network)
    return (
        role,
        type(inner).__name__,
        f"{count:,}",
        "yes" if trained else "no",
        f"{4 * copies * count / 2**20:,.1f} MiB",
    )
