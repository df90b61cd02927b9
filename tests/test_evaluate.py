"""A whole evaluation with tiny real networks, and what it is made of."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional

from fewstep.core.finite import NonFiniteError
from fewstep.diffusion import Contract, Exact, Renoise, StepCountError
from fewstep.evaluate import (
    Entry,
    Report,
    Suite,
    count_flops,
    describe_machine,
    details,
    entries,
    evaluate,
    load_report,
    measure_latency,
    peak_memory,
    table,
    write_report,
)
from fewstep.evaluate.cases import Cases, true_clips
from fewstep.evaluate.compare import make_truth
from fewstep.evaluate.features.extractors import feature_map
from fewstep.evaluate.measure import Meter
from fewstep.evaluate.page.animate import enlarge, fitted, gif_bytes, grid_gif
from fewstep.evaluate.page.report import best_student, lead, read_curves
from fewstep.evaluate.page.svg import Point, curve, running_mean, scatter
from fewstep.evaluate.sampling import prepare, sample, sample_truth
from fewstep.models import Card, ClipFeatures, VideoModel
from fewstep.models.runtime import effective
from fewstep.world.checker import read_scenes
from fewstep.world.grammar import ATTRIBUTES, describe, parse, world_prompts
from support_evaluate import guided_teacher

SMALL = Suite(prompts=4, seeds_per_prompt=2, batch=4, features="pooled", latency_runs=3, latency_budget=0.5, previews=3)


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return guided_teacher(steps=4, num_frames=4)


@pytest.fixture(scope="module")
def student(teacher: VideoModel) -> VideoModel:
    contract = Contract(sampler=Renoise(), steps=2, grid=Exact(grids=((1.0, 0.0), (1.0, 0.5, 0.0))))
    return VideoModel(replace(teacher.card, name="tiny student", role="student", contract=contract), teacher.parts)


@pytest.fixture(scope="module")
def finished(teacher: VideoModel, student: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    rows = [
        Entry(name="teacher 4", model=teacher),
        Entry(name="teacher 2", model=teacher, steps=2),
        Entry(name="student 2", model=student),
        Entry(name="student 1", model=student, steps=1),
    ]
    return evaluate(rows, SMALL, folder), folder


# --- the whole --------------------------------------------------------------------------------------------------------


def test_results_file(finished: tuple[Report, Path]):
    report, folder = finished
    tree = json.loads((folder / "results.json").read_text())
    assert {"rows", "machine", "versions", "seeds", "suite", "frechet_features", "frechet_floor", "truth"} <= set(tree)
    wanted = "name steps nfe accuracy accuracy_ci frechet frechet_n motion diversity flicker seconds flops memory_mb"
    for row in tree["rows"]:
        assert set(wanted.split()) <= set(row)
        assert 0 <= row["accuracy_ci"][0] <= row["accuracy"] <= row["accuracy_ci"][1] <= 1
        assert set(row["attributes"]) == set(row["attributes_ci"]) == set(ATTRIBUTES)
        for name, (low, high) in row["attributes_ci"].items():
            assert 0 <= low <= row["attributes"][name] <= high <= 1 and high - low > 0.2  # 8 clips of 4 prompts
        assert row["frechet_n"] == 8
        assert row["seconds"] > 0 and row["seconds_p95"] >= row["seconds"] and row["seconds_runs"] >= 3
    assert [(row["steps"], row["nfe"]) for row in tree["rows"]] == [(4, 8), (2, 4), (2, 2), (1, 1)]
    assert load_report(folder) == report


def test_few_prompts_are_said_and_one_has_no_intervals(
    finished: tuple[Report, Path], teacher: VideoModel, student: VideoModel, tmp_path: Path
):
    assert [note for note in finished[0].notes if "4 prompts are few" in note]
    rows = [Entry(name="teacher 2", model=teacher, steps=2), Entry(name="student 2", model=student)]
    report = evaluate(rows, replace(SMALL, prompts=1, seeds_per_prompt=4), tmp_path)
    assert [note for note in report.notes if "one prompt says nothing" in note]
    hero = report.row("student 2")
    assert hero.gain is not None and hero.gain.accuracy is not None and hero.accuracy is not None
    found = (
        hero.accuracy_ci,
        hero.attributes_ci,
        hero.frechet_ci,
        hero.motion_ci,
        hero.gain.accuracy_ci,
        hero.gain.frechet_ci,
    )
    assert set(found) == {None}
    assert "One prompt says nothing" in lead(report, hero)
    assert load_report(tmp_path) == report and write_report(tmp_path).is_file()


def test_pictures_are_evaluated_as_clips_of_one_frame(tmp_path: Path):
    """Whatever needs time, or reads direction and speed, is left out with the reason; distances and diversity stay."""
    image = guided_teacher(steps=3, num_frames=1)
    rows = [Entry(name="teacher 3", model=image), Entry(name="teacher 1", model=image, steps=1)]
    report = evaluate(rows, replace(SMALL, features="auto"), tmp_path)
    row = report.row("teacher 1")
    assert (row.motion, row.flicker, row.motion_ci, row.motion_absolute, row.accuracy) == (None,) * 5
    assert row.diversity is not None and row.frechet is not None and row.frechet > 0
    assert report.frechet_features.startswith("pooled") and report.truth is not None and report.truth.motion is None
    assert [note for note in report.notes if "these models make pictures" in note]
    assert not [note for note in report.notes if "huffled frames" in note]
    page = write_report(tmp_path).read_text()
    assert "Motion relative" not in page and "Diversity relative" in page
    assert load_report(tmp_path) == report
    with pytest.raises(ValueError, match=r"1 \(pictures\) or at least 3"):
        prepare([Entry(name="two", model=guided_teacher(steps=1, num_frames=2))], SMALL)


def test_the_reference_row_is_one_and_only_students_have_gains(finished: tuple[Report, Path]):
    report, _ = finished
    first = report.row("teacher 4")
    assert (first.motion, first.diversity, first.flicker) == (1, 1, 1)
    assert report.truth is not None
    assert report.truth.accuracy == 1
    gains = {row.name: row.gain and row.gain.baseline for row in report.rows}
    assert gains == {"teacher 4": None, "teacher 2": None, "student 2": "teacher 2", "student 1": None}


def test_the_cost_grows_with_the_network_evaluations(finished: tuple[Report, Path], teacher: VideoModel):
    """And only who is guided encodes the negative prompt, once, as every condition is read once."""
    report, _ = finished
    four, two, one = (report.row(name).flops or 0 for name in ("teacher 4", "student 2", "student 1"))
    per_call = two - one
    assert per_call > 0
    negative = count_flops(lambda: teacher.text.encode([teacher.card.negative_prompt]))
    text = teacher.text.encode(["a"]).text
    words = count_flops(lambda: [block.cross.words(text) for block in teacher.denoiser.backbone.blocks])
    assert four == pytest.approx(one + 7 * per_call + negative + words, rel=0.001)  # 8 evaluations, two texts


def test_evaluating_twice_gives_the_same_figures(finished: tuple[Report, Path], teacher: VideoModel, tmp_path: Path):
    report, _ = finished
    again = evaluate([Entry(name="teacher 4", model=teacher)], replace(SMALL, batch=8), tmp_path)
    before, after = report.row("teacher 4"), again.row("teacher 4")
    assert after.motion_absolute == pytest.approx(before.motion_absolute, rel=1e-4)  # whatever the batch size
    assert after.frechet == pytest.approx(before.frechet, rel=1e-3)


def test_rows_start_from_the_same_noise(teacher: VideoModel, student: VideoModel):
    entries = [Entry(name="a", model=teacher, steps=1, guidance_scale=1.0), Entry(name="b", model=student, steps=1)]
    bench = prepare(entries, SMALL)
    first, second = (sample(entry, bench) for entry in entries)
    assert bench.paired
    torch.testing.assert_close(first.features, second.features)  # the same networks, one step without guidance


def test_models_without_a_checker_are_measured_against_the_teacher(teacher: VideoModel, tmp_path: Path):
    rows = [Entry(name="teacher 4", model=teacher), Entry(name="teacher 1", model=teacher, steps=1)]
    suite = replace(SMALL, texts=("a cat in the rain", "two boats at dawn", "a city at night"))
    report = evaluate(rows, suite, tmp_path)
    assert report.truth is None
    assert [row.accuracy for row in report.rows] == [None, None]
    assert report.row("teacher 4").frechet is None
    assert report.row("teacher 1").frechet is not None
    assert any("Accuracy: not measured" in note for note in report.notes)
    assert load_report(tmp_path) == report
    assert "This page has no student" in write_report(tmp_path).read_text()


def test_progress_counts_every_network_step(teacher: VideoModel):
    seen: list[tuple[str, int, int]] = []
    entry = Entry(name="teacher 4", model=teacher)
    sample(entry, prepare([entry], SMALL), progress=lambda *a: seen.append(a))
    assert seen[-1] == ("teacher 4", 8, 8)  # two batches of four steps
    assert [done for _, done, _ in seen] == list(range(1, 9))


def test_what_cannot_be_compared_is_refused(teacher: VideoModel, student: VideoModel):
    one = Entry(name="a", model=teacher)
    with pytest.raises(ValueError, match="a different name to each"):
        prepare([one, one], SMALL)
    with pytest.raises(StepCountError, match="trained for 1, 2"):
        prepare([one, Entry(name="b", model=student, steps=3)], SMALL)
    with pytest.raises(ValueError, match="not among the entries"):
        prepare([one], replace(SMALL, reference="b"))
    with pytest.raises(ValueError, match="at least 3"):
        prepare([one], replace(SMALL, num_frames=2))
    other = VideoModel(replace(teacher.card, num_frames=6), teacher.parts)
    with pytest.raises(ValueError, match="give models of one size"):
        prepare([one, Entry(name="b", model=other)], SMALL)
    with pytest.raises(ValueError, match="at least 4 clips"):
        Suite(prompts=1, seeds_per_prompt=2)


def test_a_bad_number_stops_the_evaluation(teacher: VideoModel):
    bench = prepare([Entry(name="a", model=teacher)], SMALL)
    meter = Meter(bench.features, bench.cases)
    with pytest.raises(NonFiniteError, match="prompts 0 to 0"):
        meter.add(torch.full((2, 3, 4, 32, 32), float("nan")), 0, 1)


# --- prompts and truth ------------------------------------------------------------------------------------------------


def test_prompts_are_fixed_by_their_seed_and_readable():
    prompts = world_prompts(20, 0.5, 3)
    assert prompts == world_prompts(20, 0.5, 3) != world_prompts(20, 0.5, 4)
    plain = sum(describe(parse(prompt)) == prompt for prompt in prompts)
    assert 0 < plain < 20
    assert read_scenes(prompts, 32, 32) is not None
    assert read_scenes(prompts, 64, 64) is None
    assert read_scenes((*prompts, "a cat"), 32, 32) is None


def test_seeds_are_unique_and_the_seeds_of_a_prompt_stay_together():
    cases = Cases(("a", "b", "c"), None, 2, 100)
    assert [cases.seeds(p) for p in range(3)] == [(100, 101), (102, 103), (104, 105)]
    assert len(cases) == 6


def test_rendered_clips_are_right_and_their_shuffled_frames_are_not(teacher: VideoModel):
    bench = prepare([Entry(name="a", model=teacher)], replace(SMALL, prompts=24, num_frames=12))
    assert bench.truth is not None and bench.truth.sets == 2
    truth, second = (sample_truth(bench, bench.truth, which) for which in range(2))
    figures = make_truth(second, truth, 0.0, "renderer")
    assert figures.accuracy > 0.9
    assert figures.motion == pytest.approx(1, abs=0.2)
    assert not torch.equal(truth.features, second.features)
    scenes = bench.cases.scene_per_clip(0, 24)
    meter = Meter(bench.features, bench.cases, bench.judges)
    clips = true_clips(scenes, 12, torch.Generator().manual_seed(1))
    meter.add(clips[:, :, torch.randperm(12, generator=torch.Generator().manual_seed(0))], 0, 24)
    assert meter.done().by_prompt("right", 2).mean() < 0.2


def test_the_feature_map_is_named():
    assert "no network" in feature_map("pooled", (32, 32), torch.device("cpu")).name
    assert feature_map("auto", (480, 832), torch.device("cpu")).name.startswith("pooled")
    with pytest.raises(FileNotFoundError):
        feature_map("/nowhere", (32, 32), torch.device("cpu"))


def test_features_of_a_folder_and_bfloat16_are_recorded(teacher: VideoModel, tmp_path: Path):
    VideoModel(Card(name="eye"), {"features": ClipFeatures(width=8)}).save(tmp_path / "eye")
    suite, half = replace(SMALL, features=str(tmp_path / "eye")), copy.deepcopy(teacher).to(torch.bfloat16)
    report = evaluate([Entry(name="teacher 4", model=half)], suite, tmp_path)
    assert report.frechet_features.startswith(str(tmp_path / "eye"))
    assert report.rows[0].frechet_infinity is None  # 8 clips for 32 features
    assert any("bfloat16" in note for note in report.notes) and report.runtime["arithmetic"].startswith("bfloat16")
    assert report.models == {"teacher 4": teacher.fingerprint("denoiser")}  # it is the same model
    assert load_report(tmp_path).runtime == effective(half) != effective(teacher)
    assert "auto (matmul)" in write_report(tmp_path).read_text()
    with pytest.raises(ValueError, match="the models run in different ways; give all of them one Runtime"):
        evaluate([Entry(name="a", model=half), Entry(name="b", model=teacher)], suite, tmp_path / "both")


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_counted_exactly(mode, masked: bool):
    batch, heads, n, m, d = 2, 3, 10, 14, 8
    q, k, v = torch.randn(batch, heads, n, d), torch.randn(batch, heads, m, d), torch.randn(batch, heads, m, d)
    mask = torch.ones(n, m, dtype=torch.bool) if masked else None
    with mode():
        counted = count_flops(lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert counted == 4 * batch * heads * n * m * d


def test_matrix_products_are_counted_beside_attention():
    x = torch.randn(5, 7)
    with torch.inference_mode():
        assert count_flops(lambda: functional.linear(x, torch.randn(11, 7))) == 2 * 5 * 7 * 11


def test_latency_and_memory():
    calls: list[int] = []
    spent = measure_latency(lambda: calls.append(1), runs=5, warmup=2)
    assert len(calls) == 7 and len(spent.runs) == 5
    assert 0 <= spent.p50 <= spent.p95
    size, what = peak_memory(lambda: torch.ones(2**22).sum())
    assert size > 2**24 and what
    assert describe_machine().cores >= 1


# --- pictures ---------------------------------------------------------------------------------------------------------


class _Reader(HTMLParser):
    """Collects what a page loads, and which tags stay open."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(finished: tuple[Report, Path], tmp_path: Path):
    report, folder = finished
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "note": "x"}\n{"step": 10, "loss": 0.5}\n{"st')
    page = write_report(folder, run=tmp_path, recipe="lr: 1e-4 # <tag>").read_text()
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    assert len(reader.loads) == 3 * 4  # prompts x rows
    assert all(load.startswith("data:image/gif;base64,") for load in reader.loads)
    assert "http" not in page and "$" not in page
    assert "&lt;tag&gt;" in page and "Training" in page
    for prompt in (preview["prompt"] for preview in report.previews):
        assert prompt in page


def test_the_lead_says_so_when_training_did_not_help(finished: tuple[Report, Path]):
    report, _ = finished
    hero = report.row("student 2")
    assert hero.gain is not None
    worse = replace(hero, gain=replace(hero.gain, accuracy=-0.2, accuracy_ci=(-0.3, -0.1)))
    unsure = replace(hero, gain=replace(hero.gain, accuracy=0.1, accuracy_ci=(-0.1, 0.3)))
    better = replace(hero, gain=replace(hero.gain, accuracy=0.2, accuracy_ci=(0.1, 0.3)))
    assert "made it worse" in lead(report, worse)
    assert "margin of error" in lead(report, unsure)
    assert lead(report, better).endswith("without training: 0 %.")
    rows = tuple(replace(row, accuracy=0.5, frechet=1.0) for row in report.rows)
    assert best_student(replace(report, rows=rows)).name == "student 1"  # of equals the one with fewest steps


def test_the_terminal_table_has_every_row(finished: tuple[Report, Path]):
    report, _ = finished
    assert table(report).row_count == len(report.rows) + 1
    assert details(report).row_count == len(report.rows)
    heads = [str(column.header) for column in details(report).columns]
    assert set(ATTRIBUTES) <= set(heads) and {"p95 s/clip", "MB"} <= set(heads)


def test_rows_of_a_comparison(teacher: VideoModel, student: VideoModel):
    def listed(*counts: int) -> list[tuple[str, int]]:
        return [(entry.name, entry.contract.steps) for entry in entries(teacher, student, counts)]

    assert listed() == [("teacher 4", 4), ("teacher 2", 2), ("teacher 1", 1), ("student 2", 2), ("student 1", 1)]
    assert listed(1) == [("teacher 4", 4), ("teacher 1", 1), ("student 1", 1)]
    assert [name for name, _ in listed(4)] == ["teacher 4", "student 4"]  # the reference is not repeated


def test_another_number_of_frames_is_measured_and_noted(teacher: VideoModel, tmp_path: Path):
    report = evaluate([Entry(name="teacher 4", model=teacher)], replace(SMALL, num_frames=6), tmp_path)
    assert any("Clips have 6 frames; the models were trained for 4" in note for note in report.notes)


def test_gif_keeps_frames_colours_and_speed(tmp_path: Path):
    clip = torch.full((3, 5, 8, 8), -1.0)
    for f in range(5):
        clip[0, f, f] = 1.0
    path = tmp_path / "clip.gif"
    path.write_bytes(gif_bytes(clip, fps=10, scale=4))
    image = Image.open(path)
    assert image.size == (32, 32) and image.n_frames == 5
    image.seek(3)
    frame = image.convert("RGB")
    assert image.info["duration"] == 100
    assert frame.getpixel((5, 13)) == (255, 0, 0) and frame.getpixel((5, 17)) == (0, 0, 0)


def test_grid_gif(tmp_path: Path):
    columns = {"teacher": torch.zeros(2, 3, 4, 8, 8), "student": torch.ones(2, 3, 4, 8, 8)}
    columns["student"][:, :, 1::2] = 0
    with Image.open(grid_gif(tmp_path / "grid.gif", columns, scale=4)) as image:
        assert image.size == (2 * (32 + 6), 18 + 2 * (32 + 6))
        assert image.n_frames == 4
    with pytest.raises(ValueError, match="the same shape"):
        grid_gif(tmp_path / "grid.gif", columns | {"odd": torch.zeros(1, 3, 4, 8, 8)})


def test_sizes_of_pictures():
    clip = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 1, 2, 2).expand(1, 3, 1, 2, 2)
    assert enlarge(clip, 2)[0, 0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert fitted(torch.zeros(1, 3, 2, 480, 832, dtype=torch.uint8), 208).shape == (1, 3, 2, 120, 208)
    assert fitted(clip, 208) is clip


def test_charts():
    assert running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert "no finite value" in curve([0, 1], [float("nan")] * 2)
    assert curve([0], [1.0]).startswith("<svg")
    points = [Point(f"row {i}", 0.5, 0.5, "student") for i in range(6)]
    assert scatter(points, x_name="seconds", y_name="right").count("<circle") == 6


def test_curves_are_read_by_name(tmp_path: Path):
    lines = ['{"step": 1, "a": 1, "time": 3, "ok": true}', '{"step": 2, "a": NaN, "b": 4.5}', '{"step": 3, "c": NaN}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = read_curves(tmp_path / "metrics.jsonl")
    with pytest.raises(FileNotFoundError, match="training run"):
        read_curves(tmp_path / "nowhere.jsonl")
    assert set(found) == {"a", "b"} and found["b"] == ([2.0], [4.5])
