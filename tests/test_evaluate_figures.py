"""What an evaluation's figures are made of: which clip has which prompt and seed, what is timed, which sign a gain has."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.finite import NonFiniteError
from fewstep.diffusion import Contract, Exact, Renoise
from fewstep.evaluate import Entry, Suite, entries
from fewstep.evaluate.cases import Cases
from fewstep.evaluate.compare import _difference
from fewstep.evaluate.cost import cost
from fewstep.evaluate.features.extractors import FeatureMap
from fewstep.evaluate.latency import Latency, measure_latency
from fewstep.evaluate.measure import Measured, Meter
from fewstep.evaluate.sampling import prepare, sample
from fewstep.metrics import diversity, motion
from fewstep.models import VideoModel
from support_evaluate import guided_teacher

PROMPTS = ("a small red ring", "a large blue disc", "nothing much")
SUITE = Suite(texts=PROMPTS, seeds_per_prompt=2, batch=4, features="pooled", previews=3)


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return guided_teacher(steps=3, num_frames=4)


def numbered(frames: Tensor) -> Tensor:
    """Every frame's mean, so that order shows."""
    return frames.mean((1, 3, 4))


def measured(frames: Tensor, right: Tensor) -> Measured:
    cases = Cases(PROMPTS, None, 2, first_seed=10)
    meter = Meter(FeatureMap("means", numbered), cases, [lambda x, first, last: {"right": right, "abstained": ~right}])
    meter.add(frames, 0, 3)
    return meter.done(seconds=12.0)


FRAMES = (
    torch.rand(6, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    * torch.arange(1, 7).reshape(6, 1, 1, 1, 1)
    / 7
)
RIGHT = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)


def test_figures_by_prompt_are_means_over_its_own_seeds() -> None:
    figures = measured(FRAMES, RIGHT)
    each = motion(FRAMES)
    expected = [(float(each[2 * p]) + float(each[2 * p + 1])) / 2 for p in range(3)]
    assert figures.by_prompt("motion", 2).tolist() == pytest.approx(expected)
    assert figures.by_prompt("right", 2).tolist() == [1.0, 0.5, 0.0]
    assert figures.by_prompt("attributes", 2).tolist() == [[1, 1, 1], [1, 0.5, 1], [0, 0.5, 0]]
    assert figures.diversity is not None and torch.equal(figures.diversity, diversity(FRAMES.unflatten(0, (3, 2))))
    assert figures.seconds == 2.0, "per clip"


def test_the_control_has_the_same_frames_in_another_order() -> None:
    figures = measured(FRAMES, RIGHT)
    assert torch.equal(figures.features, numbered(FRAMES))
    assert torch.equal(figures.shuffled.sort(1).values, figures.features.sort(1).values)
    assert (figures.shuffled != figures.features).any(1).sum() >= 4


def test_a_bad_number_is_not_measured() -> None:
    with pytest.raises(NonFiniteError, match="clips of prompts 0 to 2"):
        measured(FRAMES * torch.tensor(float("nan")), RIGHT)


def test_a_gain_is_what_the_student_has_more(teacher: VideoModel) -> None:
    bench = prepare([Entry(name="teacher", model=teacher)], SUITE)
    good, bad = measured(FRAMES, torch.ones_like(RIGHT)), measured(FRAMES, RIGHT)
    assert _difference("right", good, bad, bench)[0] == pytest.approx(0.5)
    assert _difference("right", bad, good, bench)[0] == pytest.approx(-0.5)


def test_every_clip_has_its_own_prompt_and_seed(teacher: VideoModel) -> None:
    entry = Entry(name="teacher", model=teacher, steps=2, guidance_scale=1.5)
    bench = prepare([entry], SUITE)
    made = sample(entry, bench)
    features = []
    for p, prompt in enumerate(PROMPTS):
        for s in range(2):
            alone = teacher.latents(
                [prompt], num_inference_steps=2, guidance_scale=1.5, seed=bench.cases.first_seed + 2 * p + s
            )
            features.append(bench.features.map(teacher.codec.decode(alone).clamp(-1, 1).detach()))
    torch.testing.assert_close(made.features, torch.cat(features), rtol=1e-4, atol=1e-4)


def test_sampling_is_timed_in_every_batch_and_decoding_is_not(
    teacher: VideoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    entry = Entry(name="teacher", model=teacher, steps=1)
    made = sample(entry, prepare([entry], replace(SUITE, batch=2)))
    assert made.seconds == pytest.approx(3 / 6), "a second for each of three batches, over six clips"


def test_an_entry_samples_as_it_says_and_gives_frames_in_range(teacher: VideoModel) -> None:
    entry = Entry(name="teacher", model=teacher, steps=2, guidance_scale=1.5)
    assert (entry.contract.steps, entry.contract.guidance.scale) == (2, 1.5)
    assert Entry(name="teacher", model=teacher).contract == teacher.card.contract
    steps = list(entry.sampling(PROMPTS[:1], (3,), 4))
    latents = steps[-1].x
    assert len(steps) == 2
    expected = teacher.latents(PROMPTS[:1], num_inference_steps=2, guidance_scale=1.5, seed=3)
    assert torch.equal(latents, expected)
    assert float(entry.decode(100 * latents).detach().abs().max()) == 1


def test_rows_of_a_fair_comparison_hold_the_teacher_at_the_students_steps(teacher: VideoModel) -> None:
    contract = Contract(sampler=Renoise(), steps=2, grid=Exact(grids=((1.0, 0.0), (1.0, 0.5, 0.0))))
    student = VideoModel(replace(teacher.card, role="student", contract=contract), teacher.parts)
    assert [entry.name for entry in entries(teacher, student)] == [
        "teacher 3", "teacher 2", "teacher 1", "student 2", "student 1",
    ]  # fmt: skip


def test_costs_are_of_sampling_and_of_decoding(teacher: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def channels(fn: Any, **options: Any) -> Latency:
        return Latency((float(fn().shape[1]),))

    monkeypatch.setattr("fewstep.evaluate.cost.measure_latency", channels)
    entry = Entry(name="teacher", model=teacher, steps=1)
    found = cost(entry, prepare([entry], SUITE))
    assert (found.sampling.runs, found.decoding.runs) == ((4.0,), (3.0,))


def test_latency_is_of_the_calls_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lasts = [100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    clock, calls = [0.0], []

    def fn() -> None:
        clock[0] += lasts[len(calls)]
        calls.append(1)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert measure_latency(fn, runs=5, warmup=1).runs == (1, 2, 3, 4, 5)
    calls.clear()
    assert measure_latency(fn, runs=5, warmup=1, budget=5.0).runs == (1, 2, 3), "until the budget is spent"
    calls.clear()
    assert measure_latency(fn, runs=5, warmup=1, budget=0.5).runs == (1, 2, 3), "three in any case"
    runs = Latency(tuple(map(float, range(1, 22))))
    assert (runs.p50, runs.p95) == (11.0, 20.0)
