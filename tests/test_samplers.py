"""What every sampler promises, its order of convergence, times per frame, and sampling as a process. Mathematics in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.catalogue import entries
from fewstep.core import Call, Rng, Seeds, build, dump
from fewstep.diffusion import (
    CFG,
    DDIM,
    EDM,
    SAMPLERS,
    VP,
    Betas,
    Contract,
    DPMpp2M,
    Euler,
    FixedStride,
    Heun,
    NoisePath,
    Prediction,
    RectifiedFlow,
    Renoise,
    Sampler,
    Staggered,
    Step,
    Stream,
    Trig,
    from_x0,
    uniform_grid,
)
from fewstep.diffusion.samplers import Denoise, Times, full
from fewstep.models import VideoModel
from support_engine import tiny_model
from support_gaussian import GaussianTeacher, cond_of, f64

BOUNDED = [RectifiedFlow(), Trig(), VP()]
EVERY: list[Sampler] = [cls() for cls in SAMPLERS]
BY_FRAME = [sampler for sampler in EVERY if sampler.one_time and sampler.by_frame]
ODES = [sampler for sampler in BY_FRAME if sampler.deterministic]
SHAPE = (3, 1, 6, 1, 2)
PROMPTS = ["a red circle moves left", "a blue square moves up"]


def named(thing: object) -> str:
    held = getattr(thing, "sampler", None)
    return type(thing).__name__ + (f"-{named(held)}" if held is not None else "")


every = pytest.mark.parametrize("sampler", EVERY, ids=named)


def draw(name: str) -> Tensor:
    return Rng(1).randn(SHAPE, name).double()


def known(x0: Tensor, path: NoisePath = RectifiedFlow()) -> Denoise:
    """Knows what the clip shall be. Its flow at time 0 is not a number, as that of every x0 prediction."""
    return lambda x, t, call: from_x0(x0, x, t, path)


def gaussian(path: NoisePath = RectifiedFlow()) -> tuple[GaussianTeacher, Denoise]:
    """Frames that know nothing of each other."""
    teacher = GaussianTeacher(f64(0.0, 0.7), 0.4, path).requires_grad_(False)
    return teacher, lambda x, t, call: teacher(x, t, cond_of(1, len(x)), call)


def sample(sampler: Sampler, denoise: Denoise, x: Tensor, times: Times, seed: int = 0) -> Tensor:
    return sampler(denoise, x, times, rng=Rng(seed))


# --- every sampler ----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_it_counts_its_calls_and_tells_each_which_step_it_is(sampler: Sampler, steps: int) -> None:
    calls: list[Call] = []

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        calls.append(call)
        return from_x0(torch.zeros_like(x), x, t, RectifiedFlow())

    seen = list(sampler.sampling(denoise, draw("eps"), uniform_grid(steps), rng=Rng(0)))
    assert len(calls) == sampler.calls(steps) == Contract(sampler=sampler, steps=steps).calls()
    assert Contract(sampler=sampler, guidance=CFG(scale=2.0)).calls(steps) == 2 * len(calls)
    assert [step.index for step in seen] == list(range(len(seen))) and {step.steps for step in seen} == {len(seen)}
    assert sorted({call.step for call in calls}) == [step.index for step in seen]
    assert {call.steps for call in calls} == {len(seen)}
    assert len(seen) == steps or not sampler.one_time


@every
def test_it_is_exact_for_a_known_x0(sampler: Sampler) -> None:
    x0 = draw("x0")
    made = sample(sampler, known(x0), draw("eps"), uniform_grid(4))
    torch.testing.assert_close(made, x0, rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("path", [Trig(), VP(), EDM(), Betas(zero_snr=True)], ids=lambda p: type(p).__name__)
def test_no_path_makes_bad_numbers(sampler: Sampler, path: NoisePath) -> None:
    made = sample(sampler, gaussian(path)[1], path.prior(draw("eps")), uniform_grid(5))
    assert made.isfinite().all() and made.abs().max() < 80


@every
def test_a_call_gives_what_the_last_step_has(sampler: Sampler) -> None:
    denoise, times = gaussian()[1], uniform_grid(3)
    *_, last = sampler.sampling(denoise, draw("eps"), times, rng=Rng(0))
    assert torch.equal(last.x, sample(sampler, denoise, draw("eps"), times))
    assert torch.equal(last.prediction.x_t, list(sampler.sampling(denoise, draw("eps"), times, rng=Rng(0)))[-2].x)


@every
def test_it_says_whether_the_noise_decides_the_clip(sampler: Sampler) -> None:
    one, two = (sample(sampler, gaussian()[1], draw("eps"), uniform_grid(3), seed) for seed in (0, 1))
    assert torch.equal(one, two) == sampler.deterministic


@every
def test_it_says_whether_frames_share_their_time(sampler: Sampler) -> None:
    steps = list(sampler.sampling(gaussian()[1], draw("eps"), uniform_grid(3), rng=Rng(0)))
    assert all(len(step.prediction.t.unique()) == 1 for step in steps) == sampler.one_time


@every
def test_it_travels_in_a_card(sampler: Sampler) -> None:
    contract = Contract(sampler=sampler, steps=3)
    tree = json.loads(json.dumps(dump(contract)))
    names = {cls.__name__: cls for cls in SAMPLERS}
    assert build(Contract, {"sampler": tree["sampler"], "steps": 3}, names) == contract
    assert hash(contract.sampler) == hash(type(sampler)())


@every
def test_it_is_listed_with_its_source(sampler: Sampler) -> None:
    (entry,) = [entry for entry in entries("samplers") if entry.name == type(sampler).__name__]
    assert entry.doc and entry.file.endswith(".py")


@every
@pytest.mark.parametrize(("path", "kind"), [(RectifiedFlow(), "flow"), (Betas(), "eps")], ids=["flow", "table"])
def test_export_has_a_scheduler_for_it_or_says_that_there_is_none(sampler: Sampler, path: NoisePath, kind: str) -> None:
    """One that is exported makes the same clip there; one that draws noise, a clip that is known."""
    pytest.importorskip("diffusers")
    from fewstep.models.adapters.export.schedulers import exact_scheduler

    refusal, exact = "", None
    try:
        exact = exact_scheduler(path, kind, Contract(sampler=sampler, steps=4), 4)  # type: ignore[arg-type]
    except ValueError as error:
        refusal = str(error)
    if exact is None:
        assert f"no scheduler that does what {type(sampler).__name__} does" in refusal
        return
    denoise = gaussian(path)[1] if sampler.deterministic else known(draw("x0").float(), path)
    x, scheduler = draw("eps").float(), exact.pin()
    ours = sample(sampler, denoise, x, uniform_grid(4))
    scheduler.set_timesteps(4)  # type: ignore[attr-defined]
    for step, (level, t) in enumerate(zip(scheduler.timesteps, uniform_grid(4), strict=False)):  # type: ignore[attr-defined]
        raw = denoise(x, full(t, x), Call(step=step, steps=4)).as_kind(kind)  # type: ignore[arg-type]
        x = scheduler.step(raw.float(), level, x).prev_sample  # type: ignore[attr-defined]
    torch.testing.assert_close(x, ours.float(), rtol=1e-4, atol=1e-4)


# --- orders -----------------------------------------------------------------------------------------------------------


def error(sampler: Sampler, path: NoisePath, steps: int) -> float:
    teacher, denoise = gaussian(path)
    x = path.prior(draw("eps"))
    made = sample(sampler, denoise, x, uniform_grid(steps))
    return float((made - teacher.flow_map(x, 1.0, 0.0, 0.7)).abs().max())


@pytest.mark.parametrize("path", BOUNDED[:2], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("sampler", "order"),
    [(DDIM(), 1), (Euler(), 1), (Heun(), 2), (Staggered(delay=5), 1), (Staggered(sampler=Heun(), groups=3), 2)],
    ids=named,
)
def test_order_of_convergence(sampler: Sampler, order: int, path: NoisePath) -> None:
    coarse, fine = error(sampler, path, 64), error(sampler, path, 128)
    assert abs(math.log2(coarse / fine) - order) < 0.2


@pytest.mark.parametrize("path", BOUNDED, ids=lambda p: type(p).__name__)
def test_dpmpp_2m_is_of_second_order_where_lambda_is_finite(path: NoisePath) -> None:
    (teacher, denoise), x, errors = gaussian(path), draw("eps"), []
    first, last = (float(path.log_snr(f64(t))) for t in (0.9, 0.05))
    for steps in (64, 128):
        times = path.time_of_log_snr(torch.linspace(first, last, steps + 1, dtype=torch.float64)).tolist()
        *_, end = DPMpp2M().sampling(denoise, x, (*times, 0.0), rng=Rng(0))
        errors.append(float((end.prediction.x_t - teacher.flow_map(x, times[0], times[-1], 0.7)).abs().max()))
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.1


def test_dpmpp_2m_corrects_by_the_ratio_of_the_step_before_to_this_one() -> None:
    """Algorithm 2 of 2211.01095: `D = (1 + 1 / 2r) x0_1 - 1 / 2r x0_0`, written out for two steps of unequal length."""
    times = (0.9, 0.8, 0.3, 0.0)
    seen = [step.prediction for step in DPMpp2M().sampling(gaussian()[1], draw("eps"), times, rng=Rng(0))]
    lam = [math.log((1 - t) / t) for t in times[:3]]
    before, here = lam[1] - lam[0], lam[2] - lam[1]
    share = here / (2 * before)  # 1 / 2r
    blend = (1 + share) * seen[1].x0 - share * seen[0].x0
    expected = 0.3 / 0.8 * seen[1].x_t - 0.7 * math.expm1(-here) * blend
    torch.testing.assert_close(seen[2].x_t, expected)


def test_dpmpp_2m_beats_ddim_from_noise_to_data() -> None:
    assert error(DPMpp2M(), RectifiedFlow(), 16) < 0.3 * error(DDIM(), RectifiedFlow(), 16)


@pytest.mark.parametrize("path", BOUNDED, ids=lambda p: type(p).__name__)
def test_first_order_steps_are_the_affine_composition(path: NoisePath) -> None:
    teacher, denoise = gaussian(path)
    scale, offset = teacher.compose_affine(uniform_grid(8), 0.7)
    made = sample(DDIM(), denoise, draw("eps"), uniform_grid(8))
    torch.testing.assert_close(made, scale * draw("eps") + offset, rtol=1e-10, atol=1e-10)


def test_euler_is_ddim_on_rectified_flow() -> None:
    one, two = (sample(sampler, gaussian()[1], draw("eps"), uniform_grid(5)) for sampler in (Euler(), DDIM()))
    torch.testing.assert_close(one, two)


def test_one_step_gives_the_mean() -> None:
    """One Euler step of rectified flow from pure noise knows nothing of the noise."""
    made = sample(Euler(), gaussian()[1], draw("eps"), (1.0, 0.0))
    torch.testing.assert_close(made, torch.full_like(made, 0.7))


def test_renoise_uses_named_noise() -> None:
    x0 = torch.full(SHAPE, 0.3)
    seen = list(Renoise().sampling(known(x0), draw("eps").float(), (1.0, 0.5, 0.25, 0.0), rng=Rng(4)))
    for i, t in ((0, 0.5), (1, 0.25)):
        assert torch.equal(seen[i + 1].prediction.x_t, (1 - t) * x0 + t * Rng(4).randn(x0.shape, f"renoise/{i}"))
        assert torch.equal(seen[i].x, seen[i + 1].prediction.x_t)
    assert torch.equal(seen[2].x, x0)


# --- times per frame --------------------------------------------------------------------------------------------------


def test_a_time_per_frame_is_one_for_each() -> None:
    x = draw("x").float()
    assert torch.equal(full(0.25, x), torch.full((3,), 0.25)) and full(0.25, x.double()).dtype == torch.float64
    row = (1.0, 0.9, 0.5, 0.5, 0.1, 0.0)
    assert torch.equal(full(row, x), torch.tensor(row).expand(3, 6))
    with pytest.raises(ValueError, match="2 times were given for clips of 6 frames"):
        full((1.0, 0.5), x)


@pytest.mark.parametrize("sampler", BY_FRAME, ids=named)
@pytest.mark.parametrize("path", BOUNDED, ids=lambda p: type(p).__name__)
def test_each_frame_goes_its_own_way(sampler: Sampler, path: NoisePath) -> None:
    """A frame that waits, moves by times of its own and rests is what a clip of such frames would be."""
    ways = [(1.0, 0.7, 0.2, 0.0), (1.0, 1.0, 0.5, 0.0), (1.0, 0.5, 0.0, 0.0)] * 2
    rows: Times = tuple(zip(*ways, strict=True))
    denoise, eps, rng = gaussian(path)[1], path.prior(draw("eps")), Rng(3)
    made = sampler(denoise, eps, rows, rng=rng)
    assert made.isfinite().all()
    for frame, way in enumerate(ways[:3]):
        if sampler.deterministic or len(set(way)) == len(way):  # the noise of a step is named after its number
            alone = sampler(denoise, eps, tuple(dict.fromkeys(way)), rng=rng)
            torch.testing.assert_close(made[:, :, frame], alone[:, :, frame], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", ODES, ids=named)
@pytest.mark.parametrize("delay", [1, 2, 7])
def test_frames_that_know_nothing_of_each_other_do_not_mind_the_delay(sampler: Sampler, delay: int) -> None:
    times, staggered = uniform_grid(5), Staggered(sampler=sampler, groups=3, delay=delay)
    made = sample(staggered, gaussian()[1], draw("eps"), times)
    torch.testing.assert_close(made, sample(sampler, gaussian()[1], draw("eps"), times), rtol=1e-10, atol=1e-10)


def test_the_schedule_is_the_pyramid_of_diffusion_forcing() -> None:
    times = uniform_grid(3)
    rows = Staggered(groups=3, delay=2).schedule(times, 5)
    assert len(rows) == 3 + 1 + 2 * 2
    for call, row in enumerate(rows):
        for frame, time in enumerate(row):  # type: ignore[arg-type]
            assert time == times[min(max(call - 2 * (frame * 3 // 5), 0), 3)]
    assert [len({row[frame] for row in rows}) for frame in range(5)] == [4] * 5  # every frame visits every time
    assert set(rows[0]) == {1.0} and set(rows[-1]) == {0.0}  # type: ignore[arg-type]


@pytest.fixture
def network() -> VideoModel:
    """Its frames read each other."""
    return tiny_model()


def clip(model: VideoModel, sampler: Sampler) -> Tensor:
    model.card = replace(model.card, contract=replace(model.card.contract, sampler=sampler))
    return model.latents(PROMPTS, seed=3)


@pytest.mark.parametrize("sampler", BY_FRAME, ids=named)
def test_without_a_delay_it_is_the_plain_sampler_bit_for_bit(network: VideoModel, sampler: Sampler) -> None:
    plain = clip(network, sampler)
    assert torch.equal(clip(network, Staggered(sampler=sampler, delay=0)), plain)
    assert next(network.sampling(PROMPTS)).prediction.t.shape == (
        2,
    )  # so that networks without times per frame take it
    assert torch.equal(clip(network, Staggered(sampler=sampler, groups=1, delay=3)), plain)
    assert not torch.allclose(clip(network, Staggered(sampler=sampler, groups=2)), plain, atol=1e-3)


@torch.no_grad()
def test_with_a_delay_as_long_as_the_grid_groups_follow_one_another_bit_for_bit(network: VideoModel) -> None:
    network.card = replace(network.card, contract=Contract(steps=3))
    cond, _ = network.conditions(PROMPTS)
    x = Seeds((3, 4)).randn((2, *network.latent_shape()), "start")
    for group in range(2):
        mine = torch.arange(4) // 2 == group
        for t, s in zip(uniform_grid(3), uniform_grid(3)[1:]):
            now = torch.where(mine, t, torch.where(torch.arange(4) // 2 < group, 0.0, 1.0)).float().expand(2, -1)
            ahead = x + (s - t) * network.denoiser(x, now, cond).flow
            x = torch.where(mine[:, None, None], ahead, x)
    assert torch.equal(clip(network, Staggered(groups=2, delay=3)), x)


def test_the_worlds_teacher_takes_a_time_per_frame() -> None:
    world = VideoModel.from_pretrained("world")
    world.card = replace(world.card, contract=replace(world.card.contract, steps=2, sampler=Staggered(groups=2)))
    steps = list(world.sampling(PROMPTS[:1]))
    assert [step.prediction.t.unique().numel() for step in steps] == [1, 2, 2] and steps[0].prediction.t.shape == (
        1,
        16,
    )
    assert len(steps) == 3 and 0.3 < float(steps[-1].x.std()) < 2


def test_what_cannot_be_staggered_is_refused() -> None:
    with pytest.raises(ValueError, match="groups >= 1 and delay >= 0"):
        Staggered(groups=0)
    with pytest.raises(ValueError, match="gives all frames one time"):
        Staggered(sampler=Staggered())
    with pytest.raises(ValueError, match="its own time, such as Euler, not FixedStride"):
        Staggered(sampler=FixedStride())
    with pytest.raises(ValueError, match="one time for all frames; take DDIM"):
        sample(FixedStride(), known(draw("x0")), draw("eps"), ((1.0,) * 6, (0.0,) * 6))
    with pytest.raises(ValueError, match="6 latent frames cannot be cut into 7 groups"):
        sample(Staggered(groups=7), gaussian()[1], draw("eps"), uniform_grid(2))


# --- a process --------------------------------------------------------------------------------------------------------


def test_latents_are_the_end_of_sampling() -> None:
    model, options = tiny_model(), {"num_inference_steps": 4, "seed": (7, 9), "guidance_scale": 3.0}
    steps = list(model.sampling(PROMPTS, **options))
    assert [(step.index, step.steps) for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert torch.equal(steps[-1].x, model.latents(PROMPTS, **options))
    assert all(isinstance(step, Step) and not step.x.requires_grad for step in steps)
    assert [float(step.prediction.t[0]) for step in steps] == [1.0, 0.75, 0.5, 0.25]


def test_to_stop_is_to_ask_for_no_more_and_leaves_no_trace() -> None:
    """Not on the network, nor on the caller's gradients; and two runs may take turns."""
    model = tiny_model()
    before, whole = {k: v.clone() for k, v in model.denoiser.state_dict().items()}, model.latents(PROMPTS)
    model.denoiser.train()
    buffers = {name: set(vars(module)) for name, module in model.denoiser.named_modules()}
    one, two = model.sampling(PROMPTS), model.sampling(PROMPTS[::-1], seed=5)
    next(one), next(two), next(one)
    assert torch.is_grad_enabled() and model.denoiser.training
    one.close()  # type: ignore[attr-defined]
    *_, last = two
    assert torch.equal(last.x, model.latents(PROMPTS[::-1], seed=5)) and torch.equal(model.latents(PROMPTS), whole)
    assert torch.is_grad_enabled() and model.denoiser.training
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.denoiser.named_modules()} == buffers
    assert all(parameter.grad is None for parameter in model.denoiser.parameters())


def test_what_is_refused_is_refused_before_the_first_step() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="makes clips of 4 frames and was asked for 8"):
        model.sampling(PROMPTS, num_frames=8)
    with pytest.raises(TypeError, match="sed"):
        model.sampling(PROMPTS, sed=3)
    model.card = replace(model.card, contract=replace(model.card.contract, stream=Stream(chunks=(2,))))
    with pytest.raises(ValueError, match="chunk by chunk, and takes no image"):
        model.sampling(PROMPTS, image=torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"7 frames are 7 latent .*ask for 6 frames \(6 .*or 8 frames \(8"):
        model.sampling(PROMPTS, num_frames=7)
