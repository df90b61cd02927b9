"""Phased DMD (2510.27684): TDM that trains some steps, on an expert of their own, and leaves the others as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import Pipeline, Recipe, Stage, VideoModel
from fewstep.compress import Experts, Int8, StepScales
from fewstep.core import Batch, Call, RecipeError, Rng
from fewstep.diffusion import CFG, from_x0
from fewstep.diffusion.experts import expert_at
from fewstep.engine.phases import require_experts
from fewstep.engine.settings import Optim, Settings
from fewstep.methods import DMD2, TDM, BackwardSimulation, FlowMatching, FromPairs, Nets, Rolled
from fewstep.methods.rollouts.grids import stops
from fewstep.models.bundle import read_card
from fewstep.models.experts import Experts as ByTime
from fewstep.models.lora import Lora
from fewstep.models.source import Pretrained
from fewstep.pipeline import read
from fewstep.world.data import WorldClips
from support_engine import FRAMES, shaken, small, tiny_model
from support_gaussian import RF, SCALAR, Asked, FreeClips, GaussianTeacher, cond_of, f64, minimise, terms

pytestmark = pytest.mark.usefixtures("single_thread")
GRID = (1.0, 0.75, 0.5, 0.25)
NOISY, CLEAN = (0.5, 1.0), (0.0, 0.5)


def rollout(phase: tuple[float, float], shift: float = 1.0) -> BackwardSimulation:
    return BackwardSimulation(grids=(GRID,), mode="ode", phase=phase, shift=shift)


def phased(phase: tuple[float, float]) -> TDM:
    return TDM(rollout=rollout(phase), guidance=CFG(), interval="above", critic_updates=1)


# --- which steps, and where they land ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "steps"), [(NOISY, {0, 1}), (CLEAN, {2, 3}), ((0.25, 0.75), {1, 2})])
def test_a_rollout_stops_in_its_phase_and_lands_at_its_end(phase: tuple[float, float], steps: set[int]) -> None:
    student, batch = FreeClips((2, *SCALAR)), Batch(cond_of(1, 2), cond_of(0, 2), SCALAR)
    seen = set()
    for step in range(24):
        for shift in (1.0, 5.0):
            made = rollout(phase, shift)
            rolled = made(student, batch, Rng(0, step), grad=True)
            end = 5 * phase[0] / (1 + 4 * phase[0]) if shift == 5 else phase[0]
            assert made.landing(rolled) == pytest.approx(end, abs=1e-12)
        seen.add(rolled.exit)
    assert seen == steps
    assert rollout(phase).calls == sum(step + 1 for step in steps) / len(steps)
    assert rollout(phase).fullest == {"grid": 0, "exit": 1}


def test_without_a_phase_each_step_is_one() -> None:
    whole = BackwardSimulation(grids=(GRID,), mode="ode")
    assert stops(whole.grids, "random") == stops(whole.grids, "random", (0.0, 1.0)) == [range(4)]
    x, t = torch.zeros(1, *SCALAR), torch.ones(1)
    assert [whole.landing(Rolled(x, x, t, exit=i, grid=GRID)) for i in range(4)] == [0.75, 0.5, 0.25, 0.0]


def test_all_steps_of_a_phase_are_compared_above_its_end() -> None:
    """Also the first one, which jumps over the others; up to pure noise, not only to where the phase began."""
    method, x0, x_t = phased(CLEAN), torch.full((256, *SCALAR), 0.4).double(), torch.full((256, *SCALAR), -1.3).double()
    rolled = Rolled(x0, x_t, torch.full((256,), 0.5, dtype=torch.float64), exit=2, grid=GRID)
    noised, s = method.noised(rolled, RF, Rng(0))
    assert not s.any()
    assert float(noised.t.max()) > 0.9
    torch.testing.assert_close(noised.x_t, RF.add_noise(x0, noised.eps, noised.t))
    method, first = phased(NOISY), replace(rolled, t=rolled.t * 2, exit=0)
    noised, s = method.noised(first, RF, Rng(0))
    assert (s == 0.5).all()
    a, b = RF.between(s, noised.t, x0)
    torch.testing.assert_close(noised.x_t, a * from_x0(x0, x_t, first.t, RF).step_to(s) + b * noised.eps)


# --- the critic knows the noised states, and the student follows it -----------------------------------------------------

MEAN, STD, OFF = 0.7, 0.5, 0.3
"""The student's states at the end of the phase are the teacher's, but OFF too far."""


class Landing(FreeClips):
    """A student whose step from pure noise lands on the teacher's marginal at time 0.5, moved by OFF."""

    def __init__(self, size: int) -> None:
        super().__init__((size, *SCALAR))
        x_s = 0.5 * MEAN + OFF + (0.25 * STD**2 + 0.25) ** 0.5 * Rng(5).randn((size, *SCALAR), "landed").double()
        self.x_s = x_s

    def forward(self, x_t: Tensor, t: Tensor, *rest: object):  # type: ignore[no-untyped-def]
        prediction = super().forward(x_t, t, *rest)  # type: ignore[arg-type]
        return (
            replace(prediction, raw=(self.x_s - 0.5 / t.double().reshape(-1, 1, 1, 1, 1) * x_t) * 2 + 0 * self.clips)
            if float(t[0]) == 1.0
            else prediction
        )


def test_the_critic_of_a_phase_learns_what_clean_clips_its_states_stand_for() -> None:
    """Their mean is `MEAN + OFF / a`, which nobody has seen; the states' own mean is another."""
    size = 40_000
    method = replace(
        phased(NOISY), rollout=BackwardSimulation(grids=((1.0, 0.5),), mode="ode", phase=(0.5, 1.0)), low=0.2
    )
    critic = GaussianTeacher(f64(0, 0), STD)
    networks = Nets({"student": Landing(size), "teacher": GaussianTeacher(f64(0, MEAN), STD), "critic": critic})
    batch = Batch(cond_of(1, size), cond_of(0, size), SCALAR)
    minimise([critic.means], lambda: terms(method.critic_loss(0, networks, batch, Rng(1)))["denoising"])
    found = float(critic.means[1])
    assert found == pytest.approx(MEAN + OFF / 0.5, abs=0.03)
    assert abs(found - (0.5 * MEAN + OFF)) > 0.5


def test_the_student_is_moved_back_by_how_far_it_lands_off() -> None:
    """x0 moves against `s^2 / V OFF / a`, over DMD's distance, whatever the noise was."""
    size = 64
    method = replace(phased(NOISY), rollout=BackwardSimulation(grids=((1.0, 0.5),), mode="ode", phase=(0.5, 1.0)))
    critic, teacher = (Asked(GaussianTeacher(f64(0, m), STD).requires_grad_(False)) for m in (MEAN + OFF / 0.5, MEAN))
    student = Landing(size)
    batch = Batch(cond_of(1, size), cond_of(0, size), SCALAR)
    networks = Nets({"student": student, "teacher": teacher, "critic": critic})
    weights = replace(method, matching=replace(method.matching, weight="one"))
    made: list[Tensor] = []
    real = BackwardSimulation.__call__

    def watched(self: BackwardSimulation, *a: object, **k: object) -> Rolled:
        rolled = real(self, *a, **k)  # type: ignore[arg-type]
        rolled.x0.retain_grad()
        made.append(rolled.x0)
        return rolled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackwardSimulation, "__call__", watched)
        terms(weights.student_loss(networks, batch, Rng(0)))["matching"].backward()
    t = critic.questions[0].t.double()
    gap = t**2 / ((1 - t) ** 2 * STD**2 + t**2) * OFF / 0.5
    assert made[0].grad is not None
    torch.testing.assert_close(made[0].grad.flatten() * size, gap)


# --- experts ------------------------------------------------------------------------------------------------------------


def test_experts_begin_at_their_boundary() -> None:
    assert [expert_at((0.9, 0.5), t) for t in (1.0, 0.9, 0.8, 0.5, 0.4)] == [0, 0, 1, 1, 2]


def test_each_time_has_its_own_network() -> None:
    model = tiny_model().transformed(Experts(boundaries=(0.6, 0.3)))
    network = model.denoiser.backbone
    assert isinstance(network, ByTime)
    shaken(network)
    x, cond = Rng(0).randn((4, 4, FRAMES, 8, 8), "x"), model.text.encode(["a red ball"] * 4)
    t = torch.tensor([1.0, 0.6, 0.4, 0.1])
    made, alone = network(x, t, cond).raw, [network.expert(i)(x, t, cond).raw for i in range(3)]
    torch.testing.assert_close(made, torch.stack([alone[i][row] for row, i in enumerate((0, 0, 1, 2))]))
    assert not torch.allclose(alone[0], alone[1])


def test_experts_begin_as_the_network_that_they_are_copies_of() -> None:
    model = tiny_model()
    x, cond = Rng(0).randn((2, 4, FRAMES, 8, 8), "x"), model.text.encode(["a red ball"] * 2)
    changed = model.transformed(Int8(), Experts(boundaries=(0.5,)))
    plain = model.transformed(Int8())
    for t in (0.2, 0.9):
        times = torch.full((2,), t)
        assert torch.equal(changed.denoiser(x, times, cond).raw, plain.denoiser(x, times, cond).raw)
    mixed = torch.tensor([0.2, 0.9])
    torch.testing.assert_close(changed.denoiser(x, mixed, cond).raw, plain.denoiser(x, mixed, cond).raw)
    with pytest.raises(ValueError, match="decrease between 1 and 0"):
        Experts(boundaries=(0.3, 0.6))
    with pytest.raises(ValueError, match="there is at least one"):
        Experts(boundaries=())


def test_layers_of_experts_know_the_step() -> None:
    """Whether they were given step scales before they were experts, or after."""
    model, scales, pair = tiny_model(), StepScales(steps=4), Experts(boundaries=(0.5,))
    x, cond, t = Rng(0).randn((2, 4, FRAMES, 8, 8), "x"), model.text.encode(["a red ball"] * 2), torch.full((2,), 0.3)
    plain = model.denoiser(x, t, cond).raw
    for order in ((scales, pair), (pair, scales)):
        assert torch.equal(model.transformed(*order).denoiser(x, t, cond, Call(step=2, steps=4)).raw, plain)


# --- two phases of a recipe -----------------------------------------------------------------------------------------------

EXPERTS = Experts(boundaries=(0.6,))
SETTINGS = small(2, transforms=(EXPERTS,), ema=0.5)
DATA = WorldClips(num_frames=FRAMES)


def alone(expert: str) -> Settings:
    """An expert is trained, and the other has no gradients and no moments."""
    return replace(SETTINGS, optim={"student": Optim(lr=1e-3, only=(expert,)), "critic": Optim(lr=1e-3)})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model().save(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def trained(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("run"), Pretrained(source=str(teacher))
    stages = {
        "noisy": Stage(model=model, method=phased(NOISY), data=DATA, settings=SETTINGS),
        "clean": Stage(method=phased(CLEAN), data=DATA, settings=alone("experts.1.")),
    }
    Pipeline(stages=stages).run(folder, quiet=True)
    return folder


def weights(folder: Path, expert: int) -> dict[str, Tensor]:
    network = VideoModel.from_pretrained(folder).denoiser.backbone
    assert isinstance(network, ByTime)
    return network.expert(expert).state_dict()


def moved(now: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(now[name], before[name]) for name in before)


def test_a_phase_trains_its_own_expert_and_no_other(trained: Path, teacher: Path) -> None:
    begun = VideoModel.from_pretrained(teacher).denoiser.backbone.state_dict()
    first, last = trained / "1-noisy" / "student", trained / "2-clean" / "student"
    assert moved(weights(first, 0), begun)
    assert not moved(weights(first, 1), begun)
    assert not moved(weights(last, 0), weights(first, 0))  # bit for bit
    assert moved(weights(last, 1), begun)


def test_the_student_is_loaded_saved_and_sampled_by_its_experts(trained: Path, tmp_path: Path) -> None:
    folder = trained / "2-clean" / "student"
    card, model = read_card(folder), VideoModel.from_pretrained(folder)
    assert card.transforms == (EXPERTS,)
    assert card.parts["denoiser"].type == "VideoDiT"
    assert card.contract.trained == {4: (*GRID, 0.0)}
    latents = model.latents(["a red ball"], seed=3)
    again = VideoModel.from_pretrained(model.save(tmp_path / "again"))
    assert torch.equal(again.latents(["a red ball"], seed=3), latents)
    cond, _ = model.encode_text(["a red ball"])
    network, x = model.denoiser.backbone, None
    assert isinstance(network, ByTime)
    for step in model.sampling(["a red ball"], seed=3):
        x = step.prediction.x_t if x is None else x
        t = float(step.prediction.t[0])
        raw = network.expert(0 if t > 0.6 else 1)(x, torch.tensor([t]), cond, Call()).raw
        following = max((u for u in (*GRID, 0.0) if u < t), default=0.0)
        x = x + (following - t) * raw
    assert x is not None
    torch.testing.assert_close(x, latents, atol=1e-5, rtol=1e-5)


def test_adapters_of_each_phase_are_on_their_own_expert(teacher: Path, tmp_path: Path) -> None:
    settings = replace(alone("experts.0."), lora=Lora(rank=2), ema=0.0)
    recipe = Recipe(model=Pretrained(source=str(teacher)), method=phased(NOISY), data=DATA, settings=settings)
    recipe.run(tmp_path, quiet=True)
    begun = VideoModel.from_pretrained(teacher).denoiser.backbone.state_dict()
    assert moved(weights(tmp_path / "student", 0), begun)
    assert not moved(weights(tmp_path / "student", 1), begun)


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transforms", "phase", "words"),
    [
        ((), NOISY, "a boundary above 0.5 and at most 0.75"),
        ((Experts(boundaries=(0.8,)),), NOISY, "the step from t = 0.5.*above 0.5 and at most 0.75"),
        ((Experts(boundaries=(0.5,)),), CLEAN, "the step from t = 1, .*above 0.5 and at most 0.75"),
        ((EXPERTS,), (0.25, 0.75), "above 0.25 and at most 0.5 and one above 0.75 and at most 1"),
    ],
)
def test_a_phase_without_experts_of_its_own_is_refused(
    teacher: Path, transforms: tuple[Experts, ...], phase: tuple[float, float], words: str
) -> None:
    settings = replace(SETTINGS, transforms=transforms)
    model = Pretrained(source=str(teacher))
    with pytest.raises(ValueError, match=words):
        Recipe(model=model, method=phased(phase), data=DATA, settings=settings).check()


@pytest.mark.parametrize(
    ("phase", "optim", "expert"),
    [
        (CLEAN, Optim(only=("experts.0.",)), 1),
        (NOISY, Optim(only=("experts.1.",)), 0),
        (NOISY, Optim(only=("experts.1.", "experts.0."), frozen=("experts.0.",)), 0),
    ],
)
def test_a_phase_whose_expert_is_not_trained_is_refused(
    teacher: Path, phase: tuple[float, float], optim: Optim, expert: int
) -> None:
    recipe = Recipe(
        model=Pretrained(source=str(teacher)), method=phased(phase), data=DATA,
        settings=replace(SETTINGS, optim={"student": optim}),
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"those of expert {expert}, .*write only: \[experts\.{expert}\.\]"):
        recipe.check()
    for fits in (Optim(only=(f"experts.{expert}.",)), Optim(only=("blocks",)), Optim(frozen=("experts.0.blocks.0.",))):
        replace(recipe, settings=replace(SETTINGS, optim={"student": fits})).check()


def test_phases_that_leave_steps_to_nobody_are_refused(teacher: Path) -> None:
    """Where a stage trains a phase again, or none comes for it; not where the student was distilled before."""
    noisy = Stage(model=Pretrained(source=str(teacher)), method=phased(NOISY), data=DATA, settings=SETTINGS)
    clean, again = replace(noisy, model=None, method=phased(CLEAN)), replace(noisy, model=None)
    whole = replace(noisy, method=TDM(rollout=BackwardSimulation(grids=(GRID,), mode="ode"), guidance=CFG()))
    flow = replace(noisy, method=FlowMatching())
    for wrong in ((noisy,), (noisy, again), (flow, again)):
        with pytest.raises(RecipeError, match=r"steps from t = 0\.5, 0\.25 .* phases [ab] \[0\.5, 1\.0\]"):
            Pipeline(stages=dict(zip("ab", wrong, strict=False))).check()
    with pytest.raises(RecipeError, match=r"steps from t = 1, 0\.75 "):
        Pipeline(stages={"clean": replace(clean, model=noisy.model)}).check()
    for fits in ((noisy, clean), (noisy, again, clean), (flow, again, clean), (whole, again)):
        Pipeline(stages=dict(zip("abc", fits, strict=False))).check()
    first = {
        "stages.clean.method.rollout.phase": "[0.67, 1.0]",
        "stages.clean.settings.optim.student.only": "[experts.0.]",
    }
    with pytest.raises(RecipeError, match=r"no stage trains the steps from t = 0\.67, 0\.5 "):
        read("leaderboard/phased_dmd", list(first.items())).check()


def test_weight_decay_would_move_the_other_experts(teacher: Path) -> None:
    decaying = replace(SETTINGS, optim={"student": Optim(weight_decay=0.01)})
    recipe = Recipe(model=Pretrained(source=str(teacher)), method=phased(NOISY), data=DATA, settings=decaying)
    with pytest.raises(ValueError, match="weight decay moves the experts of other phases"):
        recipe.check()
    replace(recipe, settings=replace(decaying, lora=Lora(rank=2))).check()  # adapters that nothing trains stay zero


def test_a_regression_would_train_the_other_experts(teacher: Path) -> None:
    held, card = DMD2(rollout=rollout(NOISY), guidance=CFG(), anchor=0.25), read_card(teacher)
    with pytest.raises(
        ValueError, match=r"trains the step from t = 0\.5, which is not of the phase .* method.anchor: 0"
    ):
        require_experts(held, SETTINGS, card)
    require_experts(replace(held, anchor=0.0), SETTINGS, card)
    require_experts(replace(held, anchor_rollout=FromPairs(grids=((1.0, 0.75),))), SETTINGS, card)


def test_phases_that_no_step_begins_are_refused() -> None:
    for phase in ((0.6, 1.0), (0.0, 0.2), (0.5, 0.5)):
        with pytest.raises(ValueError, match="a phase"):
            rollout(phase)
