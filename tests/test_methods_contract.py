"""What every method promises, on a tiny real network: who moves, who does not, and that randomness is a function."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core import Batch, Cond, Pairs, Rng
from fewstep.core.build import build, dump
from fewstep.diffusion import (
    CFG,
    DDIM,
    DENSITIES,
    Contract,
    Heun,
    RectifiedFlow,
    Renoise,
    Shifted,
    Uniform,
    uniform_grid,
)
from fewstep.methods import (
    AVDM2,
    DMD2,
    GRPO,
    HISTORIES,
    MATCHINGS,
    METHODS,
    PSO,
    REWARDS,
    ROLLOUTS,
    AdversarialDistillation,
    Adversary,
    Alternating,
    BackwardSimulation,
    Consistency,
    Copy,
    FDivergence,
    Feedback,
    Fisher,
    FlowMatching,
    FromData,
    FromLow,
    KnowledgeDistillation,
    LatentPixel,
    Making,
    Method,
    MomentMatching,
    MotionReward,
    Nets,
    Progressive,
    ProgressiveAdversarial,
    ReadAttributes,
    Reconstruction,
    ReverseKL,
    Reweighting,
    Role,
    ScoreImplicit,
    Scorers,
    Sync,
    TimeAwareDistillation,
    TransitionMatching,
    Update,
)  # fmt: skip
from fewstep.methods.frames import fold_frames
from fewstep.methods.rollouts import NESTED
from fewstep.models.autoencoder import FrameAutoencoder
from fewstep.models.denoiser import Denoiser
from fewstep.models.features import ClipFeatures
from fewstep.models.text import TextEncoder
from fewstep.models.video_dit import VideoDiT
from support_engine import TinyImages
from support_gaussian import ONE_STEP, terms

B, SHAPE, SIZES = 2, (4, 3, 4, 4), (3, 5, 2, 2, 2, 2)
METHOD_NAMES = {
    cls.__name__: cls for cls in (*METHODS, *MATCHINGS, Adversary, *ROLLOUTS, *HISTORIES, *REWARDS, *DENSITIES)
}
CASES: dict[str, Method] = {cls.__name__: cls() for cls in METHODS} | {
    "FlowMatching-images": FlowMatching(image_fraction=1.0, images_per_clip=2, cond_drop=0.5),
    "ReadAttributes-features": ReadAttributes(of="features"),
    "Progressive-unguided": Progressive(stages=((1, 5),), guidance=CFG()),
    "Consistency-unguided": Consistency(guidance=CFG(), skip=3),
    "DMD2-gan": DMD2(critic_updates=2, adversary=Adversary(r1=1.0, layers=(0, -1))),
    "DMD2-one-step": DMD2(critic_updates=1, rollout=ONE_STEP),
    "DMD2-three-grids": DMD2(critic_updates=1, rollout=BackwardSimulation(grids=NESTED, shift=3.0, mode="ode")),
    "DMD2-data": DMD2(critic_updates=1, rollout=FromData()),
    "DMD2-low": DMD2(critic_updates=1, rollout=FromLow(noise=None)),
    "LatentPixel-pixels": LatentPixel(latents=0.0, pixels=1.0, motion=1.0),
    "TimeAwareDistillation-sharp": TimeAwareDistillation(rollout=FromLow(), teacher_steps=0, adversary=None),
    "DMD2-anchor": DMD2(critic_updates=1, anchor=0.25),
    "DMD2-motion": DMD2(critic_updates=1, matching=ReverseKL(motion=0.2)),
    "DMD2-reweighting": DMD2(critic_updates=1, reweighting=Reweighting()),
    "DMD2-feedback": DMD2(critic_updates=1, feedback=Feedback(reward=MotionReward(), ceiling=1.0, frames=2)),
    "DMD2-split": DMD2(critic_updates=1, adversary=Adversary(split=0.5)),
    "Consistency-feedback": Consistency(feedback=Feedback(reward=MotionReward())),
    "PSO": PSO(beta=1.0),  # networks as unlike as here are far on the flat side of a larger one
    "PSO-online": PSO(reward=MotionReward(), candidates=3),
    "Alternating-group": Alternating(distillation=DMD2(critic_updates=1), reinforcement=GRPO(refresh=1), ratio=1),
    "DMD2-align": DMD2(critic_updates=1, align=0.03),
    "DMD2-f-divergence": DMD2(critic_updates=1, adversary=Adversary(), matching=FDivergence()),
    "DMD2-relativistic": DMD2(critic_updates=1, adversary=Adversary(loss="relativistic", r2=1.0, density=Uniform())),
    "DMD2-hinge": DMD2(critic_updates=1, adversary=Adversary(loss="hinge", head="joint")),
    "AdversarialDistillation-block": AdversarialDistillation(adversary=Adversary(head="block", density=Uniform())),
    "AdversarialDistillation-frames": AdversarialDistillation(adversary=Adversary(head="frames", density=Uniform())),
    "DMD2-sid": DMD2(critic_updates=1, matching=Fisher(alpha=1.2), critic_guidance=CFG(scale=3.0)),
    "DMD2-sim": DMD2(critic_updates=1, matching=ScoreImplicit()),
    "DMD2-weak": DMD2(critic_updates=1, scorers=Scorers(weak=0.25)),
    "APT": AdversarialDistillation(
        rollout=BackwardSimulation(grids=((1.0,),)),
        adversary=Adversary(trained=True, clean=True, density=Uniform(), r1=1.0),
    ),
    "AVDM2-image-teacher": AVDM2(image_teacher=TinyImages(), frames=2),
    "AVDM2-video-score": AVDM2(score="video"),
    "AVDM2-adversarial-only": AVDM2(score="none"),
    "AVDM2-score-only": AVDM2(adversary=None, guidance=CFG()),
}
cases = pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())


def roles_of(events: Iterable[Update | Sync]) -> list[tuple[str, ...]]:
    return [event.roles for event in events if isinstance(event, Update)]


def roles(method: Method, step: int) -> list[tuple[str, ...]]:
    """Who is trained in the updates of an iteration."""
    return roles_of(method.updates(step))


def shaken(network: nn.Module) -> nn.Module:
    """Off every zero initialisation, so that all gradients exist."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return network


def part(name: str) -> nn.Module:
    match name:
        case "codec":
            return shaken(FrameAutoencoder(latent_channels=4, width=8, depth=1))
        case "text":
            return shaken(TextEncoder(width=16, depth=1, heads=2, attribute_sizes=SIZES))
        case "features":
            return shaken(ClipFeatures(width=8, attribute_sizes=SIZES))
    backbone = VideoDiT(channels=4, width=24, depth=2, heads=2, text_width=16)
    return shaken(Denoiser(backbone, RectifiedFlow(), "flow"))


def new(name: str, role: Role, roles: dict[str, nn.Module]) -> nn.Module:
    made = role.make(name, Making(roles=roles, codec=part("codec")))
    return shaken(made) if role.trainable else made


def make_nets(method: Method) -> Nets:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        roles = {"teacher": part(method.part), "student": part(method.part)}
        for role, recipe in method.aux().items():
            borrows = recipe.origin is not None or recipe.source is not None  # of the shaken kind, too
            roles[role] = part(method.part) if borrows else new(role, recipe, roles)
    return Nets({role: network.requires_grad_(False) for role, network in roles.items()})


def make_batch(needs: frozenset[str]) -> Batch:
    """Only what `needs` names is there: a method that reads more fails."""
    rng = Rng(0)
    prompts = ("a red ball", "a blue box moves left")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        text = TextEncoder(width=16, depth=1, heads=2)
        cond, uncond = text.encode(prompts), text.encode(["", ""])
    return Batch(
        cond, uncond, SHAPE,
        prompts=prompts if "prompts" in needs else (),
        x0=rng.randn((B, *SHAPE), "x0") if "x0" in needs else None,
        low=rng.randn((B, *SHAPE), "low") if "low" in needs else None,
        pairs=Pairs(rng.randn((B, 5, *SHAPE), "pairs"), uniform_grid(4)) if "pairs" in needs else None,
        frames=rng.rand((B, 3, 3 if "low" in needs else 5, 16, 16), "frames") * 2 - 1 if "frames" in needs else None,
        labels=torch.tensor([[0, 1, 0, 1, 1, 0], [2, 4, 1, 0, 1, 1]]) if "labels" in needs else None,
    )  # fmt: skip


@cases
def test_only_the_named_roles_get_gradient(method: Method) -> None:
    nets, batch = make_nets(method), make_batch(method.needs)
    for event in method.updates(0):
        if isinstance(event, Sync):
            assert event.target in method.aux()
            assert event.source in nets
            continue
        for role, network in nets.items():
            network.requires_grad_(role in event.roles).zero_grad(set_to_none=True)
        for losses in event.losses(nets, batch, Rng(0)):
            assert all(term.ndim == 0 for term in losses.values())
            sum(losses.values()).backward()
        for role, network in nets.items():
            grads = [p.grad for p in network.parameters() if p.grad is not None]
            if role in event.roles:
                assert any(bool((g != 0).any()) for g in grads), f"{role} was to be trained and got no gradient"
                assert all(bool(g.isfinite().all()) for g in grads)
            else:
                assert not grads, f"{role} is frozen in this update and got a gradient"


@cases
def test_losses_are_a_function_of_seed_and_step(method: Method) -> None:
    nets, batch = make_nets(method), make_batch(method.needs)

    def losses(rng: Rng) -> list[float]:
        updates = [u for u in method.updates(0) if not isinstance(u, Sync)]
        return [float(v) for u in updates for v in terms(u.losses(nets, batch, rng)).values()]

    torch.manual_seed(1)
    first = losses(Rng(0, 3))
    torch.manual_seed(2)
    assert first == losses(Rng(0, 3))
    if method.part != "text":  # reading a prompt has no randomness
        assert first != losses(Rng(0, 4))
        assert first != losses(Rng(1, 3))


@cases
def test_networks_are_told_the_clips_own_prompts(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, and the null prompt after them and never alone, where no prompt is dropped."""
    nets, batch, asked = make_nets(method), make_batch(method.needs), list[Cond]()
    for name in ("forward", "features"):

        def noted(
            self: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, *rest: Any, known: Any = getattr(Denoiser, name)
        ) -> Any:
            asked.append(cond)
            return known(self, x_t, t, cond, *rest)

        monkeypatch.setattr(Denoiser, name, noted)
    for step in range(3):  # several exits of a rollout, and both methods of two that take turns
        for event in undropped(method).updates(step):
            if isinstance(event, Update):
                terms(event.losses(nets, batch, Rng(0, step)))
    own, null = words(batch.cond), words(batch.uncond)[0]
    for told in map(words, asked):
        prompts = [word for word in told if word != null]
        assert told == prompts + [null] * (len(told) - len(prompts)), "the null prompt comes second"
        assert len(prompts) in (len(told), len(told) / 2)
        assert prompts == [word for word in own for _ in range(len(prompts) // B)]
    assert bool(asked) == (method.part == "denoiser")


def undropped(method: Method) -> Method:
    """The same without any clip whose prompt is left out; TwinFlow asks for it alone, for its guidance."""
    changes: dict[str, Any] = {name: 0.0 for name in ("cond_drop", "strength") if hasattr(method, name)}
    if isinstance(low := getattr(method, "rollout", None), FromLow):
        changes["rollout"] = replace(low, cond_drop=0.0)
    return replace(method, **changes)


def words(cond: Cond) -> list[bytes]:
    """What each row is told, without padding."""
    return [row[mask].numpy().tobytes() for row, mask in zip(cond.text, cond.mask, strict=True)]


@cases
def test_methods_are_recipes(method: Method) -> None:
    tree = dump(method, Method)
    assert build(Method, tree, METHOD_NAMES) == method


@cases
def test_contract_and_cost(method: Method) -> None:
    teacher = Contract(sampler=Heun(), steps=40, grid=Shifted(shift=2.0), guidance=CFG(scale=5.0))
    contract = method.contract(teacher)
    if isinstance(method, (FlowMatching, TransitionMatching, Reconstruction, ReadAttributes)):
        assert contract == teacher
    else:
        sampled = (
            method.rollouts[0].mode
            if method.rollouts
            else "ode"
            if isinstance(method, (Progressive, ProgressiveAdversarial, MomentMatching))
            else "sde"
        )
        own = method.progressive if isinstance(method, ProgressiveAdversarial) else method
        shift = method.rollouts[0].shift if method.rollouts else own.shift  # type: ignore[attr-defined]
        first = 0.4 if contract.grid.video_noise is not None else 1.0
        assert contract.trained == {n: tuple(first * t for t in uniform_grid(n, shift)) for n in contract.counts}
        assert contract.grid.free == (Shifted(shift=shift) if first == 1 else contract.grid.grid)  # type: ignore[attr-defined]
        assert contract.sampler == (Renoise() if sampled == "sde" else DDIM())
        assert contract.steps == max(contract.counts) and contract.guidance == CFG()
        assert contract.calls() < teacher.calls()
    assert sum(work.forwards for work in method.cost()) >= 3
    assert {work.role for work in method.cost()} <= {"student", "teacher", *method.aux()}
    assert method.cite


WARMED = {name: method for name, method in CASES.items() if hasattr(method, "warmup") and len(roles(method, 0)) > 1}


@pytest.mark.parametrize("method", WARMED.values(), ids=WARMED.keys())
def test_a_warm_up_trains_all_but_the_student(method: Any) -> None:
    warm = replace(method, warmup=2)
    for step in (0, 1):
        assert roles(warm, step) == [trained for trained in roles(method, step) if trained != ("student",)]
    assert roles(warm, 2) == roles(method, 2) and roles(method, 0).count(("student",)) == 1


@pytest.mark.parametrize("method", [pytest.param(m, id=n) for n, m in WARMED.items() if hasattr(m, "align")])
def test_a_critic_takes_a_share_of_the_students_weights_after_each_of_its_updates(method: Any) -> None:
    plain = list(replace(method, align=0.0).updates(2))
    aligned = list(replace(method, align=0.25, warmup=1).updates(2))
    assert not any(isinstance(event, Sync) for event in plain)
    assert aligned[-1] == Sync("critic", "student", 0.75) and roles_of(aligned[:-1]) == roles_of(plain)
    assert not any(isinstance(event, Sync) for event in replace(method, align=0.25, warmup=1).updates(0))


def test_whoever_trains_others_before_the_student_has_a_warm_up() -> None:
    followed = {
        type(method) for method in CASES.values() if roles(method, 0)[-1] == ("student",) != roles(method, 0)[0]
    }
    assert {type(method) for method in WARMED.values()} == followed - {Alternating}, "Alternating holds one that has it"


def test_a_critic_begins_as_the_teacher() -> None:
    assert DMD2().aux() == {"critic": Copy("teacher")} and DMD2().critic == "critic"
    assert Consistency().critic is None, "its target is a copy that nobody trains"


def test_every_method_is_tried() -> None:
    assert {type(m) for m in CASES.values()} == set(METHODS)
    assert KnowledgeDistillation().contract(Contract()).counts == (1, 2, 4)


def test_images_are_single_frames_of_their_own_clip() -> None:
    seen: list[tuple[torch.Size, int]] = []
    nets, batch = make_nets(FlowMatching()), make_batch(frozenset({"prompts", "x0"}))
    nets.student.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape, len(args[2]))))
    terms(FlowMatching(image_fraction=1.0, images_per_clip=2).student_loss(nets, batch, Rng(0)))
    terms(FlowMatching().student_loss(nets, batch, Rng(0)))
    assert seen == [((4, 4, 1, 4, 4), 4), ((2, *SHAPE), 2)]


def test_folded_frames_are_different_frames_of_the_stated_clip() -> None:
    clips = torch.arange(2 * 5).reshape(2, 1, 5, 1, 1).expand(2, 3, 5, 2, 2)
    frames, rows, own = fold_frames(clips, 4, Rng(0))
    assert frames.shape == (8, 3, 1, 2, 2)
    assert rows.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    shown = frames[:, 0, 0, 0, 0]
    assert len(set(shown.tolist())) == 8
    assert torch.equal(shown // 5, rows) and torch.equal(shown % 5, own)
    many = [fold_frames(clips, 2, Rng(0, step))[0][:, 0, 0, 0, 0] % 5 for step in range(40)]
    assert {frozenset(chosen[:2].tolist()) for chosen in many} == {frozenset(x) for x in combinations(range(5), 2)}
    assert any(set(chosen[:2].tolist()) != set(chosen[2:].tolist()) for chosen in many), "each clip has its own"


@pytest.mark.parametrize(("method", "wrong", "said"), [
    ("TwinFlow", {"delta": 0.5}, "delta < 0.5"),
    ("SelfAdversarial", {"layers": ()}, "at least one layer"),
    ("TimeAwareDistillation", {"regression": 0.0, "score": 0.0, "adversary": None}, "leave no loss"),
    ("TimeAwareDistillation", {"adversary": None, "warmup": 1}, "write warmup: 0, or give an adversary"),
    ("ProgressiveAdversarial", {"alone": 0.5, "adversary": Adversary(trained=True, r1=1.0)}, "write alone: 0"),
    ("ProgressiveAdversarial", {"adversary": Adversary(trained=True, split=0.5)}, "write split: 0"),
])  # fmt: skip
def test_values_that_cannot_train_are_refused(method: str, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        next(kind for kind in METHODS if kind.__name__ == method)(**wrong)


def test_a_single_frame_has_its_own_signals() -> None:
    signal = torch.arange(2 * 5.0).reshape(2, 5, 1)
    cond = Cond(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool)).with_extra({"keys": signal}, framewise=True)
    stills = fold_frames(signal.reshape(2, 1, 5, 1, 1), 3, Rng(0))
    assert torch.equal(stills.of(cond).extra["keys"].flatten(), stills.clips.flatten())
