"""UniPC and DPM-Solver++ with diffusers' own times: orders, and the same clips as diffusers' schedulers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fewstep.core import Call, Rng, Seeds
from fewstep.diffusion import (
    DDIM,
    EDM,
    VP,
    Angles,
    Betas,
    Contract,
    DPMpp2M,
    DynamicCFG,
    FixedStride,
    FlowSchedule,
    Kind,
    MultistepTimesteps,
    NoisePath,
    Prediction,
    RectifiedFlow,
    Sampler,
    SDEDPMpp2M,
    Timesteps,
    Trained,
    Trig,
    UniPC,
    WholeTimesteps,
    uniform_grid,
)
from fewstep.diffusion.samplers import Denoise
from support_engine import tiny_model
from support_gaussian import GaussianTeacher, cond_of, f64

SHAPE = (2, 2, 3, 4, 4)
STEPS = (1, 2, 3, 5, 9, 25)
NAMES: dict[Kind, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
SAMPLERS: tuple[Sampler, ...] = (UniPC(), UniPC(variant="bh1"), DPMpp2M())
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ANIMATEDIFF = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
each = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)


def gaussian(path: NoisePath) -> tuple[GaussianTeacher, Denoise]:
    teacher = GaussianTeacher(f64(0.0, 0.7), 0.4, path).requires_grad_(False)
    return teacher, lambda x, t, call: teacher(x, t, cond_of(1, len(x)), call)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize(
    ("path", "first", "last"), [(RectifiedFlow(), 0.9, 0.05), (Trig(), 0.9, 0.05), (VP(), 0.9, 0.05), (EDM(), 0.5, 0.2)],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_unipc_is_of_third_order_where_lambda_is_finite(
    path: NoisePath, first: float, last: float, variant: Literal["bh1", "bh2"]
) -> None:
    """Theorem 3.1 of 2302.04867: the corrector adds one order to UniP-2. Closed-form flow map, float64."""
    (teacher, denoise), x, errors = gaussian(path), Rng(1).randn((3, 1, 6, 1, 2), "eps").double(), []
    x, ends = path.prior(x, first), (float(path.log_snr(f64(t))) for t in (first, last))
    high, low = ends
    for steps in (64, 128):
        times = path.time_of_log_snr(torch.linspace(high, low, steps + 1, dtype=torch.float64)).tolist()
        *_, end = UniPC(variant=variant).sampling(denoise, x, (*times, 0.0), rng=Rng(0))
        errors.append(float((end.prediction.x_t - teacher.flow_map(x, times[0], times[-1], 0.7)).abs().max()))
    assert abs(math.log2(errors[0] / errors[1]) - 3) < 0.15


def test_from_noise_to_data_unipc_beats_the_others() -> None:
    def error(sampler: Sampler) -> float:
        (teacher, denoise), x = gaussian(RectifiedFlow()), Rng(1).randn((3, 1, 6, 1, 2), "eps").double()
        made = sampler(denoise, x, uniform_grid(16), rng=Rng(0))
        return float((made - teacher.flow_map(x, 1.0, 0.0, 0.7)).abs().max())

    assert error(UniPC()) < error(DPMpp2M()) < 0.3 * error(DDIM())


def test_unipc_by_hand() -> None:
    """Two steps from 0.9 and a corrected one, with x0 that the network is told: eqs. 3, 5 and 7 written out in numbers."""
    x0, times = [2.0, 1.0, 4.0, 3.0], (0.9, 0.8, 0.5, 0.2, 0.0)

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        return Prediction(torch.full_like(x, x0[call.step]), "x0", x, t, RectifiedFlow())

    x = torch.full((1, 1, 1, 1, 1), 1.5, dtype=torch.float64)
    seen = [float(step.x) for step in UniPC().sampling(denoise, x, times, rng=Rng(0))]
    lam = [math.log((1 - t) / t) for t in times[:4]]
    h = [b - a for a, b in zip(lam, lam[1:])]
    # step 0: order 1, and its corrector with 1/2
    plain = 0.8 / 0.9 * 1.5 - 0.2 * math.expm1(-h[0]) * 2
    assert seen[0] == pytest.approx(plain, rel=1e-12)
    fixed = plain - 0.2 * math.expm1(-h[0]) * 0.5 * (1 - 2)
    # step 1: order 2 from the corrected latents
    ratio = (lam[0] - lam[1]) / h[1]
    base = 0.5 / 0.8 * fixed - 0.5 * math.expm1(-h[1]) * 1
    assert seen[1] == pytest.approx(base - 0.5 * math.expm1(-h[1]) * 0.5 * (2 - 1) / ratio, rel=1e-12)
    # its corrector: rho of [[1, 1], [r, 1]] rho = b
    phi2 = math.expm1(-h[1]) / -h[1] - 1
    phi3 = phi2 / -h[1] - 0.5
    b = torch.tensor([phi2, 2 * phi3], dtype=torch.float64) / math.expm1(-h[1])
    rho = torch.linalg.solve(torch.tensor([[1.0, 1.0], [ratio, 1.0]], dtype=torch.float64), b).tolist()
    fixed = base - 0.5 * math.expm1(-h[1]) * (rho[0] * (2 - 1) / ratio + rho[1] * (4 - 1))
    ratio = (lam[1] - lam[2]) / h[2]
    last = 0.2 / 0.5 * fixed - 0.8 * math.expm1(-h[2]) * (4 + 0.5 * (1 - 4) / ratio)
    assert seen[2:] == pytest.approx([last, 3.0], rel=1e-12)


def test_bh1_leaves_a_step_from_pure_noise_as_it_is() -> None:
    """There its B(h) is infinite; bh2 has a limit, and corrects half of what x0 has changed."""

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        return Prediction(torch.full_like(x, (1.0, 3.0, 0.0)[call.step]), "x0", x, t, RectifiedFlow())

    x, times = Rng(1).randn(SHAPE, "x").double(), (1.0, 0.6, 0.3, 0.0)
    for variant, fixed in (("bh1", 0.6 * x + 0.4), ("bh2", 0.6 * x + 0.4 + 0.5 * 0.4 * 2)):
        seen = list(UniPC(variant=variant).sampling(denoise, x, times, rng=Rng(0)))  # type: ignore[arg-type]
        torch.testing.assert_close(seen[0].x, 0.6 * x + 0.4)
        # from pure noise the past counts for nothing: the next step is of first order
        torch.testing.assert_close(seen[1].x, 0.3 / 0.6 * fixed + (0.7 - 0.4 * 0.3 / 0.6) * 3)


def test_another_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="variant: 'bh3' is unknown; choose bh1 or bh2"):
        UniPC(variant="bh3")  # type: ignore[arg-type]


# --- what a network is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
def test_a_network_is_told_whole_timesteps_and_moves_by_exact_ones(steps: int) -> None:
    told, times = [], FlowSchedule(shift=3.0).times(steps)

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        told.append(float(t[0]))
        return Prediction(torch.ones_like(x), "flow", x, t, RectifiedFlow())

    x = Rng(1).randn(SHAPE, "x")
    seen = list(WholeTimesteps(sampler=UniPC()).sampling(denoise, x, times, rng=Rng(0)))
    assert told == pytest.approx([math.floor(1000 * t) / 1000 for t in times[:-1]], abs=1e-7)
    assert [float(step.prediction.t[0]) for step in seen] == pytest.approx(times[:-1], abs=1e-7)
    torch.testing.assert_close(seen[0].prediction.x0, x - torch.tensor(times[0]))  # of the exact time


def test_frames_of_different_times_are_told_their_own() -> None:
    rows, told = ((0.9996, 0.5004), (0.5004, 0.0)), []

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        told.append(t[0].tolist())
        return Prediction(torch.ones_like(x), "x0", x, t, RectifiedFlow())

    WholeTimesteps()(denoise, Rng(1).randn((1, 1, 2, 1, 1), "x"), rows, rng=Rng(0))
    assert told == [pytest.approx([0.999, 0.5])]


# --- equal to diffusers -----------------------------------------------------------------------------------------------


def network(x: Tensor, told: Tensor) -> Tensor:
    """Any smooth function of the latents and of what is told of the time."""
    return 0.7 * torch.sin(1.3 * x) + 0.4 * x.roll(1, 2) * torch.cos(3 * told) + 0.3


def scheduler_of(sampler: Sampler, kind: Kind, **settings: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    if isinstance(sampler, UniPC):
        return diffusers.UniPCMultistepScheduler(solver_type=sampler.variant, prediction_type=NAMES[kind], **settings)
    return diffusers.DPMSolverMultistepScheduler(prediction_type=NAMES[kind], **settings)


def require_same(sampler: Sampler, denoise: Denoise, times: tuple[float, ...], scheduler: Any) -> None:
    """The latents after every step. Diffusers' bh1 gives NaN in the last one, where its B(h) is infinite."""
    ours = theirs = Rng(1).randn(SHAPE, "x")
    for step, timestep in zip(sampler.sampling(denoise, ours, times, rng=Rng(0)), scheduler.timesteps, strict=True):
        theirs = scheduler.step(network(theirs, timestep / 1000), timestep, theirs).prev_sample
        if step.index == step.steps - 1 and scheduler.config.get("solver_type") == "bh1":
            assert step.x.isfinite().all() and theirs.isnan().all()
        else:
            assert float((step.x - theirs).norm() / theirs.norm()) < 1e-5


@each
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_on_flow_clips_are_those_of_diffusers(sampler: Sampler, shift: float, steps: int) -> None:
    scheduler = scheduler_of(sampler, "flow", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    times = FlowSchedule(scheduler="dpm" if sampler == DPMpp2M() else "unipc", shift=shift).times(steps)
    assert times == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        return Prediction(network(x, t[0]), "flow", x, t, RectifiedFlow())

    require_same(WholeTimesteps(sampler=sampler), denoise, times, scheduler)


@each
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("table", [STABLE_DIFFUSION, ANIMATEDIFF], ids=["scaled_linear", "linear"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 5), ("linspace", 2), ("trailing", 25), ("leading", 1)])
def test_on_a_table_clips_are_those_of_diffusers(
    sampler: Sampler, spacing: Any, steps: int, table: dict[str, Any], kind: Kind
) -> None:
    scheduler = scheduler_of(sampler, kind, timestep_spacing=spacing, steps_offset=1, **table)
    scheduler.set_timesteps(steps)
    path = Betas(schedule=table["beta_schedule"])

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        return Prediction(network(x, t[0] - 1e-3), kind, x, t, path)

    times = MultistepTimesteps(spacing=spacing, steps_offset=1).times(steps)
    require_same(sampler, denoise, times, scheduler)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 5), ("linspace", 25), ("trailing", 7), ("leading", 4)])
def test_a_fixed_stride_is_diffusers_ddim(spacing: Any, steps: int, clean: bool, kind: Kind) -> None:
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(
        prediction_type=NAMES[kind], timestep_spacing=spacing, set_alpha_to_one=clean, clip_sample=False, **ANIMATEDIFF
    )
    scheduler.set_timesteps(steps)

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        return Prediction(network(x, t[0] - 1e-3), kind, x, t, Betas(schedule="linear"))

    times = Timesteps(spacing=spacing, ends_clean=clean).times(steps)
    require_same(FixedStride(ends_clean=clean), denoise, times, scheduler)


# --- CogVideoX's sampler: with fresh noise -----------------------------------------------------------------------------

COGVIDEOX = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("trailing", 10), ("trailing", 7), ("linspace", 5), ("leading", 4), ("trailing", 1)]
)
@pytest.mark.parametrize(("shift", "zero"), [(3.0, True), (1.0, True), (3.0, False)])
def test_with_a_stride_it_is_cogvideox_s_scheduler(
    shift: float, zero: bool, spacing: Any, steps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same noise, of which diffusers draws twice as much as it uses."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_dpm_cogvideox

    scheduler = diffusers.CogVideoXDPMScheduler(
        timestep_spacing=spacing, rescale_betas_zero_snr=zero, snr_shift_scale=shift, **COGVIDEOX
    )
    scheduler.set_timesteps(steps)
    path, now, times = Betas(snr_shift=shift, zero_snr=zero), [0], Timesteps(spacing=spacing).times(steps)
    monkeypatch.setattr(
        scheduling_dpm_cogvideox, "randn_tensor", lambda shape, **_: Rng(0).randn(shape, f"sde/{now[0]}").to(dtype)
    )

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        return Prediction(network(x, t[0] - 1e-3), "v", x, t, path)

    theirs, old = Rng(1).randn(SHAPE, "x").to(dtype), None
    made = SDEDPMpp2M(stride=1000).sampling(denoise, theirs, times, rng=Rng(0))
    for step, timestep in zip(made, scheduler.timesteps, strict=True):
        now[0] = step.index
        before = scheduler.timesteps[step.index - 1] if step.index else None
        theirs, old = scheduler.step(network(theirs, timestep / 1000), old, timestep, before, theirs)
        assert float((step.x - theirs).norm() / theirs.norm()) < 1e-5


def test_the_stochastic_step_by_hand() -> None:
    """Three steps in numbers, with x0 that the network is told: the first of first order, the last gives x0."""
    x0, times = [2.0, 1.0, 4.0], (0.8, 0.6, 0.2, 0.0)

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        return Prediction(torch.full_like(x, x0[call.step]), "x0", x, t, RectifiedFlow())

    x = torch.full((1, 1, 1, 1, 1), 1.5, dtype=torch.float64)
    seen = [float(step.x) for step in SDEDPMpp2M().sampling(denoise, x, times, rng=Rng(0))]
    noise = [float(Rng(0).randn((1, 1, 1, 1, 1), f"sde/{i}")) for i in range(2)]
    lam = [math.log((1 - t) / t) for t in times[:3]]
    h = [b - a for a, b in zip(lam, lam[1:])]
    first = 0.6 / 0.8 * math.exp(-h[0]) * 1.5 + 0.4 * (1 - math.exp(-2 * h[0])) * 2
    first += 0.6 * math.sqrt(1 - math.exp(-2 * h[0])) * noise[0]
    blend = 1 + (1 - 2) * h[1] / (2 * h[0])
    second = 0.2 / 0.6 * math.exp(-h[1]) * first + 0.8 * (1 - math.exp(-2 * h[1])) * blend
    second += 0.2 * math.sqrt(1 - math.exp(-2 * h[1])) * noise[1]
    assert seen == pytest.approx([first, second, 4.0], rel=1e-7)


def test_its_steps_keep_the_distribution_of_data() -> None:
    """Of many noises, the samples of a Gaussian have its mean and deviation: nothing is lost, and no noise is left over."""
    teacher, denoise = gaussian(RectifiedFlow())
    x = Rng(1).randn((4000, 1, 1, 1, 2), "eps").double()
    made = SDEDPMpp2M()(denoise, x, tuple(1 - i / 60 for i in range(60)) + (0.0,), rng=Rng(0))
    exact = teacher.flow_map(x, 1.0, 0.0, 0.7)
    assert abs(float(made.mean() - exact.mean())) < 0.03 and abs(float(made.std() / exact.std()) - 1) < 0.03
    assert float((made - exact).norm() / exact.norm()) > 0.3, "another clip for another noise"


# --- grids ------------------------------------------------------------------------------------------------------------


def test_times_by_hand() -> None:
    """Two steps, shift 3: t = 3 u / (1 + 2 u)."""
    assert FlowSchedule(shift=3.0).times(2) == pytest.approx((1 - 1e-6, 1.5015 / 2.001, 0), abs=1e-9)
    assert FlowSchedule(shift=3.0, scheduler="dpm").times(2) == pytest.approx(
        (2.997 / 2.998, 1.4985 / 1.999, 0), abs=1e-9
    )
    low = 0.003 / 1.002
    assert FlowSchedule(shift=3.0, scheduler="euler").times(2) == pytest.approx(
        (1, 3 * low / (1 + 2 * low), 0), abs=1e-9
    )
    assert MultistepTimesteps(spacing="leading", steps_offset=1).times(4) == (0.802, 0.602, 0.402, 0.202, 0.0)
    assert MultistepTimesteps().times(4) == (1.0, 0.75, 0.501, 0.251, 0.0)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_times_of_flow_matching_euler_are_those_of_diffusers(shift: float, steps: int) -> None:
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    times = FlowSchedule(scheduler="euler", shift=shift).times(steps)
    assert times == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 7, 25, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_timesteps_are_those_of_diffusers(name: str, spacing: Any, steps: int) -> None:
    scheduler = getattr(pytest.importorskip("diffusers"), name)(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    times = MultistepTimesteps(spacing=spacing, steps_offset=1).times(steps)
    assert [round(1000 * t) - 1 for t in times[:-1]] == scheduler.timesteps.tolist() and times[-1] == 0


def test_sampling_starts_from_the_noise_itself() -> None:
    """Also where the first time is below 1, as in diffusers' pipelines; a student's own times mean what they say."""
    model = tiny_model()
    for grid, share in (
        (FlowSchedule(scheduler="dpm"), 1.0),
        (Trained(grid=FlowSchedule(scheduler="dpm"), steps=(2,)), 1.0),
        (Angles(), Angles().times(2)[0]),
    ):
        model.card = replace(model.card, contract=Contract(grid=grid, steps=2))
        noise = Seeds((3,)).randn((1, *model.latent_shape()), "start")
        torch.testing.assert_close(next(model.sampling(["a"], seed=3)).prediction.x_t, share * noise)


UNEVEN = (1.0, 0.5, 0.5)
REFUSED: list[tuple[Any, str]] = [
    (lambda: FlowSchedule(scheduler="heun"), "choose unipc, dpm or euler"),  # type: ignore[arg-type]
    (lambda: FlowSchedule(shift=0.0), "shift > 0"),
    (lambda: FlowSchedule().times(0), "at least 1 step"),
    (lambda: MultistepTimesteps().times(1000), "in 1 to 999 steps"),
    (lambda: DynamicCFG(counts="timesteps", power=4.5), "give a whole power"),
    (lambda: SDEDPMpp2M(stride=9)(gaussian(VP())[1], torch.ones(SHAPE), (UNEVEN, 0.0), rng=Rng(0)), "leave stride out"),
    (lambda: MultistepTimesteps(spacing="leading", steps_offset=600).times(1), "beyond timestep 999"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
