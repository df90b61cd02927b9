"""Error recycling: the target stays that of clean data, banks are by time, and without errors nothing changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core import Batch, Carried, Rng
from fewstep.diffusion import RectifiedFlow, Stream, Uniform
from fewstep.diffusion.prediction import Prediction, target
from fewstep.engine.checkpoint import Checkpoint
from fewstep.engine.prepare import prepare
from fewstep.methods import DiffusionForced, ErrorRecycling, FlowMatching, TeacherForced
from fewstep.methods.recycling import Errors
from fewstep.models import VideoModel
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model
from support_gaussian import f64
from test_histories import HALVES, Heard, batch_of

pytestmark = pytest.mark.usefixtures("single_thread")
ALWAYS = ErrorRecycling(clean=0.0, data=1.0, noise=1.0, past=0.0, buckets=4, size=3)
PATH = RectifiedFlow()


@pytest.fixture
def model() -> VideoModel:
    model = tiny_model()
    model.denoiser.double().eval()
    return model


def losses(method: FlowMatching, model: VideoModel, carried: Carried, steps: range) -> tuple[list[float], Heard]:
    heard, found = Heard(model.denoiser), []
    for step in steps:
        batch = batch_of(model, carried=carried)
        (terms,) = method.student_loss(SimpleNamespace(student=heard), batch, Rng(0, step))  # type: ignore[arg-type]
        found.append(float(terms["flow"].detach()))
    return found, heard


def test_the_target_points_to_clean_data_from_wherever_the_error_has_led() -> None:
    """x_t - t v* = x0 + (1 - t) E, and the errors at both ends are -t (v - v*) and (1 - t) (v - v*)."""
    shape, t = (3, 2, 2, 4, 4), f64(0.1, 0.5, 0.9)
    x0, eps, e_data, e_noise, v = (Rng(0).randn(shape, name).double() for name in ("x", "n", "e", "f", "v"))
    noise, at = eps + e_noise, t.reshape(-1, 1, 1, 1, 1)
    x_t = PATH.add_noise(x0 + e_data, noise, t)
    goal = target("flow", x0, noise, t, PATH)
    torch.testing.assert_close(x_t - at * goal, x0 + (1 - at) * e_data, atol=1e-14, rtol=0)
    made = Prediction(raw=v, kind="flow", x_t=x_t, t=t, path=PATH)
    ideal, carried = made.with_raw(goal), Carried()
    torch.testing.assert_close(ideal.x0, x0 + (1 - at) * e_data, atol=1e-14, rtol=0)
    ALWAYS.keep(carried, made, ideal, Errors(injected=torch.ones(3, dtype=torch.bool)), (2,), Rng(0))
    banks = carried.part("errors")
    assert set(banks) == {f"{kind}/2/{bucket}" for kind in ("data", "noise") for bucket in (0, 2, 3)}
    for row, bucket in enumerate((0, 2, 3)):
        gap = (v - goal)[row]
        torch.testing.assert_close(banks[f"data/2/{bucket}"][0], -t[row] * gap, atol=1e-13, rtol=0)
        torch.testing.assert_close(banks[f"noise/2/{bucket}"][0], (1 - t[row]) * gap, atol=1e-13, rtol=0)


@pytest.mark.parametrize("history", [None, TeacherForced(stream=HALVES), DiffusionForced(stream=HALVES)])
def test_empty_banks_are_the_base_training_bit_for_bit(history: Any, model: VideoModel) -> None:
    base = FlowMatching() if history is None else FlowMatching(history=history)
    recycling = replace(ALWAYS, past=1.0 if isinstance(history, TeacherForced) else 0.0)
    plain, _ = losses(base, model, Carried(), range(1))
    assert losses(replace(base, recycling=recycling), model, Carried(), range(1))[0] == plain
    never = replace(recycling, clean=1.0, keep_clean=1.0)  # banks fill, and are not used
    carried = Carried()
    assert (
        losses(replace(base, recycling=never), model, carried, range(4))[0]
        == losses(base, model, Carried(), range(4))[0]
    )
    assert carried.part("errors")


def test_an_error_is_added_to_a_clip_at_a_time_of_its_bucket_only(model: VideoModel) -> None:
    error, noise = torch.full((1, 4, 4, 8, 8), 3.0).double(), torch.full((1, 4, 4, 8, 8), 5.0).double()
    method = FlowMatching(recycling=ALWAYS, density=Uniform(low=0.3, high=0.4), cond_drop=0.0)
    _, plain = losses(replace(method, recycling=None), model, Carried(), range(1))
    x_t, t, _ = plain.calls[0]
    at = t.reshape(-1, 1, 1, 1, 1)
    for bucket, (data, other) in {1: (3.0, 5.0), 0: (0.0, 0.0), 2: (0.0, 0.0)}.items():
        carried = Carried({f"errors/data/4/{bucket}": error, f"errors/noise/4/{bucket}": noise})
        _, heard = losses(method, model, carried, range(1))
        torch.testing.assert_close(heard.calls[0][0], x_t + (1 - at) * data + at * other, atol=1e-6, rtol=0)


def test_the_loss_is_against_the_clean_clip(model: VideoModel) -> None:
    error = torch.full((1, 4, 4, 8, 8), 3.0).double()
    method = FlowMatching(recycling=replace(ALWAYS, noise=0.0), density=Uniform(low=0.3, high=0.4), cond_drop=0.0)
    carried = Carried({"errors/data/4/1": error})
    (loss,), heard = losses(method, model, carried, range(1))
    x_t, t, _ = heard.calls[0]
    x0, eps = batch_of(model).require("x0"), Rng(0).randn((2, 4, 4, 8, 8), "eps")
    raw = model.denoiser(x_t, t, batch_of(model).cond).raw
    assert loss == pytest.approx(float((raw - (eps - x0)).square().mean().detach()), rel=1e-9)


def test_chunks_have_errors_of_their_own_times_and_the_past_one_of_any(model: VideoModel) -> None:
    method = FlowMatching(
        history=TeacherForced(stream=HALVES), cond_drop=0.0, recycling=replace(ALWAYS, data=0.0, noise=0.0, past=1.0)
    )
    one = torch.full((1, 4, 2, 8, 8), 7.0).double()
    _, heard = losses(method, model, Carried({"errors/data/2/0": one}), range(1))
    clean, _, _ = heard.calls[0]
    torch.testing.assert_close(clean, batch_of(model).require("x0") + 7.0)
    _, plain = losses(replace(method, recycling=None), model, Carried(), range(1))
    assert torch.equal(heard.calls[1][0], plain.calls[1][0]), "what is denoised has no errors here"
    carried = Carried()
    _, heard = losses(method, model, carried, range(1))
    buckets = sorted(int(t * 4) for t in heard.calls[1][1][:, ::2].flatten().tolist())
    kept = carried.part("errors")
    assert sorted(int(name[7:]) for name, bank in kept.items() if name.startswith("data/2/") for _ in bank) == buckets


def test_a_full_bucket_keeps_its_size_and_shares_are_as_stated(model: VideoModel) -> None:
    carried = Carried()
    losses(FlowMatching(recycling=replace(ALWAYS, buckets=1)), model, carried, range(4))
    assert {name: len(bank) for name, bank in carried.part("errors").items()} == {"data/4/0": 3, "noise/4/0": 3}
    recycling = ErrorRecycling(clean=0.2, data=0.9, noise=0.3, past=0.0, buckets=1, keep_clean=0.1)
    x0, t = torch.zeros(4000, 1, 1, 1, 1), torch.full((4000,), 0.5)
    banks = Carried({"errors/data/1/0": torch.ones(1, 1, 1, 1, 1), "errors/noise/1/0": torch.ones(1, 1, 1, 1, 1)})
    errors = recycling.draw(banks, x0, t, (1,), Rng(0))
    assert errors.data is not None and errors.noise is not None and errors.injected is not None and errors.past is None
    assert float(errors.injected.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float(errors.data.mean()) == pytest.approx(0.8 * 0.9, abs=0.02)
    assert float(errors.noise.mean()) == pytest.approx(0.8 * 0.3, abs=0.02)
    made = Prediction(raw=x0, kind="flow", x_t=x0, t=t, path=PATH)
    kept = Carried()
    replace(recycling, size=5000).keep(kept, made, made, errors, (1,), Rng(0))
    assert len(kept.part("errors")["data/1/0"]) / 4000 == pytest.approx(0.8 + 0.2 * 0.1, abs=0.02)


def test_what_is_kept_carries_no_gradient_and_clean_chunks_leave_nothing(model: VideoModel) -> None:
    model.denoiser.requires_grad_(True)
    carried = Carried()
    recycling = replace(ALWAYS, size=100)
    losses(
        FlowMatching(history=DiffusionForced(stream=HALVES, clean=0.5), recycling=recycling), model, carried, range(3)
    )
    banks: dict[str, Tensor] = carried.part("errors")
    assert banks and not any(bank.requires_grad for bank in banks.values())
    assert sum(len(bank) for name, bank in banks.items() if name.startswith("data/")) < 3 * 2 * 2
    assert all(bool((bank != 0).any()) for bank in banks.values())


def test_errors_of_a_past_that_nobody_reads_are_refused(model: VideoModel) -> None:
    with pytest.raises(ValueError, match=r"recycling\.past: 0"):
        FlowMatching(recycling=ErrorRecycling())
    FlowMatching(recycling=ErrorRecycling(), history=TeacherForced(stream=Stream()))
    batch = batch_of(model)
    assert isinstance(batch, Batch) and batch.carried is None
    with pytest.raises(ValueError, match="has no carried"):
        list(FlowMatching(recycling=ALWAYS).student_loss(SimpleNamespace(student=model.denoiser), batch, Rng(0)))  # type: ignore[arg-type]


def test_a_resumed_run_has_its_banks(tmp_path: Path) -> None:
    method = FlowMatching(recycling=replace(ALWAYS, size=50))
    runs = [
        prepare(tiny_model(), method, WorldClips(num_frames=FRAMES), small(4, accumulate=2, health=None), tmp_path)
        for _ in range(2)
    ]
    for _ in range(2):
        runs[0].iterate()
    runs[1].restore(Checkpoint.open(runs[0].state().save(tmp_path)))
    for run in runs:
        run.iterate()
    states = [run.state().components for run in runs]
    assert states[0].keys() == states[1].keys() and {name[0] for name in states[0]["carried"]} == {"0", "1"}
    for name, tensors in states[0].items():
        assert all(torch.equal(x, states[1][name][key]) for key, x in tensors.items()), name
