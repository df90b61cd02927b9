"""AVDM2 on the real AnimateDiff and Stable Diffusion classes, at tiny size: the whole algorithm, with both noise tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from fewstep.core import Batch, Rng
from fewstep.data.base import Data, Source
from fewstep.diffusion import CFG, Betas, Uniform
from fewstep.engine import Optim, Settings
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare
from fewstep.methods import AVDM2, Adversary, BackwardSimulation
from fewstep.models import VideoModel
from fewstep.models.source import Diffusers
from fewstep.recipe import Recipe
from support_unets import animatediff, stable_diffusion

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ("a red cat", "two dogs")


@dataclass(frozen=True, kw_only=True)
class NoisyClips(Data):
    """Prompts, and latents that are noise."""

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "x0"})

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        class Drawn:
            def batch(self, size: int, rng: Rng) -> Batch:
                shape = model.latent_shape()
                cond, uncond = model.encode_text(PROMPTS[:size])
                return Batch(cond, uncond, shape, prompts=PROMPTS[:size], x0=rng.randn((size, *shape), "clips"))

        return Drawn()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for name, make in {"animatediff": animatediff, "stable_diffusion": stable_diffusion}.items():
        make().save_pretrained(tmp_path / name)
    method = AVDM2(
        image_teacher=Diffusers(source=str(tmp_path / "stable_diffusion")),
        rollout=BackwardSimulation(grids=((1.0, 0.5),)), frames=2, guidance=CFG(scale=3.0),
        adversary=Adversary(weight=0.01, density=Uniform(high=0.5), layers=(0, 1, 3), head="joint"),
    )  # fmt: skip
    critics = Optim(lr=1e-3, weight_decay=0.01)
    optim = {
        "student": Optim(lr=1e-4, lr_of={"motion_modules": 1e-3}),
        "image_critic": critics,
        "discriminator": critics,
    }
    settings = Settings(steps=2, batch=2, health=None, optim=optim)
    model = Diffusers(source=str(tmp_path / "animatediff"), num_frames=3)
    return Recipe(model=model, method=method, data=NoisyClips(), settings=settings)


def test_the_whole_algorithm_runs(recipe: Recipe, tmp_path: Path) -> None:
    recipe.check()
    run = prepare(recipe.model.load(), recipe.method, recipe.data, recipe.settings, tmp_path / "run")
    nets: Any = run.nets
    assert nets.teacher.path == nets.student.path == Betas(schedule="linear")
    assert nets.image_teacher.path == nets.image_critic.path == Betas(schedule="scaled_linear")
    before = {role: {k: v.clone() for k, v in net.state_dict().items()} for role, net in nets.items()}
    for _ in range(2):
        run.iterate()
    moved = {
        role
        for role, net in nets.items()
        if any(not torch.equal(v, before[role][k]) for k, v in net.state_dict().items())
    }
    assert moved == {"student", "image_critic", "discriminator"}
    steps = {r: {int(s["step"]) for s in o.parts["adamw"].state.values()} for r, o in run.optimizers.items()}
    assert steps == {"student": {2}, "image_critic": {4}, "discriminator": {4}}
    assert {"loss/matching", "loss/adversarial", "loss/denoising", "loss/discriminator"} <= run.figures.keys()
    assert run.student().card.contract.times() == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_is_planned_without_weights(recipe: Recipe, whole: bool) -> None:
    """Its updates are measured on other networks in test_memory.py; both U-Nets without weights take long."""
    outline = Outline.of(recipe.check(), recipe.method, recipe.settings)
    holdings = outline.plan().holdings if whole else outline._holdings()
    held = {holding.role: holding for holding in holdings}
    assert held["image_teacher"].trained == 0 < held["image_critic"].trained < held["student"].trained
