"""AVDM2: what reaches which frame, on which noise path, through which frozen network; and another model as a role."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fewstep.core import Batch, Call, Cond, Rng
from fewstep.diffusion import CFG, VP, Prediction, target
from fewstep.diffusion.path import broadcast
from fewstep.engine import CheckpointError, train
from fewstep.engine.checkpoint import checkpoints
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare
from fewstep.engine.run import Run
from fewstep.methods import AVDM2, Adversary, BackwardSimulation, Nets, in_forwards
from fewstep.methods.frames import fold_frames
from fewstep.models import JointHead, Lora, TextEncoder, VideoModel
from fewstep.models.lora import adapters
from fewstep.recipe import Recipe
from support_engine import Everything, TinyImages, small, tiny_model
from support_gaussian import (
    ONE_STEP,
    RF,
    Asked,
    Counting,
    FreeClips,
    GaussianTeacher,
    MeanHead,
    cond_of,
    conds_of,
    f64,
    terms,
)

pytestmark = pytest.mark.usefixtures("single_thread")
B, F, K = 3, 5, 2
SHAPE = (2, F, 3, 4)
VIDEO, IMAGE = RF, VP()
METHOD = AVDM2(
    image_teacher=TinyImages(), rollout=ONE_STEP, frames=K, guidance=CFG(scale=2.5), score_weight=0.7, adversary=None
)
ENGINE = AVDM2(image_teacher=TinyImages(), frames=2, rollout=BackwardSimulation(grids=((1.0, 0.5),)))


def batch_of(shape: tuple[int, ...] = SHAPE, x0: Tensor | None = None) -> Batch:
    return Batch(cond_of(1, B), cond_of(0, B), shape, x0=x0)  # type: ignore[arg-type]


def gaussian_nets(critic: float = 0.4) -> Nets:
    student, image = FreeClips((B, *SHAPE)), GaussianTeacher(f64(-0.2, 0.7), 0.4, IMAGE)
    networks = {"student": student, "teacher": GaussianTeacher(f64(5, 5), 0.1, VIDEO), "image_teacher": image}
    return Nets(networks | {"image_critic": GaussianTeacher(f64(9.0, critic), 0.4, IMAGE)})


def posterior_mean(x_t: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    c = IMAGE.at(t, x_t)
    return mean + c.a * std**2 / (c.a**2 * std**2 + c.s**2) * (x_t - c.a * mean)


# --- frames -----------------------------------------------------------------------------------------------------------


def test_scores_reach_the_chosen_frames_only_and_have_the_stated_value() -> None:
    nets = gaussian_nets()
    terms(METHOD.student_loss(nets, batch_of(), Rng(0)))["matching"].backward()
    clips, rng = nets.student.clips.detach(), Rng(0).fold("student")
    number = torch.arange(B * F).reshape(B, 1, F, 1, 1).expand(B, *SHAPE)
    chosen = fold_frames(number, K, rng)[0][:, 0, 0, 0, 0]
    frames = clips.transpose(1, 2).flatten(0, 1)[chosen].unsqueeze(2)
    s, eps = METHOD.score_density.sample(B * K, rng), rng.randn(frames.shape, "eps")
    x_s = IMAGE.add_noise(frames, eps, s)
    real = posterior_mean(x_s, s, -0.2 + 2.5 * (0.7 - -0.2), 0.4)
    weight = 1 / ((frames - real).abs().flatten(1).mean(1) + 1e-5)
    expected = torch.zeros(B * F, *frames.shape[1:], dtype=torch.float64)
    gap = posterior_mean(x_s, s, 0.4, 0.4) - real
    expected[chosen] = 0.7 * broadcast(weight, gap) * gap / frames.numel()
    got = nets.student.clips.grad.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(got, expected.squeeze(2), rtol=1e-9, atol=1e-14)
    others = torch.ones(B * F, dtype=torch.bool).index_fill(0, chosen, False)
    assert others.sum() == B * (F - K) and not got[others].any()
    assert all(bool(frame.any()) for frame in got[chosen])


def test_equal_scores_give_no_gradient() -> None:
    nets = gaussian_nets(critic=0.7)
    terms(replace(METHOD, guidance=CFG()).student_loss(nets, batch_of(), Rng(0)))["matching"].backward()
    assert not nets.student.clips.grad.any()


def test_frames_are_drawn_anew_and_score_networks_see_single_frames() -> None:
    nets = gaussian_nets()
    nets = Nets({role: Counting(net) if role.startswith("image") else net for role, net in nets.items()})
    seen = set()
    for step in range(6):
        nets.student.clips.grad = None
        terms(METHOD.student_loss(nets, batch_of(), Rng(0, step)))["matching"].backward()
        seen.add(tuple(nets.student.clips.grad.flatten(3).any(3).any(1).flatten().tolist()))
    assert len(seen) == 6
    assert {tuple(x.shape) for role in ("image_teacher", "image_critic") for _, x, _ in nets[role].calls} == {
        (B * K, 2, 1, 3, 4), (2 * B * K, 2, 1, 3, 4)
    }  # fmt: skip
    assert not any(grad for role in ("image_teacher", "image_critic") for grad, _, _ in nets[role].calls)


class FrameStudent(nn.Module):
    """Every frame has its own mean, all have one deviation."""

    def __init__(self, offsets: Tensor, std: float) -> None:
        super().__init__()
        self.offsets, self.std, self.path = nn.Parameter(offsets), std, VIDEO

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        return Prediction(self.std * x_t + self.offsets[:, None, None], "x0", x_t, t, self.path)


class ExactImageCritic(nn.Module):
    """The best critic that does not know which frame it sees: of the mixture of all frames' Gaussians."""

    def __init__(self, student: FrameStudent) -> None:
        super().__init__()
        self.student, self.path = [student], IMAGE

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *rest: Any) -> Prediction:
        student = self.student[0]
        means, c = student.offsets.detach(), IMAGE.at(t, x_t)
        variance = c.a**2 * student.std**2 + c.s**2
        away = x_t[..., None] - c.a[..., None] * means
        share = torch.softmax(-away.square() / (2 * variance[..., None]), -1)
        x0 = (share * (means + (c.a * student.std**2 / variance)[..., None] * away)).sum(-1)
        return Prediction(x0, "x0", x_t, t, self.path)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_all_frames_reach_the_guided_mean_of_the_image_teacher(scale: float) -> None:
    student = FrameStudent(f64(-1.0, 0.2, 0.9, 2.0), 0.5)  # wider than the teacher: only equal means are best
    image = GaussianTeacher(f64(-0.2, 0.7), 0.4, IMAGE).requires_grad_(False)
    nets = Nets({"student": student, "image_teacher": image, "image_critic": ExactImageCritic(student)})
    method = replace(METHOD, guidance=CFG(scale=scale), frames=3)
    optimiser = torch.optim.Adam([student.offsets], lr=0.03)
    for step in range(500):
        if step == 400:
            optimiser.param_groups[0]["lr"] = 0.003
        optimiser.zero_grad()
        terms(method.student_loss(nets, batch_of((1, 4, 8, 8)), Rng(0, step)))["matching"].backward()
        optimiser.step()
    torch.testing.assert_close(
        student.offsets.detach(), torch.full((4,), image.guided_mean(scale)).double(), rtol=0, atol=0.02
    )


def test_score_networks_see_every_frame_with_its_clips_condition() -> None:
    labels = [0, 1, 1]
    batch = replace(batch_of(), cond=conds_of(labels), uncond=cond_of(2, B))
    nets = gaussian_nets()
    means = f64(-0.2, 0.7, 5.0)
    teacher, critic = GaussianTeacher(means, 0.4, IMAGE), GaussianTeacher(means + 1, 0.4, IMAGE)
    nets = Nets({**nets, "image_teacher": Asked(teacher), "image_critic": Asked(critic)})
    losses = terms(METHOD.student_loss(nets, batch, Rng(0)))
    (real,), (fake,) = nets.image_teacher.questions, nets.image_critic.questions
    each = [label for label in labels for _ in range(K)]
    assert real.labels == each + [2] * B * K and fake.labels == each
    assert torch.equal(real.x_t[: B * K], fake.x_t) and torch.equal(real.t[: B * K], fake.t)
    assert losses.keys() == {"matching"}
    loss = terms(METHOD.critic_loss(0, nets, batch, Rng(0)))["denoising"]
    learnt = nets.image_critic.questions[1]
    assert learnt.labels == each and learnt.grad and len(nets.image_teacher.questions) == 1
    s, answer = learnt.t, critic(learnt.x_t, learnt.t, conds_of(each))
    drawn = fold_frames(nets.student.clips.detach(), K, Rng(0).fold("critic/0")).clips
    c = IMAGE.at(s, drawn)
    eps = (learnt.x_t - c.a * drawn) / c.s
    assert abs(float(eps.std()) - 1) < 0.2
    torch.testing.assert_close(loss, (answer.raw - target(answer.kind, drawn, eps, s, IMAGE)).square().mean())


def test_every_turn_of_the_critic_draws_new_clips() -> None:
    nets = gaussian_nets()
    nets = Nets({**nets, "student": Asked(nets.student)})
    for update in replace(METHOD, critic_updates=2).updates(0):
        terms(update.losses(nets, batch_of(), Rng(0)))
    inputs = [question.x_t for question in nets.student.questions]
    assert len(inputs) == 3 and not any(torch.equal(a, b) for i, a in enumerate(inputs) for b in inputs[:i])


# --- the discriminator ------------------------------------------------------------------------------------------------


@pytest.fixture
def adversarial() -> tuple[AVDM2, Nets, Batch]:
    """A real video teacher and head, with clips for a student."""
    method, model = AVDM2(score="none", rollout=ONE_STEP, critic_updates=1), tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = JointHead([24, 24])
        conditions = (Cond(torch.randn(B, 4, 16), torch.ones(B, 4, dtype=torch.bool)) for _ in range(2))
    student = FreeClips((B, 4, F, 4, 4)).float()
    nets = Nets({"student": student, "teacher": model.denoiser, "discriminator": head})
    for role, network in nets.items():
        network.requires_grad_(role == "student")
    return method, nets, Batch(*conditions, (4, F, 4, 4), x0=Rng(0).randn((B, 4, F, 4, 4), "x0"))


def test_gradient_flows_through_the_frozen_encoder_and_leaves_none_there(adversarial: Any) -> None:
    method, nets, batch = adversarial
    loss = terms(method.student_loss(nets, batch, Rng(0)))["adversarial"]
    loss.backward()
    assert nets.student.clips.grad.flatten(1).any(1).all()
    assert all(p.grad is None for role in ("teacher", "discriminator") for p in nets[role].parameters())


def test_real_and_made_have_their_own_times_and_noise_on_the_video_path(
    adversarial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, nets, batch = adversarial
    calls: list[tuple[Tensor, Tensor]] = []
    features = nets.teacher.features

    def noted(x_t: Tensor, t: Tensor, *rest: Any) -> list[Tensor]:
        calls.append((x_t, t))
        return features(x_t, t, *rest)

    monkeypatch.setattr(nets.teacher, "features", noted)
    nets.discriminator.requires_grad_(True)
    terms(method.critic_loss(0, nets, batch, Rng(0)))["discriminator"].backward()
    for (x_t, t), clean, name in zip(calls, (batch.x0, nets.student.clips.detach()), ("real", "fake"), strict=True):
        rng = Rng(0).fold("critic/0").fold(name)
        assert float(t.min()) >= 0 and float(t.max()) <= 0.5
        torch.testing.assert_close(x_t, VIDEO.add_noise(clean, rng.randn(clean.shape, "eps"), t))
    assert not torch.equal(calls[0][1], calls[1][1])
    assert nets.student.clips.grad is None and all(p.grad is None for p in nets.teacher.parameters())
    assert all(p.grad is not None for p in nets.discriminator.parameters())


def test_the_discriminator_looks_on_the_video_path_with_the_clips_own_conditions() -> None:
    labels = [0, 1, 1]
    batch = replace(batch_of(x0=Rng(0).randn((B, *SHAPE), "x0").double() + 2), cond=conds_of(labels))
    nets = gaussian_nets()
    nets = Nets({**nets, "teacher": Asked(nets.teacher), "discriminator": MeanHead()})
    method = replace(METHOD, adversary=replace(AVDM2().adversary, weight=0.3))
    losses = terms(method.critic_loss(0, nets, batch, Rng(0)))
    loss = terms(method.student_loss(nets, batch, Rng(0)))["adversarial"]
    real, made, again = nets.teacher.questions
    assert real.labels == made.labels == again.labels == labels
    clips = nets.student.clips.detach()
    for question, clean in ((real, batch.x0), (made, clips), (again, clips)):
        t = question.t.double().reshape(-1, 1, 1, 1, 1)
        assert abs(float(((question.x_t - (1 - t) * clean) / t).std()) - 1) < 0.15, "noised on the video teacher's path"
    d_real, d_made, d_again = (question.x_t.flatten(1).mean(1) for question in (real, made, again))
    torch.testing.assert_close(losses["discriminator"], softplus(-d_real).mean() + softplus(d_made).mean())
    torch.testing.assert_close(loss, 0.3 * softplus(-d_again).mean())


def test_a_better_discriminator_tells_them_apart(adversarial: Any) -> None:
    method, nets, batch = adversarial
    optimiser = torch.optim.Adam(nets.discriminator.requires_grad_(True).parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimiser.zero_grad()
        loss = terms(method.critic_loss(0, nets, replace(batch, x0=batch.x0 * 0.3 + 1), Rng(0, step)))["discriminator"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.386, abs=0.4)
    assert losses[-1] < 0.5 * losses[0]
    clips = (batch.x0 * 0.3 + 1, nets.student.clips.detach())
    t = torch.full((len(batch),), 0.2, dtype=torch.float64)
    shown = (nets.teacher.path.add_noise(x, Rng(1).randn(x.shape, "eps"), t) for x in clips)
    real, made = (method.adversary.logits(nets, x_t, t, batch.cond).detach() for x_t in shown)
    assert float(real.mean()) > 1 and float(made.mean()) < -1, "large logits mean real"


# --- fields -----------------------------------------------------------------------------------------------------------


def test_fields_say_who_is_there_and_what_is_read() -> None:
    assert set(ENGINE.aux()) == {"image_teacher", "image_critic", "discriminator"}
    assert set(AVDM2().aux()) == {"image_critic", "discriminator"}
    assert set(AVDM2(score="video").aux()) == {"critic", "discriminator"}
    assert set(AVDM2(score="none").aux()) == {"discriminator"}
    assert set(AVDM2(adversary=None).aux()) == {"image_critic"}
    assert AVDM2().needs == {"prompts", "x0"} and AVDM2(adversary=None).needs == {"prompts"}
    assert [update.roles for update in ENGINE.updates(0)] == [("image_critic", "discriminator")] * 2 + [("student",)]
    assert in_forwards(AVDM2().cost()) == "9.5, 9 of 4 frames, 6 of the first 2 blocks"
    assert in_forwards(AVDM2(score="video").cost()) == "18.5, 6 of the first 2 blocks"
    assert in_forwards(AVDM2(score="none", critic_updates=1).cost()) == "7, 4 of the first 2 blocks"
    assert [AVDM2().critic, AVDM2(score="video").critic, AVDM2(score="none").critic] == ["image_critic", "critic", None]
    for wrong, said in (
        ({"score": "none", "adversary": None}, "no loss is left; set one"),
        ({"score_weight": 0.0}, "score_weight must be more than 0"),
        ({"score": "video", "image_teacher": TinyImages()}, "does not use an image teacher"),
        ({"frames": 0}, "at least 1"),
        ({"adversary": Adversary()}, "adversary.density is null"),
    ):
        with pytest.raises(ValueError, match=said):
            AVDM2(**wrong)


# --- in a run ---------------------------------------------------------------------------------------------------------


def steps_of(run: Run, role: str) -> int:
    slots: Iterator[dict[str, Tensor]] = iter(run.optimizers[role].parts["adamw"].state.values())
    return int(next(slots)["step"])


def test_critics_make_two_steps_for_each_of_the_student(tmp_path: Path) -> None:
    run = prepare(tiny_model(), ENGINE, Everything(), small(3), tmp_path)
    before = {role: {k: v.clone() for k, v in net.state_dict().items()} for role, net in run.nets.items()}
    for _ in range(3):
        run.iterate()
    assert {role: steps_of(run, role) for role in run.optimizers} == {
        "student": 3,
        "image_critic": 6,
        "discriminator": 6,
    }
    moved = {
        r for r, net in run.nets.items() if any(not torch.equal(v, before[r][k]) for k, v in net.state_dict().items())
    }
    assert moved == {"student", "image_critic", "discriminator"}


def test_another_model_is_checked_and_not_stored(tmp_path: Path) -> None:
    settings = small(4, save_every=2)
    student = train(tiny_model(), ENGINE, Everything(), settings, tmp_path, quiet=True)
    name, print_ = student.card.provenance["image_teacher"].split()
    assert (name, print_) == ("tiny", TinyImages().load().fingerprint("denoiser"))
    names = {path.name for path in checkpoints(tmp_path / "checkpoints")[-1].iterdir()}
    assert "image_critic" in names and not {"image_teacher", "teacher"} & names

    @dataclass(frozen=True, kw_only=True)
    class Retrained(TinyImages):
        def load(self, leave: Any = (), parts: Any = ()) -> VideoModel:
            return TinyImages(seed=8).load()

    with pytest.raises(CheckpointError, match="image_teacher weights was"):
        train(tiny_model(), replace(ENGINE, image_teacher=Retrained()), Everything(), settings, tmp_path, quiet=True)


def test_another_models_latents_and_text_must_fit() -> None:
    @dataclass(frozen=True, kw_only=True)
    class OtherWords(TinyImages):
        def load(self, leave: Any = (), parts: Any = ()) -> VideoModel:
            return tiny_model().with_part("text", TextEncoder(width=32, depth=1, heads=2))

    recipe = Recipe(model=TinyImages(), method=ENGINE, data=Everything(), settings=small(1))
    recipe.check()
    with pytest.raises(ValueError, match="'tiny' has text states of width 32, and 'tiny' 16"):
        replace(recipe, method=replace(ENGINE, image_teacher=OtherWords())).check()


def test_the_plan_counts_another_model() -> None:
    plan = Outline.of(TinyImages().card(), ENGINE, small(2)).plan()
    held = {holding.role: holding for holding in plan.holdings}
    assert held["image_teacher"].trained == 0 and held["image_critic"].trained == held["image_teacher"].parameters > 0
    by_roles = {phase.roles: phase for phase in plan.phases}
    assert "image_teacher" in by_roles["student",].reads
    assert "image_teacher" not in by_roles["image_critic", "discriminator"].reads


def test_adapters_of_the_image_critic_are_over_the_image_teacher(tmp_path: Path) -> None:
    run = prepare(tiny_model(), ENGINE, Everything(), small(1, lora=Lora(rank=2)), tmp_path)
    layers = adapters(run.nets.image_critic)
    assert layers and set(adapters(run.nets.student)) == set(layers)
    name, layer = next(iter(layers.items()))
    assert torch.equal(layer.weight, run.nets.image_teacher.get_submodule(name).weight)
    assert not torch.equal(layer.weight, run.nets.teacher.get_submodule(name).weight)
    run.iterate()


def test_a_recipe_names_its_image_teacher(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {type: Pretrained}\nmethod: {type: AVDM2, image_teacher: {type: Pretrained, source: nowhere}}\n"
        "data: {type: WorldClips}\nsettings: {steps: 1}\n"
    )
    with pytest.raises(FileNotFoundError, match="nowhere: no card.json"):
        Recipe.load(path).check()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tool_measures_students(
    load_tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Both tables of docs/avdm2.md, with a row for the teacher, one at fewer steps, and one for each student."""
    monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path), "--prompts", "2", "--steps", "2", "again=world"])
    assert load_tool("measure_avdm2").main() == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows == ["", "---", "teacher 50", "teacher 2", "again"] * 2
    assert (tmp_path / "clips.gif").stat().st_size > 1000
