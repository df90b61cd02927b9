"""Drift of long clips: figures against closed forms, rows against the streams that they stand for, and a whole evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fewstep.data.video import to_uint8
from fewstep.diffusion import CFG, Stream
from fewstep.evaluate.features.extractors import feature_map
from fewstep.evaluate.streams import (
    Claim,
    DriftSuite,
    Fresh,
    LongClips,
    Rendered,
    Streamed,
    load_drift,
    measure_drift,
    rows_of,
    switching,
)
from fewstep.evaluate.streams import run as running
from fewstep.evaluate.streams.clips import cut, variation
from fewstep.evaluate.streams.figures import curve, distances, kept, ratio_to, slope
from fewstep.evaluate.streams.rolling import roll, shown_windows
from fewstep.evaluate.streams.suite import DriftCases
from fewstep.metrics import bootstrap_interval, frechet, saturation
from fewstep.streaming import Session
from fewstep.world.grammar import ATTRIBUTES, Scene, parse, sample_scenes
from fewstep.world.scripts import Script, render_script
from fewstep.world.windows import read_windows
from support_engine import FRAMES, tiny_model
from test_streaming import streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
SUITE = DriftSuite(times=(1, 2, 3), prompts=4, batch=3, shown=2, features="pooled")
CASES = SUITE.cases()
STREAM = Stream(chunks=(3,), window=6)
POOLED = feature_map("pooled", (32, 32), torch.device("cpu"))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_slope_of_a_line_is_its_slope_per_100_frames() -> None:
    frames = 16 * torch.arange(20, dtype=torch.float64)
    lines = torch.stack([0.5 - 0.002 * frames, 0.1 + 0 * frames])
    torch.testing.assert_close(slope(lines, 16), torch.tensor([-0.2, 0.0], dtype=torch.float64))
    found = curve(lines, 1, 16, (1, 4, 20), share=False)
    assert found.slope == pytest.approx(-0.1) and found.slope_interval is not None
    assert found.slope_interval[0] == pytest.approx(-0.2) and found.slope_interval[1] == pytest.approx(0, abs=1e-9)
    assert found.values[0] == pytest.approx(0.3)
    assert [one.times for one in found.kept] == [4, 20]
    assert found.kept[0].ratio == pytest.approx((0.5 - 0.002 * 48 + 0.1) / 0.6)


def test_one_prompt_has_no_interval_and_one_window_has_no_slope() -> None:
    alone = curve(torch.rand(2, 5), 2, 16, (1, 5), share=False)
    assert alone.slope is not None and alone.slope_interval is None and alone.intervals == (None,) * 5
    still = curve(torch.rand(3, 1), 1, 16, (1, 4), share=True)
    assert still.slope is None and still.kept == () and still.intervals[0] is not None


def test_what_is_kept_of_nothing_is_not_a_number_of_times() -> None:
    assert kept(torch.zeros(4, 3), 3).ratio is None
    assert ratio_to(torch.ones(3), torch.zeros(3))[0] is None
    value, interval = ratio_to(torch.full((9,), 3.0), torch.full((9,), 2.0))
    assert value == 1.5 and interval == pytest.approx((1.5, 1.5))


@pytest.mark.parametrize("prompts", [24, 200])
def test_a_few_prompts_that_are_all_right_prove_little(prompts: int) -> None:
    found = kept(torch.ones(prompts, 3), 3, share=True)
    assert found.ratio == 1.0 and found.interval is not None
    assert (found.interval[0] < 0.95) == (prompts == 24), "24 prompts cannot show that 95 % are kept, 200 can"
    assert found.interval[0] < 1 < found.interval[1]


def test_seeds_of_a_prompt_count_once() -> None:
    """Two equal clips of each prompt say no more than one."""
    values = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).double()
    once, twice = (curve(x, n, 4, (1, 4), share=False) for x, n in ((values, 1), (values.repeat_interleave(2, 0), 2)))
    assert once == twice


def test_distances_are_of_the_same_window_and_their_slope_is_per_100_frames() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, 4, generator=generator).double()
    mine = real.clone()
    mine[:, 1] += 1.0
    mine[:, 2] += 2.0
    found = distances(mine, real, 1, 50, (1, 3))
    assert found is not None
    assert found.values == pytest.approx((0.0, 4.0, 16.0), abs=1e-6)  # 4 features moved by 1, then by 2
    assert found.slope == pytest.approx(16.0)
    assert found.intervals[1] is not None and found.intervals[1][0] <= 4.0 <= found.intervals[1][1]
    assert distances(mine[:3], real[:3], 1, 50, (1, 3)) is None
    assert found.values[1] == pytest.approx(frechet(mine[:, 1], real[:, 1]))


def test_the_bootstrap_covers_a_mean_about_as_often_as_it_says() -> None:
    generator, hits = torch.Generator().manual_seed(0), 0
    for draw in range(200):
        x = torch.randn(24, generator=generator)
        low, high = bootstrap_interval(x, lambda rows: rows.mean(1), resamples=400, seed=draw)
        hits += low <= 0 <= high
    assert 176 <= hits <= 198
    assert bootstrap_interval(torch.ones(1), lambda rows: rows.mean(1)) == (-torch.inf, torch.inf)


@pytest.mark.parametrize(
    ("interval", "high", "outcome"),
    [
        ((0.96, 1.1), None, "met"),
        ((0.5, 0.94), None, "not met"),
        ((0.9, 1.0), None, "open"),
        (None, None, "open"),
        ((0.96, 1.3), 1.2, "open"),
        ((1.21, 1.3), 1.2, "not met"),
    ],
)
def test_a_claim_is_met_only_by_its_whole_interval(
    interval: tuple[float, float] | None, high: float | None, outcome: str
) -> None:
    assert Claim(row="a", text="", value=1.0, interval=interval, low=0.95, high=high).outcome == outcome


# --- rows -------------------------------------------------------------------------------------------------------------


def test_windows_are_cut_from_parts_of_any_length_and_no_more_is_asked_for() -> None:
    whole, asked = torch.arange(30.0).view(1, 1, 30, 1, 1), []

    def parts() -> Iterator[Tensor]:
        for part in whole.split(7, 2):
            asked.append(part)
            yield part

    windows = list(cut(parts(), 4, 4))
    assert torch.equal(torch.cat(windows, 2), whole[:, :, :16]) and len(asked) == 3
    assert [window.shape[2] for window in cut(whole.split(20, 2), 5, 6)] == [5] * 6


def test_windows_of_a_stream_are_the_stream_bit_for_bit() -> None:
    model = streaming_model(STREAM)
    row = Streamed(name="a", role="student", model=model)
    windows = list(row.windows(CASES.scenes[:2], CASES.prompts[:2], (5, 9), 3))
    assert [window.shape for window in windows] == [(2, 3, FRAMES, 32, 32)] * 3
    chunks = Session(model, CASES.prompts[:2], seed=(5, 9)).take(4)
    with torch.no_grad():
        assert torch.equal(torch.cat(windows, 2), torch.cat([model.decode(chunk) for chunk in chunks], 2))


@pytest.mark.parametrize("row", ["stream", "whole clips", "rendered"])
def test_gradients_are_as_they_were_between_two_windows(row: str) -> None:
    rows: dict[str, LongClips] = {
        "stream": Streamed(name="a", role="student", model=streaming_model(STREAM)),
        "whole clips": Fresh(name="t", role="teacher", model=tiny_model(), steps=1),
        "rendered": Rendered(num_frames=FRAMES),
    }
    windows = rows[row].windows(CASES.scenes[:1], CASES.prompts[:1], (7,), 2)
    assert not next(windows).requires_grad and torch.is_grad_enabled()


def test_windows_of_whole_clips_are_new_clips() -> None:
    model = tiny_model()
    first, second = Fresh(name="t", role="teacher", model=model, steps=2).windows((), CASES.prompts[:1], (7,), 2)
    with torch.no_grad():
        assert torch.equal(first, model.decode(model.latents(CASES.prompts[:1], seed=7, num_inference_steps=2)))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
@pytest.mark.parametrize("commit", ["clean", "last"])
def test_calls_per_frame_are_those_that_are_made(guidance: CFG, commit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clips = streaming_model(Stream(chunks=(2,), commit=commit), guidance), 0
    forward = model.denoiser.backbone.forward

    def counted(x: Tensor, *rest: Any) -> Any:
        nonlocal clips
        clips += len(x)
        return forward(x, *rest)

    monkeypatch.setattr(model.denoiser.backbone, "forward", counted)
    row = Streamed(name="a", role="student", model=model)
    list(row.windows((), CASES.prompts[:1], (5,), 2))
    assert clips == row.nfe_per_frame * (2 * FRAMES // 2)


def test_the_teacher_has_at_least_the_calls_per_frame_of_the_student() -> None:
    student, teacher = streaming_model(STREAM), tiny_model()  # 2 steps and a commit; guided, 3 steps
    rows = rows_of({"a": student}, teacher, causal=student)
    assert [(row.name, row.role, row.nfe_per_frame) for row in rows] == [
        ("a", "student", 3.0), ("causal 2", "causal", 3.0), ("teacher 3", "teacher", 6.0), ("teacher 2", "teacher", 4.0)
    ]  # fmt: skip


def test_rendered_clips_do_not_depend_on_their_batch() -> None:
    row, scenes = Rendered(num_frames=8), CASES.scenes
    together = torch.cat(list(row.windows(scenes, CASES.prompts, CASES.seeds, 2)), 2)
    alone = torch.cat(list(row.windows(scenes[2:3], (), CASES.seeds[2:3], 2)), 2)
    assert torch.equal(together[2:3], alone)
    other = torch.cat(list(replace(row, draw=1).windows(scenes, (), CASES.seeds, 2)), 2)
    assert not torch.allclose(together, other)


# --- one row ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fading(Rendered):
    """Rendered clips whose contrast falls by a tenth of its first value in every window."""

    def windows(
        self, scenes: Sequence[Scene], prompts: Sequence[str], seeds: Sequence[int], count: int
    ) -> Iterator[Tensor]:
        for window, frames in enumerate(super().windows(scenes, prompts, seeds, count)):
            yield frames * (1 - 0.1 * window)


def test_real_clips_do_not_drift_and_fading_ones_do() -> None:
    suite = replace(SUITE, times=(1, 5), prompts=12, batch=12)
    cases = suite.cases()
    real, fading = (
        roll(row, cases, suite, POOLED, None) for row in (Rendered(num_frames=16), Fading(num_frames=16, name="fading"))
    )
    assert float(real.measures["accuracy"].mean()) > 0.9 and float(real.measures["same object"].mean()) > 0.9
    assert real.measures["accuracy"].shape == (12, 5) and real.features.shape[:2] == (12, 5)
    for name in ("saturation", "motion", "sharpness"):
        still = curve(real.measures[name], 1, 16, (1, 5), share=False)
        assert still.slope is not None and abs(still.slope) < 0.03 * still.values[0], name
    faded, first = curve(fading.measures["saturation"], 1, 16, (1, 5), share=False), real.measures["saturation"][:, 0]
    assert faded.slope == pytest.approx(-0.1 * float(first.mean()) / 0.16, rel=0.1)
    assert faded.kept[0].ratio == pytest.approx(0.6, rel=0.05)
    assert float(fading.measures["accuracy"][:, -1].mean()) < 0.5


@dataclass(frozen=True, kw_only=True)
class Turned(Rendered):
    """Rendered clips that move in another direction than they should."""

    def windows(
        self, scenes: Sequence[Scene], prompts: Sequence[str], seeds: Sequence[int], count: int
    ) -> Iterator[Tensor]:
        return super().windows([switching.switched(scene, "turn") for scene in scenes], prompts, seeds, count)


def test_a_window_is_right_if_every_attribute_is() -> None:
    found = roll(Turned(num_frames=16), CASES, replace(SUITE, times=(1, 2)), POOLED, None).measures
    assert float(found["accuracy"].max()) == float(found["direction"].max()) == 0
    assert min(float(found[name].mean()) for name in ATTRIBUTES if name != "direction") > 0.8


def test_a_window_is_measured_on_its_own_frames() -> None:
    suite = replace(SUITE, times=(1, 2), seeds_per_prompt=2, batch=2)
    cases = suite.cases()
    found = roll(Rendered(num_frames=16), cases, suite, POOLED, None)
    windows = list(Rendered(num_frames=16).windows(cases.scenes, (), cases.seeds, 2))
    for w, frames in enumerate(windows):
        torch.testing.assert_close(found.measures["saturation"][:, w], saturation(frames))
        torch.testing.assert_close(found.features[:, w], POOLED.map(frames).double())
    assert found.strips.shape == (4, 2, 3, 4, 32, 32), "the first clip of each prompt"
    assert torch.equal(found.strips[1, 1, :, -1], to_uint8(windows[1][2, :, -1]))


def test_the_shown_windows_include_half_way_and_the_end() -> None:
    assert shown_windows(20, (1, 4, 20)) == (0, 1, 3, 9, 19)
    assert shown_windows(1, (1, 4)) == (0,)
    assert shown_windows(2, (1, 2)) == (0, 1)


# --- switched prompts -------------------------------------------------------------------------------------------------


def switched_clips(kind: str, late: int, cases: DriftCases) -> Tensor:
    """Rendered clips that follow the second prompt `late` frames after the switch at frame 16."""
    clips = [
        render_script([Script((scene, switching.switched(scene, kind)), (0, 16 + late))], variation(seed), 80)
        for scene, seed in zip(cases.scenes, cases.seeds, strict=True)
    ]
    return torch.cat(clips)


def test_a_switch_changes_the_attributes_of_its_kind() -> None:
    for scene in sample_scenes(20, torch.Generator().manual_seed(0)):
        for kind, names in switching.KINDS.items():
            other = switching.switched(scene, kind)
            assert tuple(name for name in ATTRIBUTES if getattr(other, name) != getattr(scene, name)) == names
    up = switching.switched(parse("a small red ring moves slowly right over a navy background"), "turn")
    assert up.direction == "up"


@pytest.mark.parametrize("late", [0, 12])
def test_a_switch_is_right_as_many_frames_late_as_it_is(late: int) -> None:
    cases = replace(SUITE, prompts=8).cases()
    windows = read_windows(switched_clips("turn", late, cases), 16, 4)
    found = switching.summarised("a", "keep", "turn", windows, cases, 16)
    assert found.frames == late and found.right >= 0.8 and found.right_before >= 0.8
    assert found.same_object == 1.0 and set(found.survived) == set(ATTRIBUTES) - {"direction"}
    assert min(found.survived.values()) >= 0.8


def test_a_prompt_that_never_comes_right_has_no_number_of_frames() -> None:
    cases = replace(SUITE, prompts=8).cases()
    windows = read_windows(switched_clips("recolour", 80, cases), 16, 4)
    found = switching.summarised("a", "keep", "recolour", windows, cases, 16)
    assert (found.frames, found.frames_interval, found.right, found.same_object) == (None, None, 0.0, None)


def test_every_way_of_switching_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hows, steer = streaming_model(STREAM), list[str](), Session.steer

    def steered(self: Session, prompts: Sequence[str], how: Literal["keep", "clear"] = "keep") -> None:
        hows.append(how)
        steer(self, prompts)

    monkeypatch.setattr(Session, "steer", steered)
    suite = replace(SUITE, prompts=2, batch=2)
    found = switching.switch(Streamed(name="a", role="student", model=model), suite.cases(), suite, None)
    assert {(one.how, one.kind) for one in found} == {
        (how, kind) for how in ("keep", "clear") for kind in switching.KINDS
    }
    assert sorted(set(hows)) == ["clear", "keep"]


def test_a_stream_that_cannot_be_made_anew_is_switched_in_other_ways() -> None:
    suite = replace(SUITE, prompts=2, batch=2)
    model = streaming_model(replace(STREAM, commit="last"))
    found = switching.switch(Streamed(name="a", role="student", model=model), suite.cases(), suite, None)
    assert {one.how for one in found} == {"keep", "clear", "lerp"} == {*switching.ways()} - {"recache"}


# --- a whole evaluation -----------------------------------------------------------------------------------------------


def rows() -> list[Any]:
    return rows_of({"student": streaming_model(STREAM)}, tiny_model())


def test_a_drift_evaluation_from_models_to_results(tmp_path: Path) -> None:
    report = measure_drift(rows(), SUITE, tmp_path)
    assert [row.name for row in report.rows] == ["student", "teacher 3", "teacher 2", "real clips"]
    assert [len(row.curves["motion"].values) for row in report.rows] == [3, 1, 1, 3]
    assert all("Frechet" in row.curves for row in report.rows)
    assert [claim.row for claim in report.claims] == ["student"] * 3
    assert "teacher 2 (4 calls" in report.claims[2].text
    assert {one.row for one in report.switches} == {"student", "real clips"}
    assert load_drift(tmp_path) == report
    assert not (tmp_path / "rows").exists()
    with pytest.raises(FileExistsError, match="other prompts or settings"):
        measure_drift(rows(), replace(SUITE, seed=1), tmp_path)
    with pytest.raises(FileExistsError, match="other models"):
        measure_drift([replace(row, steps=1) for row in rows()], SUITE, tmp_path)


def test_a_stopped_evaluation_goes_on_after_its_finished_rows(tmp_path: Path) -> None:
    suite = replace(SUITE, switch=False)
    whole = measure_drift(rows(), suite, tmp_path / "whole")

    def stop(name: str, done: int, total: int) -> None:
        if name == "teacher 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="2 finished rows are kept"):
        measure_drift(rows(), suite, tmp_path / "a", stop)
    made = set[str]()
    again = measure_drift(rows(), suite, tmp_path / "a", lambda name, done, total: made.add(name))
    assert made == {"teacher 2", "real clips", "reference"}
    assert again == whole


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    row = rows()[0]
    with pytest.raises(ValueError, match="different name"):
        measure_drift([row, row], SUITE, tmp_path)
    large = row.model.with_card(height=64, width=64)
    with pytest.raises(ValueError, match="drift is measured on the built-in world"):
        measure_drift([replace(row, model=large)], SUITE, tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="did not write"):
        measure_drift([row], SUITE, tmp_path)
    for times in ((1,), (2, 4), (1, 4, 4)):
        with pytest.raises(ValueError, match="times must rise from 1"):
            DriftSuite(times=times)
    assert isinstance(Rendered(num_frames=4), LongClips) and running.KEPT_ACCURACY == 0.95
