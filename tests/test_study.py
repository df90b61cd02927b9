"""A blind study: copies that tell nothing, a page without the sides' names, and the preference from answers."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.cli import main
from fewstep.data.base import DataError
from fewstep.data.video import read_video
from fewstep.evaluate.finished.answers import COLUMNS, Answer, preferences, read_answers, told
from fewstep.evaluate.finished.reading import look
from fewstep.evaluate.finished.study import Study, StudyOptions, load_study, make_study
from fewstep.evaluate.page.study import write_study_page
from fewstep.metrics.statistics import clustered_wilson
from support_finished import films, stopped

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    sides = [films(tmp_path / "secret-old", count=6, fps=16), films(tmp_path / "secret-new", stopped, count=6, fps=8)]
    return make_study(sides, tmp_path / "study", StudyOptions(seed=3))


def write(path: Path, rows: list[tuple[object, ...]]) -> Path:
    """A file of answers: rater, question, pair, choice."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows(
            (study, rater, question, pair, "p", choice, 1.5) for study, rater, question, pair, choice in rows
        )
    return path


def test_copies_tell_nothing_and_the_key_tells_all(study: Study, tmp_path: Path) -> None:
    page = write_study_page(study, tmp_path / "study")
    raters = tmp_path / "study/page"
    assert sorted(p.name for p in (tmp_path / "study").iterdir()) == ["key.json", "page"]
    assert page.parent == raters and "secret" not in page.read_text()
    assert not any("secret" in str(path.relative_to(raters)) for path in raters.rglob("*"))
    formats = {look(path) for path in raters.glob("videos/*")}
    assert len(formats) == 1 and formats.pop().fps == 8  # neither size, rate nor length gives a side away
    assert sorted(pair.name for pair in study.pairs) == [f"film-{i}" for i in range(1, 7)]
    assert sorted(pair.p for pair in study.pairs) == [0, 0, 0, 1, 1, 1]
    for pair in study.pairs:
        moves = [float(read_video(raters / file, 6).float().diff(dim=0).abs().mean()) > 1 for file in pair.files]
        assert moves == ([True, False] if pair.p == 0 else [False, True])
    assert load_study(tmp_path / "study") == study


def test_the_seed_draws_pairs_and_their_sides(study: Study, tmp_path: Path) -> None:
    sides = [tmp_path / "secret-old", tmp_path / "secret-new"]
    again = make_study(sides, tmp_path / "again", StudyOptions(seed=3))
    assert again == study
    other = make_study(sides, tmp_path / "other", StudyOptions(seed=4, pairs=4))
    assert len(other.pairs) == 4 and other.id != study.id
    assert [(p.name, p.p) for p in other.pairs] != [(p.name, p.p) for p in study.pairs[:4]]
    assert make_study(sides, tmp_path / "other", StudyOptions(seed=3)) == study
    assert len(list((tmp_path / "other/page/videos").iterdir())) == 12
    with pytest.raises(DataError, match="--pairs 7: there are only 6"):
        make_study(sides, tmp_path / "more", StudyOptions(pairs=7))


def test_a_prompt_cannot_end_the_script_of_the_page(study: Study, tmp_path: Path) -> None:
    pairs = (replace(study.pairs[0], prompt="</script><b>bold"), *study.pairs[1:])
    text = write_study_page(replace(study, pairs=pairs), tmp_path).read_text()
    part = text.split('<script id="study" type="application/json">')[1].split("</script>")[0]
    assert json.loads(part)["pairs"][0]["prompt"] == "</script><b>bold"


def test_a_choice_is_turned_back_to_its_side(study: Study, tmp_path: Path) -> None:
    rows = [(study.id, "r1", 1, i + 1, "q" if pair.p == 0 else "p") for i, pair in enumerate(study.pairs)]
    rows[5] = (*rows[5][:4], "same")
    found = read_answers([write(tmp_path / "a.csv", rows), write(tmp_path / "copy.csv", rows)], study)  # sent twice
    assert [answer.score for answer in found] == [1, 1, 1, 1, 1, 0.5]
    (one,) = preferences(found, study)
    assert (one.answers, one.same, one.videos, one.raters) == (6, 1, 6, 1) and one.share == pytest.approx(5.5 / 6)
    assert one.by_raters is None and one.interval == one.by_videos


def answers(shares: list[list[float]]) -> list[Answer]:
    """Scores by rater, then by video."""
    return [Answer(f"r{i}", 1, j, score) for i, row in enumerate(shares) for j, score in enumerate(row)]


def test_the_interval_is_the_wider_one_of_raters_and_videos(study: Study) -> None:
    agree = [[1.0, 1, 1, 0, 0, 0]] * 4  # raters agree, videos differ
    (one,) = preferences(answers(agree), study)
    assert one.share == 0.5 and one.verdict == "unclear"
    assert one.by_videos == pytest.approx(tuple(clustered_wilson(torch.tensor([1.0, 1, 1, 0, 0, 0]), 4)))
    assert one.by_raters == pytest.approx(tuple(clustered_wilson(torch.tensor([0.5] * 4), 6)))
    assert one.interval == one.by_videos != one.by_raters
    (turned,) = preferences(answers([list(row) for row in zip(*agree)]), study)
    assert turned.interval == turned.by_raters == one.by_videos
    (clear,) = preferences(answers([[1.0] * 12] * 12), study)
    assert clear.verdict == "second" and clear.interval is not None and clear.interval[0] > 0.7
    (other,) = preferences(answers([[0.0] * 12] * 12), study)
    assert other.verdict == "first"


def test_the_result_in_words(study: Study) -> None:
    lines = list(told(preferences(answers([[1.0] * 12] * 12), study), study))
    assert lines[0].startswith("Which video do you prefer? secret-new rather than secret-old in 100 % of the answers [")
    assert "144 answers of 12 raters on 12 videos" in lines[0] and lines[1:] == ["secret-new is preferred."]
    assert any("contains 50 %" in line for line in told(preferences(answers([[1.0, 0.0]] * 2), study), study))
    assert any("one rater says nothing" in line for line in told(preferences(answers([[1.0] * 9]), study), study))
    assert any("one rater and one video" in line for line in told(preferences(answers([[1.0]]), study), study))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (("other", "r1", 1, 1, "p"), "answers to another study"),
        (("", "r1", 2, 1, "p"), "question must be a number from 1 to 1"),
        (("", "r1", 1, 7, "p"), "pair must be a number from 1 to 6"),
        (("", "r1", 1, "one", "p"), "pair must be a number"),
        (("", "r1", 1, 1, "left"), "choice must be p, q or same"),
        (("", "", 1, 1, "p"), "choice must be p, q or same, with a rater"),
    ],
)
def test_wrong_answers_are_refused(study: Study, tmp_path: Path, row: tuple[object, ...], says: str) -> None:
    path = write(tmp_path / "a.csv", [(row[0] or study.id, *row[1:])])
    with pytest.raises(DataError, match=says) as refusal:
        read_answers([path], study)
    assert "a.csv, line 2" in str(refusal.value)


def test_two_different_answers_to_one_question_are_refused(study: Study, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{c}.csv", [(study.id, "r1", 1, 1, c)]) for c in ("p", "q")]
    with pytest.raises(DataError, match="twice, and differently"):
        read_answers(files, study)


def test_the_command_makes_a_study_and_reads_its_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [str(films(tmp_path / "old")), str(films(tmp_path / "new", stopped))]
    out = tmp_path / "out"
    words = ["study", *sides, "--output", str(out), "--question", "Which is sharper?", "Which moves more?", "--quiet"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "page/study.html")
    made = load_study(out)
    rows = [(made.id, "r1", q, i + 1, "p" if pair.p == 0 else "q") for q in (1, 2) for i, pair in enumerate(made.pairs)]
    assert main(["study", str(out), "--answers", str(write(tmp_path / "a.csv", rows))]) == 0
    said = capsys.readouterr().out
    assert "Which moves more? new rather than old in 0 % of the answers" in said
