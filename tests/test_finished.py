"""Finished videos: matched, brought to one format, measured, compared in words, and shown on a page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.cli import main
from fewstep.data import write_video
from fewstep.data.base import DataError
from fewstep.data.video import ClipError, read_video, to_floats, to_pixels
from fewstep.evaluate.finished import judge, players, reading
from fewstep.evaluate.finished.figures import measure, parts, vlite
from fewstep.evaluate.finished.findings import Finding, apart, find, sentence, verdict
from fewstep.evaluate.finished.judge import Options, compare_videos
from fewstep.evaluate.finished.matching import match
from fewstep.evaluate.finished.measures import BY_NAME, MEASURES
from fewstep.evaluate.finished.reading import Format, changes, look, look_at, meet, read
from fewstep.evaluate.page.finished import worst_first, write_page
from fewstep.metrics import flicker, frozen, luma, motion, repetition, saturation, sharpness
from fewstep.metrics.repetition import coarse
from fewstep.metrics.statistics import ratio_interval
from fewstep.metrics.vlite import motion_smoothness
from support_finished import FRAMES, SIDE, film, films, pictures, stopped, vivid

pytestmark = pytest.mark.usefixtures("single_thread")
NOTHING = dict.fromkeys(BY_NAME)


def empty(folder: Path, *names: str) -> Path:
    """Files without content: enough to be matched."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# --- matching -----------------------------------------------------------------------------------------------------------


def test_files_match_by_name_below_their_folders_in_natural_order(tmp_path: Path) -> None:
    a = empty(tmp_path / "a", "x-10.mp4", "x-2.mp4", "deep/x.mp4", "notes.txt", ".hidden/y.mp4")
    b = empty(tmp_path / "b", "x-2.gif", "x-10.webm", "deep/x.mp4")
    found = match([a, b])
    assert [case.name for case in found.cases] == ["deep/x", "x-2", "x-10"]
    assert found.cases[1].files == (a / "x-2.mp4", b / "x-2.gif")
    assert found.sides == ("a", "b") and found.how == "by name" and found.left_out == ()


def test_missing_partners_are_refused_or_named(tmp_path: Path) -> None:
    a, b = empty(tmp_path / "a", "1.mp4", "2.mp4", "3.mp4"), empty(tmp_path / "b", "2.mp4", "3.mp4", "4.mp4")
    with pytest.raises(DataError, match=r"a lacks 4; b lacks 1\. .*--allow-missing"):
        match([a, b])
    found = match([a, b], allow_missing=True)
    assert [case.name for case in found.cases] == ["2", "3"]
    assert found.left_out == tuple(f"Left out, because a partner is missing: {w}." for w in ("a lacks 4", "b lacks 1"))
    with pytest.raises(DataError, match="no video has the same name in all folders"):
        match([a, empty(tmp_path / "c", "z.mp4")], allow_missing=True)


def test_a_table_of_prompts_matches_by_name_and_a_text_file_by_order(tmp_path: Path) -> None:
    a, b = empty(tmp_path / "a", "clip-2.mp4", "clip-10.mp4"), empty(tmp_path / "b", "v1.mp4", "v2.mp4")
    lines = tmp_path / "prompts.txt"
    lines.write_text("a duck\n\na goose\n")
    found = match([a, b], lines)
    assert [(case.name, case.files[1].name, case.prompt) for case in found.cases] == [
        ("clip-2", "v1.mp4", "a duck"), ("clip-10", "v2.mp4", "a goose"),
    ]  # fmt: skip
    assert [case.files[0].name for case in found.cases] == ["clip-2.mp4", "clip-10.mp4"]
    table = tmp_path / "prompts.csv"
    table.write_text('video,caption\nclip-2.mp4,"a duck, swimming"\nclip-10,a goose\n')
    found = match([a, empty(tmp_path / "c", "clip-2.mp4", "clip-10.mp4")], table)
    assert [case.prompt for case in found.cases] == ["a duck, swimming", "a goose"]
    lines.write_text("a duck\n")
    with pytest.raises(DataError, match="has 1 prompts, but a has 2 files, b has 2 files"):
        match([a, b], lines)
    table.write_text("video,caption\nclip-2.mp4,a duck\n")
    with pytest.raises(DataError, match="a has clip-10 without a row in the prompt file"):
        match([a, tmp_path / "c"], table)


def test_two_files_are_one_case_and_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b = empty(tmp_path / "one/out", "x.mp4"), empty(tmp_path / "two/out", "x.mp4")
    assert match([a, b]).sides == ("one/out", "two/out")
    (case,) = match([a / "x.mp4", b / "x.mp4"]).cases
    assert case.name == "x" and case.files == (a / "x.mp4", b / "x.mp4")
    with pytest.raises(DataError, match="is given twice"):
        match([a, tmp_path / "one/../one/out"])
    with pytest.raises(DataError, match="only folders, or only files"):
        match([a, b / "x.mp4"])


# --- reading ------------------------------------------------------------------------------------------------------------


def test_files_meet_in_the_smallest_size_rate_and_length() -> None:
    wide, tall = Format(81, 24, 144, 256), Format(40, 8, 256, 144)
    assert meet([wide, tall]) == Format(27, 8, 144, 144)  # 3.375 s at 8 frames per second
    assert meet([wide, wide]) == wide and meet([wide], 5) == Format(5, 24, 144, 256)
    assert changes(wide, meet([wide, tall])) == ("size 256 x 144 to 144 x 144", "rate 24 to 8 fps")
    assert changes(tall, meet([wide, tall])) == ("size 144 x 256 to 144 x 144", "length 5.00 to 3.38 s")
    assert changes(wide, wide) == () and changes(wide, Format(5, 24, 144, 256), 5) == ()


def test_a_video_too_large_for_memory_is_scaled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGEST", 3 * 81 * 72 * 128)
    assert meet([Format(81, 24, 144, 256)]) == Format(81, 24, 72, 128)


def test_a_lower_rate_takes_the_frame_nearest_in_time(tmp_path: Path) -> None:
    path = films(tmp_path, count=1, fps=12) / "film-1.mp4"
    own = look(path)
    assert own == Format(FRAMES, 12, SIDE, SIDE)
    whole = read(path, own, own)
    assert torch.equal(whole, read_video(path, FRAMES))
    assert torch.equal(read(path, own, Format(8, 8, SIDE, SIDE)), whole[[0, 2, 3, 4, 6, 8, 9, 10]])
    assert read(path, own, Format(6, 6, 16, 20)).shape == (6, 16, 20, 3)
    shutil.copy(films(tmp_path / "b", lambda clip: clip[:, :5], count=1, fps=12) / "film-1.mp4", path)
    with pytest.raises(ClipError, match="has changed while it was compared"):
        read(path, own, own)


def test_all_unreadable_files_are_named_before_anything_is_measured(tmp_path: Path) -> None:
    a, b = films(tmp_path / "a"), films(tmp_path / "b")
    (b / "film-1.mp4").write_text("no video")
    (b / "film-3.mp4").write_bytes((a / "film-3.mp4").read_bytes()[:700])
    with pytest.raises(DataError) as refusal:
        look_at(match([a, b]).cases)
    assert str(b / "film-1.mp4") in str(refusal.value) and str(b / "film-3.mp4") in str(refusal.value)
    with pytest.raises(DataError, match="one side has a picture and another one a video"):
        look_at(match([a, pictures(tmp_path / "c")]).cases)


# --- figures ------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_whole_clip_however_many_frames_are_measured_at_once(monkeypatch) -> None:
    frames = to_pixels(film(1, 21))
    clip = to_floats(frames)[None]
    whole = measure(frames, 8).figures
    monkeypatch.setattr("fewstep.evaluate.finished.figures.AT_ONCE", 5 * SIDE * SIDE * 3)
    split = list(parts(frames))
    assert [len(part.runs(1)) for part in split] == [5, 5, 5, 5, 1]
    for span in (1, 2, 3):
        assert torch.equal(
            torch.cat([part.runs(span) for part in split])[:, :, 0], clip[0, :, : 22 - span].transpose(0, 1)
        )
    again = measure(frames, 8).figures
    assert {name for name, value in again.items() if value is None} == {
        name for name, value in whole.items() if value is None
    }
    known = {name: value for name, value in whole.items() if value is not None}
    assert {name: again[name] for name in known} == pytest.approx(known, rel=1e-6)
    wanted = {
        "motion": motion(clip), "flicker": flicker(clip), "saturation": saturation(clip), "sharpness": sharpness(clip),
        "frozen": frozen(clip), "repetition": repetition(coarse(clip)), "vlite.motion_smoothness": motion_smoothness(clip),
    }  # fmt: skip
    assert {name: whole[name] for name in wanted} == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-6)
    assert whole["cuts"] == 0 and whole["black"] == 0 and whole["clip_score"] is None
    assert set(whole) == set(BY_NAME)


def test_a_picture_has_no_figures_of_time() -> None:
    figures = measure(to_pixels(film(1, 1)), None).figures
    known = {name for name, value in figures.items() if value is not None}
    assert known == {"brightness", "saturation", "contrast", "sharpness", "clipped", "black"}
    short = measure(to_pixels(film(1, 2)), 8).figures
    assert short["motion"] is not None and short["flicker"] is None and short["brightness_drift"] is None


def test_flickering_counts_for_videos_that_do_not_move() -> None:
    frames = to_pixels(film(1, 24, 64))
    assert vlite(frames, 8)["vlite.dynamic_degree"] == 1 and vlite(frames, 8)["vlite.temporal_flickering"] is None
    still = vlite(frames[torch.zeros(24, dtype=torch.long)], 8)
    assert vlite(frames, 8, order=torch.zeros(24, dtype=torch.long)) == still
    assert still["vlite.dynamic_degree"] == 0 and still["vlite.temporal_flickering"] == 1
    assert vlite(frames, 24)["vlite.dynamic_degree"] == 1  # every third frame


def test_flow_is_measured_at_about_eight_frames_per_second() -> None:
    """One pixel per frame of a side of 64 is slow at 8 frames per second, and fast at 24."""
    picture = to_pixels(film(1, 1, 64))[0]
    rolling = torch.stack([picture.roll(i, 1) for i in range(48)])
    assert vlite(rolling, 8)["vlite.dynamic_degree"] == 0 and vlite(rolling, 24)["vlite.dynamic_degree"] == 1


def test_flow_takes_every_third_frame_also_from_part_to_part(monkeypatch: pytest.MonkeyPatch) -> None:
    frames, seen = to_pixels(film(1, 20)), []
    monkeypatch.setattr("fewstep.evaluate.finished.figures.AT_ONCE", 5 * SIDE * SIDE * 3)
    monkeypatch.setattr("fewstep.evaluate.finished.figures._moves", lambda y: seen.append(y) or True)
    vlite(frames, 24)
    torch.testing.assert_close(seen[0], luma(to_floats(frames)[None, :, ::3])[0])


def test_drift_is_measured_frame_by_frame() -> None:
    clip = film(2, 16)
    fading = to_pixels(clip * torch.linspace(1, 0.2, 16)[:, None, None])
    figures = measure(fading, 8).figures
    assert figures["contrast_drift"] is not None and figures["contrast_drift"] < -0.8
    assert figures["saturation_drift"] is not None and figures["saturation_drift"] < -0.8
    steady = measure(to_pixels(clip), 8).figures
    assert figures["sharpness_drift"] == pytest.approx(steady["sharpness_drift"], abs=0.05)
    assert abs(steady["contrast_drift"] or 0) < 0.3


# --- findings -----------------------------------------------------------------------------------------------------------


def found(name: str, mine: list[float | None], reference: list[float | None]) -> Finding:
    rows = [[NOTHING | {name: value} for value in values] for values in (mine, reference)]
    (one,) = find("new", [f"v{i}" for i in range(len(mine))], *rows)
    return one


def test_a_ratio_is_that_of_the_means_with_its_interval_over_videos() -> None:
    own, other = [2.2, 4.1, 6.3, 8.0], [1.0, 2.0, 3.0, 4.0]
    one = found("saturation", [*own, None], [*other, 1.0])  # type: ignore[list-item]
    assert one.videos == 4 and one.compared == pytest.approx(2.06)
    assert one.interval == pytest.approx(tuple(ratio_interval(torch.tensor(own), torch.tensor(other))))
    assert (one.more, one.less, one.verdict) == (4, 0, "more")
    assert sentence(one) == f"2.1 times the reference's saturation [{one.interval[0]:.2f}, {one.interval[1]:.2f}], " \
                            "more in 4 of 4 videos"  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        ([1.2, 1.21, 1.19], "more"),
        ([0.8, 0.81, 0.79], "less"),
        ([1.05, 1.051, 1.049], "equal"),  # another mean, but within a tenth
        ([1.0, 1.6, 0.9], "unclear"),
        ([1.2], "unclear"),
    ],
)
def test_a_measure_is_named_if_the_whole_interval_is_beyond_the_margin(mine: list[float], expected: str) -> None:
    one = found("motion", mine, [1.0] * len(mine))  # type: ignore[arg-type]
    assert one.verdict == expected and (one.interval is None) == (len(mine) < 2)


def test_differences_have_margins_of_their_own() -> None:
    assert found("frozen", [0.1, 0.11, 0.1], [0.0, 0.0, 0.01]).verdict == "more"
    assert found("frozen", [0.02, 0.03, 0.02], [0.0, 0.0, 0.01]).verdict == "equal"
    assert found("frozen", [0.11, 0.9, 0.5], [0.0, 0.8, 0.4]).verdict == "more"  # video by video
    one = found("black", [0.0, 0.5, 0.0], [0.0, 0.0, 0.0])
    assert one.verdict == "unclear" and one.faults == ("v1",)
    assert found("saturation", [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]).faults == ()
    assert found("motion", [1.0, 2.0], [0.0, 0.0]).compared is None


def test_verdicts_in_words() -> None:
    names = ["v0", "v1", "v2"]
    reference = [NOTHING | {"motion": 1.0, "frozen": 0.0, "saturation": 0.2, "cuts": 0.0} for _ in names]
    mine = [
        NOTHING | {"motion": 0.001 * (4 + i), "frozen": 1.0, "saturation": 0.2, "cuts": float(i == 2)} for i in range(3)
    ]
    assert list(verdict(find("new", names, mine, reference), "old")) == [
        "new: almost nothing of the reference's motion [0.00, 0.01], less in 3 of 3 videos.",
        "new: frozen frames 100 %, the reference's 0 % (difference +100.0 to +100.0 points), more in 3 of 3 videos.",
        "new: more cuts than old in 1 of 3 videos: v2.",
        "new: about equal to old in saturation.",
    ]
    same = list(verdict(find("new", names, reference, reference), "old"))
    assert same[0] == "new: no difference from old is shown."
    (first, *_) = verdict(find("new", names[:1], mine[:1], reference[:1]), "old")
    assert first.startswith("new: one video says nothing about others")


def test_margins_apart_put_the_worst_measure_first() -> None:
    mine = NOTHING | {"motion": 0.5, "saturation": 4.0, "frozen": 0.01}
    reference = NOTHING | {"motion": 1.0, "saturation": 1.0, "frozen": 0.0, "cuts": 2.0}
    assert [(m.name, margins > 0) for m, margins in apart(mine, reference)] == [("saturation", True), ("motion", False)]
    assert BY_NAME["frozen"].distance(0.15, 0.05) == pytest.approx(2)
    assert BY_NAME["contrast"].distance(1.21 * 1.01 - 0.01, 1.0) == pytest.approx(
        2
    )  # two tenths, above a floor of 0.01
    assert BY_NAME["motion"].distance(0.0, 0.0) == 0


# --- the whole ------------------------------------------------------------------------------------------------------------


def test_a_comparison_names_what_was_changed(tmp_path: Path) -> None:
    sides = [films(tmp_path / "old"), films(tmp_path / "vivid", vivid), films(tmp_path / "stopped", stopped)]
    sides.append(films(tmp_path / "same"))
    made = compare_videos(sides, tmp_path / "out", Options(num_frames=10))
    verdicts = {(f.side, f.measure): f.verdict for f in made.findings}
    assert verdicts["vivid", "contrast"] == "less" and verdicts["vivid", "frozen"] == "equal"
    assert verdicts["stopped", "motion"] == "less" and verdicts["stopped", "frozen"] == "more"
    assert {f.verdict for f in made.of("same") if f.interval is not None} == {"equal"}
    assert all(line.startswith(("vivid: ", "stopped: ", "same: ")) for line in made.verdict)
    assert made.videos[0].sides[0].compared_in == "32 x 32, 8 fps, 10 frames"
    assert made.controls["a still picture"]["vlite.motion_smoothness"] == 1
    shuffled = made.controls["frames shuffled"]["vlite.motion_smoothness"]
    assert shuffled is not None and shuffled < (made.videos[0].sides[0].figures["vlite.motion_smoothness"] or 0)
    assert any("3 videos are few" in note for note in made.notes)
    tree = json.loads((tmp_path / "out/results.json").read_text())
    assert tree["verdict"] == list(made.verdict) and len(tree["videos"]) == 3
    assert judge.load(tmp_path / "out") == tree


def test_each_side_meets_the_reference_alone(tmp_path: Path) -> None:
    """A small, slow side does not hide what is wrong with another one."""
    old, new = films(tmp_path / "old", fps=16), films(tmp_path / "new", stopped, fps=16)
    slow = films(tmp_path / "slow", lambda clip: clip[:, ::2], fps=8, side=24)
    alone = compare_videos([old, new], tmp_path / "a")
    both = compare_videos([old, slow, new], tmp_path / "b")
    assert both.of("new") == alone.findings
    shown = both.videos[0].sides[1]
    assert shown.compared_in == "24 x 24, 8 fps, 6 frames"
    assert shown.changes == ("old: size 32 x 32 to 24 x 24", "old: rate 16 to 8 fps")
    assert shown.reference != both.videos[0].sides[0].figures and both.videos[0].sides[2].changes == ()
    assert any(note.startswith("slow: size, rate or length differ") for note in both.notes)


def test_distances_need_four_videos_and_have_a_floor(tmp_path: Path) -> None:
    old, new = films(tmp_path / "old", count=5), films(tmp_path / "new", vivid, count=5)
    (one,) = compare_videos([old, new], tmp_path / "out", Options(features="pooled", num_frames=4)).distances
    assert one.n == 5 and one.value > 0 and one.interval is not None and one.interval[0] <= one.value <= one.interval[1]
    again = films(tmp_path / "same", count=5)
    (same,) = compare_videos([old, again], tmp_path / "b", Options(features="pooled", num_frames=4)).distances
    assert same.value == pytest.approx(0, abs=1e-6) and same.floor > 0
    few = compare_videos(
        [films(tmp_path / "c"), films(tmp_path / "d")], tmp_path / "e", Options(features="pooled", num_frames=4)
    )
    assert few.distances == () and any(note.startswith("Distance: not measured") for note in few.notes)


def test_pictures_are_clips_of_one_frame(tmp_path: Path) -> None:
    made = compare_videos([pictures(tmp_path / "a"), pictures(tmp_path / "b", vivid)], tmp_path / "out")
    assert {f.measure for f in made.findings} == {
        "brightness",
        "saturation",
        "contrast",
        "sharpness",
        "clipped",
        "black",
    }
    assert {f.measure: f.verdict for f in made.findings}["contrast"] == "less"
    assert (
        made.videos[0].sides[0].player.endswith(".png")
        and (tmp_path / "out" / made.videos[0].sides[1].player).is_file()
    )
    assert any("these are pictures" in note for note in made.notes)
    page = write_page(made, tmp_path / "out").read_text()
    assert "<video" not in page.split("<script>")[0] and page.count("<img") == 6


def test_the_page_shows_the_worst_case_first_and_plays_copies_beside_it(tmp_path: Path) -> None:
    old = films(tmp_path / "old", count=3)
    shutil.copytree(old, tmp_path / "new")
    write_video(tmp_path / "new/film-2.mp4", stopped(film(1)), fps=8)
    made = compare_videos([old, tmp_path / "new"], tmp_path / "out")
    assert next(video.name for _, video in worst_first(made)) == "film-2"
    made = replace(made, verdict=("<script>alert(1)</script>",))
    page = write_page(made, tmp_path / "out")
    text = page.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert text.index("<h3>film-2</h3>") < text.index("<h3>film-1</h3>")
    sources = [part.split('"')[0] for part in text.split('<video src="')[1:]]
    assert len(sources) == 6 and all((page.parent / source).is_file() and ".." not in source for source in sources)
    assert not any(word in text for word in ("http:", "https:", "file:"))


def test_copies_are_small_and_keep_their_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(players, "LONGEST", 16)
    name = players.write_player(tmp_path, 1, 4, to_pixels(film(0, 5)), 12.5)
    assert name == "videos/1/005.mp4" and look(tmp_path / name) == Format(5, 12.5, 16, 16)
    assert (players.scaled(torch.full((2, 40, 20, 3), 77, dtype=torch.uint8)) == 77).all()


def test_an_output_folder_is_used_again_only_for_comparisons(tmp_path: Path) -> None:
    old, new = films(tmp_path / "old", count=2), films(tmp_path / "new", count=2)
    out = tmp_path / "out"
    compare_videos([old, new], out)
    (new / "film-2.mp4").unlink()
    (old / "film-2.mp4").unlink()
    compare_videos([old, new], out)
    assert sorted(p.name for p in out.glob("videos/*/*")) == ["001.mp4", "001.mp4"]  # none of the earlier comparison
    (out / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match="did not write it"):
        compare_videos([old, new], out)
    for place in (old, old / "deep", tmp_path):
        with pytest.raises(DataError, match="give another output folder"):
            compare_videos([old, new], place)
    assert (old / "film-1.mp4").is_file()


def test_the_command_prints_the_verdict_and_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = films(tmp_path / "old"), films(tmp_path / "new", stopped)
    assert main(["compare", str(old), str(new), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert any("new: frozen frames" in line and "3 of 3 videos" in line for line in said)
    assert said[-1] == str(tmp_path / "out/compare.html") and Path(said[-1]).is_file()


def test_every_measure_is_explained() -> None:
    assert all(measure.about and measure.margin > 0 for measure in MEASURES) and len(BY_NAME) == len(MEASURES)


def test_a_picture_with_transparency_is_read(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 10), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert look(tmp_path / "a.png") == Format(1, None, 10, 20)
