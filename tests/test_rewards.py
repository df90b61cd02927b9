"""Rewards: how good clips are, and the two ways in which methods hold them: as weights of clips, or as a gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.core import Batch, Rng
from fewstep.diffusion import CFG, Uniform
from fewstep.engine.compared import require_judged
from fewstep.engine.nets import build_nets
from fewstep.engine.prepare import prepare, require_possible
from fewstep.methods import (
    AVDM2,
    DMD2,
    GRPO,
    AdversarialDistillation,
    Adversary,
    BackwardSimulation,
    Consistency,
    Feedback,
    FromData,
    FromLow,
    Making,
    Method,
    MotionReward,
    Nets,
    ReverseKL,
    Reward,
    Reweighting,
    Rolled,
    Rollout,
    SelfForced,
    StreamingLong,
    WorldReward,
)
from fewstep.metrics import motion
from fewstep.models import VideoModel
from fewstep.world.checker import indices
from fewstep.world.data import WorldClips
from fewstep.world.grammar import sample_scenes
from fewstep.world.renderer import Variation, render
from support_engine import FRAMES, small, stored_card, tiny_model
from support_gaussian import (
    ONE_STEP,
    AffineTableStudent,
    Asked,
    ExactCritic,
    FreeClips,
    GaussianTeacher,
    MeanHead,
    Plain,
    cond_of,
    conds_of,
    f64,
    terms,
)

pytestmark = pytest.mark.usefixtures("single_thread")
B, SHAPE = 3, (3, 4, 4, 4)
METHOD = DMD2(rollout=ONE_STEP, guidance=CFG())


@dataclass(frozen=True, kw_only=True)
class Fixed(Reward):
    """A reward by the number of the clip."""

    values: tuple[float, ...] = (0.0, 0.0, 0.0)

    def score(self, frames: Tensor, batch: Batch, nets: Nets) -> Tensor:
        return f64(*self.values) + 0 * frames.flatten(1).sum(1)


@dataclass(frozen=True, kw_only=True)
class Linear(Reward):
    """`slope` times the mean of the frames."""

    slope: float = 1.0

    def score(self, frames: Tensor, batch: Batch, nets: Nets) -> Tensor:
        return self.slope * frames.flatten(1).mean(1)


def fixed(*values: float, **others: float) -> Reweighting:
    return Reweighting(reward=Fixed(values=values), **others)


def gradient(reweighting: Reweighting | None) -> Tensor:
    student = FreeClips((B, *SHAPE))
    teacher, critic = GaussianTeacher(f64(-0.2, 0.7, 1.5), 0.4), GaussianTeacher(f64(0.3, -0.6, 0.1), 0.5)
    nets = Nets({"student": student, "teacher": teacher, "critic": critic, "codec": Plain()})
    batch = Batch(conds_of([1, 2, 1]), cond_of(0, B), SHAPE)
    terms(replace(METHOD, reweighting=reweighting).student_loss(nets, batch, Rng(0)))["matching"].backward()
    assert student.clips.grad is not None
    return student.clips.grad


def test_each_clips_gradient_is_weighted_by_exp_r_over_beta_and_nothing_else() -> None:
    """Also where r depends on the clip and autograd could follow it."""
    values = (0.3, -0.1, 0.2)
    weight = (f64(*values) / 0.5).exp()
    weight = weight / weight.mean()
    expected = gradient(None) * weight.reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(gradient(fixed(*values, beta=0.5)), expected)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_where_all_clips_are_as_good_it_is_dmd_bit_for_bit(value: float) -> None:
    assert torch.equal(gradient(fixed(value, value, value, beta=0.01)), gradient(None))


def test_weights_have_mean_one_also_when_limited_and_never_overflow() -> None:
    score = torch.linspace(0, 1, 5).double()
    weights = Reweighting(beta=1.0, limit=10.0).weights(score)
    assert float(weights.mean()) == pytest.approx(1) and float(weights[4] / weights[0]) == pytest.approx(2.718281828)
    hard = Reweighting(beta=1e-4, limit=4.0).weights(score)
    assert hard.tolist() == [0.25, 0.25, 0.25, 0.25, 4.0]
    for size in (2, 8):
        weights = Reweighting(beta=1e-4, limit=4.0).weights(torch.linspace(0, 1, size).double())
        assert float(weights.mean()) == pytest.approx(1), "one clip far better than the others"
        assert float(weights[-1] / weights[0]) == pytest.approx(min(size, 4) * 4)
    assert torch.allclose(Reweighting().weights(score + 1e6), Reweighting().weights(score), atol=1e-6)


def test_motion_is_measured_on_the_decoded_clip_with_its_past() -> None:
    seen = list[Tensor]()

    class Double(Plain):
        def decode(self, latents: Tensor) -> Tensor:
            seen.append(latents)
            return 2 * latents

    x0 = (0.1 * Rng(0).randn((2, *SHAPE), "x")).requires_grad_(True)
    past = 0.1 * Rng(0).randn((2, 3, 1, 4, 4), "past")
    rolled = Rolled(x0, x0, torch.ones(2), past=past)
    reward, nets = Reweighting(beta=0.05), Nets({"codec": Double()})
    batch = Batch(cond_of(1, 2), cond_of(0, 2), SHAPE)
    found = reward.keep(rolled, batch, nets)
    assert torch.equal(seen[0], rolled.clip) and not found.requires_grad
    weights = reward.weights(motion((2 * rolled.clip.detach()).clamp(-1, 1))).float()
    torch.testing.assert_close(found, weights[:, None] * torch.tensor([0.0, 1.25, 1.25, 1.25, 1.25]))
    alone = reward.keep(Rolled(x0, x0, torch.ones(2)), batch, nets)
    assert alone.shape == (2, 1)


def test_a_single_frame_has_no_motion() -> None:
    with pytest.raises(ValueError, match="one frame has no motion"):
        MotionReward().score(torch.zeros(2, 3, 1, 4, 4), Batch(cond_of(1, 2), cond_of(0, 2), SHAPE), Nets({}))


def test_a_reward_sees_frames_as_they_are_shown() -> None:
    """A decoder may leave [-1, 1], where every picture ends: brighter than white pleases nobody more."""
    latents = torch.full((2, *SHAPE), 0.5, dtype=torch.float64)
    latents[1] = 7.0
    latents.requires_grad_()
    r = Linear().of(latents, Batch(cond_of(1, 2), cond_of(0, 2), SHAPE), Nets({"codec": Plain()}))
    torch.testing.assert_close(r.detach(), f64(0.5, 1.0))
    r.sum().backward()
    assert latents.grad is not None and (latents.grad[0] > 0).all() and (latents.grad[1] == 0).all()


def test_what_cannot_count_is_refused() -> None:
    with pytest.raises(ValueError, match="raise settings.batch"):
        Reweighting().weights(torch.zeros(1))
    with pytest.raises(ValueError, match="limit must be more than 1"):
        Reweighting(limit=1.0)
    with pytest.raises(ValueError, match="beta must be more than 0"):
        Reweighting(beta=0.0)
    with pytest.raises(
        ValueError, match="MotionReward needs 2 frames .*, got frames: 1; write frames: 2, or 0 for all"
    ):
        Feedback(frames=1, reward=MotionReward())
    with pytest.raises(ValueError, match="WorldReward needs 8 frames .*, got frames: 7; write frames: 8, or 0 for all"):
        Feedback(frames=7)  # of which it tells no direction
    assert (Feedback(frames=2, reward=MotionReward()).frames, Feedback(frames=8).frames) == (2, 8)


@pytest.mark.parametrize("held", [DMD2(reweighting=Reweighting()), Consistency(feedback=Feedback()), GRPO()])
def test_a_reward_of_a_model_without_a_codec_is_refused_before_any_weight(held: Method) -> None:
    card = stored_card(tiny_model())
    require_judged(held, card)
    blind = replace(card, parts={name: part for name, part in card.parts.items() if name != "codec"})
    require_judged(DMD2(), blind)
    with pytest.raises(
        ValueError, match=f"{type(held).__name__} looks at decoded frames, .*'tiny' has no codec; take a model with"
    ):
        require_judged(held, blind)
    with pytest.raises(ValueError, match="has no codec"):
        require_possible(held, small(2), blind, None)


def test_feedback_on_more_frames_than_there_are_is_refused_before_any_weight() -> None:
    card, longer = stored_card(tiny_model()), Feedback(reward=MotionReward(), frames=FRAMES + 1)
    for method in (DMD2, Consistency):
        require_judged(method(feedback=Feedback(reward=MotionReward(), frames=FRAMES)), card)
        with pytest.raises(
            ValueError, match=f"{FRAMES + 1}, and a clip of 'tiny' has {FRAMES} latent .* at most {FRAMES}, or"
        ):
            require_judged(method(feedback=longer), card)
    require_judged(DMD2(rollout=StreamingLong(), feedback=longer), card)  # a stream's stretch has a length of its own


def test_a_run_decodes_with_a_copy_that_is_neither_trained_nor_kept(tmp_path: Path) -> None:
    model = tiny_model()
    run = prepare(
        model,
        DMD2(critic_updates=1, reweighting=Reweighting()),
        WorldClips(num_frames=FRAMES),
        small(1, health=None),
        tmp_path,
    )
    before = [p.clone() for p in run.nets["codec"].parameters()]
    run.iterate()
    assert all(torch.equal(a, b) for a, b in zip(run.nets["codec"].parameters(), before, strict=True))
    assert run.nets["codec"] is not model.codec and "codec" not in run.changing
    bare = VideoModel(model.card, {name: part for name, part in model.parts.items() if name != "codec"})
    with pytest.raises(ValueError, match="no autoencoder"):
        build_nets(bare, DMD2(reweighting=Reweighting()), 0)


# --- a reward that looks at the prompt ---------------------------------------------------------------------------------


def judged(clips: Tensor, labels: Tensor) -> Tensor:
    judge = WorldReward().networks["judge"].make("judge", Making(roles={})).requires_grad_(False)
    nets = Nets({"judge": judge.requires_grad_(False)})
    return WorldReward().score(clips, Batch(cond_of(1, 1), cond_of(0, 1), SHAPE, labels=labels), nets)


def test_the_worlds_reward_is_the_mean_log_probability_of_what_the_prompt_says() -> None:
    """True clips are close to 0, the best; with the attributes of another clip they are far below. The gradient leads there."""
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(4, generator)
    clips, labels = render(scenes, Variation.sample(4, generator), 16), indices(scenes)
    right, wrong = judged(clips, labels), judged(clips, labels.roll(1, 0))
    assert right.shape == (4,) and float(right.min()) > -0.3 and float((right - wrong).min()) > 1
    judge = WorldReward().networks["judge"].make("judge", Making(roles={})).requires_grad_(False)
    logits = judge.classify(clips)
    by_hand = [sum(float(x.log_softmax(1)[i, labels[i, k]]) for k, x in enumerate(logits)) / 6 for i in range(4)]
    torch.testing.assert_close(right.detach(), torch.tensor(by_hand))
    grey = torch.zeros(4, 3, 16, 32, 32).requires_grad_(True)
    judged(grey, labels).sum().backward()
    assert grey.grad is not None
    step = 0.5 * grey.grad / grey.grad.flatten(1).norm(dim=1).reshape(4, 1, 1, 1, 1)
    assert bool((judged(grey.detach() + step, labels) > judged(grey.detach(), labels)).all())


def test_who_reads_the_prompt_refuses_clips_with_prompts_of_their_own() -> None:
    with pytest.raises(ValueError, match="take MotionReward, or a rollout of whole clips"):
        DMD2(rollout=StreamingLong(), feedback=Feedback())
    with pytest.raises(ValueError, match="take MotionReward, or a rollout of whole clips"):
        DMD2(rollout=StreamingLong(), reweighting=Reweighting(reward=WorldReward()))
    assert DMD2(rollout=StreamingLong(), reweighting=Reweighting()).needs >= {"prompts"}
    assert DMD2(feedback=Feedback()).needs == {"prompts", "labels"}
    assert DMD2(rollout=SelfForced(), feedback=Feedback(reward=MotionReward())).needs == {"prompts"}


# --- its gradient ------------------------------------------------------------------------------------------------------


def test_feedback_is_the_gradient_of_the_reward_through_the_last_call_alone() -> None:
    """Beside the matching, whose gradient stays what it was; per clip `- weight / B dr/dx`, of decoded frames."""

    class Half(Plain):
        def decode(self, latents: Tensor) -> Tensor:
            return latents / 100

    def losses(method: DMD2) -> tuple[dict[str, Tensor], FreeClips]:
        student = FreeClips((B, *SHAPE))
        teacher, critic = GaussianTeacher(f64(-0.2, 0.7, 1.5), 0.4), GaussianTeacher(f64(0.3, -0.6, 0.1), 0.5)
        nets = Nets({"student": student, "teacher": teacher, "critic": critic, "codec": Half()})
        return terms(method.student_loss(nets, Batch(conds_of([1, 2, 1]), cond_of(0, B), SHAPE), Rng(0))), student

    feedback = Feedback(reward=Linear(slope=3.0), weight=0.2)
    both, student = losses(replace(METHOD, feedback=feedback))
    alone, _ = losses(METHOD)
    assert torch.equal(both["matching"], alone["matching"])
    both["reward"].backward()
    count = student.clips[0].numel()
    expected = torch.full_like(student.clips, -0.2 * 3.0 / 100 / (B * count))
    torch.testing.assert_close(student.clips.grad, expected)
    value = -0.2 * 3.0 * student.clips.detach().mean() / 100
    assert float(both["reward"].detach()) == pytest.approx(float(value))


@pytest.mark.parametrize("path", ["good", "bad"])
def test_above_the_ceiling_there_is_no_gradient(path: str) -> None:
    """Each clip by itself: those above are left alone, those below move as without a ceiling."""
    x0 = torch.full((2, *SHAPE), 0.1).double().requires_grad_(True)
    level = {"good": 0.05, "bad": 0.15}[path]
    feedback = Feedback(reward=Linear(), weight=2.0, ceiling=level)
    batch = Batch(cond_of(1, 2), cond_of(0, 2), SHAPE)
    loss = feedback.loss(x0, batch, Nets({"codec": Plain()}), Rng(0))
    loss.backward()
    assert x0.grad is not None
    if path == "good":
        assert float(loss.detach()) == 0 and not x0.grad.any()
    else:
        assert float(loss.detach()) == pytest.approx(2 * 0.05)
        torch.testing.assert_close(x0.grad, torch.full_like(x0, -2.0 / x0.numel()))


def test_only_the_chosen_neighbouring_frames_are_decoded() -> None:
    seen = list[Tensor]()

    class Watching(Plain):
        def decode(self, latents: Tensor) -> Tensor:
            seen.append(latents)
            return latents

    x0 = torch.arange(5.0).reshape(1, 1, 5, 1, 1).expand(2, 3, 5, 2, 2) / 10
    batch, nets = Batch(cond_of(1, 2), cond_of(0, 2), SHAPE), Nets({"codec": Watching()})
    for step in range(30):
        Feedback(reward=Linear(), frames=2).loss(x0, batch, nets, Rng(0, step))
    shown = {tuple((10 * x[0, 0, :, 0, 0]).round().int().tolist()) for x in seen}
    assert shown == {(0, 1), (1, 2), (2, 3), (3, 4)}
    Feedback(reward=Linear()).loss(x0, batch, nets, Rng(0))
    assert seen[-1].shape[2] == 5
    with pytest.raises(ValueError, match="feedback.frames is 6, and a clip has 5"):
        Feedback(reward=Linear(), frames=6).loss(x0, batch, nets, Rng(0))


@pytest.mark.parametrize("slope", [0.5, -1.0])
def test_the_fixed_point_of_feedback_and_matching_is_where_their_gradients_cancel(slope: float) -> None:
    """Student and teacher are Gaussians of one deviation v: matching at time t moves the mean with s^2 (mu - m) / V, with
    `V = a^2 v^2 + s^2`, so with a linear reward of slope c the mean comes to rest at `m + lambda c / mean(s^2 / V)`."""
    std, mean, weight, size = 0.1, 0.2, 0.05, 8

    def slope_at(mu: float) -> float:
        student = AffineTableStudent((1.0,)).fill([(std, mu)])
        nets = Nets({
            "student": student, "teacher": GaussianTeacher(f64(0.0, mean), std).requires_grad_(False),
            "critic": ExactCritic(student), "codec": Plain(),
        })  # fmt: skip
        method = replace(
            METHOD, matching=ReverseKL(weight="one"), feedback=Feedback(reward=Linear(slope=slope), weight=weight)
        )
        losses = terms(method.student_loss(nets, Batch(cond_of(1, size), cond_of(0, size), (1, 1, 1, 1)), Rng(0)))
        torch.stack(list(losses.values())).sum().backward()
        assert student.offset.grad is not None
        return float(student.offset.grad)

    t = METHOD.score_density.sample(size, Rng(0).fold("student")).double()
    share = float((t**2 / ((1 - t) ** 2 * std**2 + t**2)).mean())
    rest = mean + weight * slope / share
    assert slope_at(rest) == pytest.approx(0, abs=1e-8)
    assert slope_at(mean) == pytest.approx(-weight * slope, rel=1e-6)
    assert slope_at(rest + 0.1) == pytest.approx(0.1 * share, rel=1e-6)


def test_consistency_with_feedback_is_consistency_and_the_reward_of_its_prediction() -> None:
    def losses(feedback: Feedback | None) -> tuple[dict[str, Tensor], AffineTableStudent]:
        method = Consistency(intervals=2, steps=(1,), guidance=CFG(), feedback=feedback)
        student = AffineTableStudent((1.0, 0.5)).fill([(0.1, 0.2), (0.3, 0.1)])
        teacher = GaussianTeacher(f64(0.0, 0.3), 0.1)
        nets = Nets({"student": student, "teacher": teacher, "target": student, "codec": Plain()})
        batch = Batch(cond_of(1, 4), cond_of(0, 4), (1, 1, 1, 1), x0=0.1 * Rng(0).randn((4, 1, 1, 1, 1), "x0").double())
        return terms(method.student_loss(nets, batch, Rng(0))), student

    alone, _ = losses(None)
    both, student = losses(Feedback(reward=Linear(slope=2.0), weight=0.5))
    assert both["consistency"] == alone["consistency"] and set(both) == {"consistency", "reward"}
    both["reward"].backward()
    assert student.offset.grad is not None
    assert float(student.offset.grad.sum()) == pytest.approx(-0.5 * 2.0)
    assert Consistency(feedback=Feedback()).needs == {"prompts", "x0", "labels"}
    assert set(Consistency(feedback=Feedback()).aux()) == {"target", "codec", "judge"}


# --- calls divided by noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "scored", "judged"), [(0.0, [1, 1], [1, 1]), (0.5, [1, 0], [0, 1]), (0.7, [1, 0], [0, 1])]
)
def test_high_calls_learn_from_scores_alone_and_low_ones_from_the_discriminator_alone(
    split: float, scored: list[int], judged: list[int]
) -> None:
    """Flash-DMD: at the exits 1.0 and 0.5, whether each loss reaches the student's clips. Exactly at the split it is D's."""
    method = DMD2(
        rollout=BackwardSimulation(grids=((1.0, 0.5),)), guidance=CFG(), adversary=Adversary(weight=1.0, split=split)
    )
    for exit in (0, 1):
        rng = next(r for r in (Rng(0, s) for s in range(20)) if r.fold("student").integer("exit", 2) == exit)
        for name, reached in (("matching", scored), ("adversarial", judged)):
            student = FreeClips((B, *SHAPE))
            teacher = Asked(GaussianTeacher(f64(-0.2, 0.7, 1.5), 0.4))
            nets = Nets({
                "student": student, "teacher": teacher, "critic": GaussianTeacher(f64(0.3, -0.6, 0.1), 0.5),
                "discriminator": MeanHead(),
            })  # fmt: skip
            batch = Batch(conds_of([1, 2, 1]), cond_of(0, B), SHAPE, x0=Rng(3).randn((B, *SHAPE), "x0").double())
            student.zero_grad()
            terms(method.student_loss(nets, batch, rng))[name].backward()
            moved = student.clips.grad is not None and bool(student.clips.grad.any())
            assert moved == bool(reached[exit]), (name, exit)


def test_a_split_divides_the_frames_of_a_clip_by_their_own_times() -> None:
    x0 = torch.ones(2, 1, 3, 1, 1, requires_grad=True)
    t = torch.tensor([[0.9, 0.5, 0.2], [0.4, 0.6, 0.7]])
    high, low = Adversary(split=0.5).divided(x0, t)
    (high.sum() + 10 * low.sum()).backward()
    assert x0.grad is not None
    assert x0.grad[:, 0, :, 0, 0].tolist() == [[1, 10, 10], [10, 1, 1]] and torch.equal(high, low)


def test_a_split_without_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="write split: 0"):
        AVDM2(adversary=Adversary(density=Uniform(), split=0.5))
    with pytest.raises(ValueError, match="write split: 0"):
        AdversarialDistillation(adversary=Adversary(density=Uniform(), split=0.5))
    with pytest.raises(ValueError, match="StreamingLong goes on with clips"):
        DMD2(rollout=StreamingLong(), adversary=Adversary(split=0.5))


@pytest.mark.parametrize(
    ("rollout", "split", "fits"),
    [
        (BackwardSimulation(), 0.01, 0.25),
        (BackwardSimulation(), 1.0, 0.75),
        (BackwardSimulation(grids=((1.0,),)), 0.9, None),
        (BackwardSimulation(shift=5.0), 0.5, 0.625),  # the last step of 0.25 begins at 0.625
        (BackwardSimulation(exit="last"), 0.5, None),
        (BackwardSimulation(mode="ode", phase=(0.5, 1.0)), 0.5, 0.75),
        (FromData(grids=((1.0,), (1.0, 0.5))), 0.3, 0.5),
        (SelfForced(exit="last"), 0.5, None),
        (FromLow(), 0.3, None),
    ],
)
def test_a_split_that_divides_nothing_is_refused(rollout: Rollout, split: float, fits: float | None) -> None:
    """One of the two would never move the student. The times are those after the shift."""
    with pytest.raises(ValueError, match=rf"split is {split}, and the last calls of the rollout .*after the shift"):
        DMD2(rollout=rollout, adversary=Adversary(split=split))
    if fits is not None:
        DMD2(rollout=rollout, adversary=Adversary(split=fits))


def test_the_ceiling_is_that_of_each_clip() -> None:
    """A clip that is good enough is left alone beside one that is not, and does not make up for it."""
    x0 = torch.stack([torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.1)]).double().requires_grad_(True)
    feedback = Feedback(reward=Linear(), weight=2.0, ceiling=0.15)
    loss = feedback.loss(x0, Batch(cond_of(1, 2), cond_of(0, 2), SHAPE), Nets({"codec": Plain()}), Rng(0))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 * 0.05 / 2)
    assert not x0.grad[0].any() and bool((x0.grad[1] < 0).all())
