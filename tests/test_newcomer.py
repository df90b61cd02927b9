"""What somebody meets who uses fewstep for the first time: claims that are earned, progress, names, helps, previews."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from faults.given import RECIPE
from faults.making import films
from fewstep.cli import main
from fewstep.cli.arguments import COMMANDS
from fewstep.engine import log as logs
from fewstep.engine.log import RunLog
from fewstep.engine.preview import HEAD, labelled
from fewstep.evaluate.page.earned import unearned
from fewstep.evaluate.page.report import _facts, lead
from fewstep.evaluate.results import Gain, Report, Row
from fewstep.models import VideoModel

pytestmark = pytest.mark.usefixtures("single_thread")
ROW = Row(
    name="teacher 32", model="t", role="teacher", steps=32, nfe=64, accuracy=0.9, accuracy_ci=(0.82, 0.95), attributes=None,
    abstained=None, gain=None, frechet=None, frechet_n=64, frechet_shuffled=50.0, motion=1.0, motion_ci=None,
    motion_absolute=0.1, diversity=1.0, diversity_absolute=0.1, flicker=1.0, flicker_absolute=0.1, seconds=21.8,
    seconds_p95=22.0, seconds_runs=3, seconds_decode=0.1, seconds_batched=20.0, flops=None, memory_mb=1.0,
)  # fmt: skip
REPORT = Report(
    rows=(ROW,), reference="teacher 32", truth=None, frechet_reference="real", frechet_features="pooled", frechet_floor=1.0,
    frechet_shuffled=50.0, suite={}, seeds={"clips": 64}, machine={}, versions={}, memory="",
)  # fmt: skip
GAIN = Gain(baseline="teacher 32", accuracy=None, accuracy_ci=None, frechet=None)
NOISE = replace(
    ROW, name="student 8", role="student", steps=8, nfe=8, seconds=1.0, motion=0.99, diversity=0.99, accuracy=0.0,
    accuracy_ci=(0.0, 0.06), gain=replace(GAIN, accuracy=0.0, accuracy_ci=(-0.03, 0.03)), frechet=900.0, frechet_ci=(850, 950),
)  # fmt: skip


def claims(hero: Row, **report: object) -> tuple[list[str], str]:
    """The large figures of the page, and its first sentences."""
    made = replace(REPORT, rows=(*REPORT.rows, hero), **report)  # type: ignore[arg-type]
    return [figure for figure, _ in _facts(made, hero)], lead(made, hero)


# --- a headline is earned ---------------------------------------------------------------------------------------------


def test_noise_is_not_called_fast() -> None:
    figures, said = claims(NOISE)
    assert figures == ["not shown", "0 %"]
    assert "The quality of student 8 has not been shown" in said
    unseen = replace(
        NOISE, accuracy=None, accuracy_ci=None, gain=replace(GAIN, frechet=800.0, frechet_ci=(700.0, 900.0))
    )
    figures, said = claims(unseen)
    assert figures == ["not shown"]
    assert "its Frechet is not below the teacher's at the same steps" in said


def test_a_good_student_is_called_fast() -> None:
    near = replace(NOISE, accuracy=0.92, accuracy_ci=(0.84, 0.96), gain=None)
    figures, said = claims(near)
    assert figures == ["21.8x faster", "92 %", "0.99x", "0.99x"]
    assert "has not been shown" not in said
    better = replace(
        NOISE, accuracy=0.5, accuracy_ci=(0.4, 0.6), gain=replace(GAIN, accuracy=0.4, accuracy_ci=(0.3, 0.5))
    )
    assert claims(better)[0][0] == "21.8x faster"


@pytest.mark.parametrize(
    ("hero", "report", "shown"),
    [
        ({"frechet_ci": (1.1, 1.9)}, {}, True),  # near the noise floor
        ({"frechet_ci": (1.1, 2.1)}, {}, False),
        ({"gain": replace(GAIN, frechet=-5.0, frechet_ci=(-9.0, -1.0))}, {}, True),
        ({"gain": replace(GAIN, frechet=-5.0, frechet_ci=(-9.0, 1.0))}, {}, False),
        ({"frechet_ci": (1.1, 1.9)}, {"frechet_shuffled": 1.9}, False),  # features that do not see time
        (
            {"clip_score": 30.0, "clip_score_ci": (29.0, 31.0)},
            {},
            False,
        ),  # the reference was not scored higher or lower
        (
            {"clip_score": 30.0, "clip_score_ci": (29.0, 31.0), "gain": replace(GAIN, clip_score_ci=(0.5, 2.0))},
            {},
            True,
        ),
        (
            {"clip_score": 30.0, "clip_score_ci": (29.0, 31.0), "gain": replace(GAIN, clip_score_ci=(-0.5, 2.0))},
            {},
            False,
        ),
    ],
)
def test_what_shows_quality_without_a_checker(hero: dict[str, object], report: dict[str, object], shown: bool) -> None:
    plain = replace(ROW, accuracy=None, accuracy_ci=None, clip_score=35.0)
    row = replace(NOISE, **{"accuracy": None, "accuracy_ci": None, "gain": None, **hero})  # type: ignore[arg-type]
    made = replace(REPORT, rows=(plain, row), **report)  # type: ignore[arg-type]
    assert (unearned(made, row) == "") == shown


# --- files that a tutorial counts on ----------------------------------------------------------------------------------


def test_prepare_writes_the_prompts_that_later_commands_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    films(tmp_path)
    Path("videos/b.txt").write_text("film\n  b\n")
    Path("videos/c.mp4").write_bytes(Path("videos/a.mp4").read_bytes())
    Path("videos/c.txt").write_text("film a")
    Path("videos/d.txt").write_text("never seen")
    Path("videos/d.mp4").write_bytes(b"broken")
    assert main(["prepare", "videos", "--model", "teacher", "--output", "out", "--quiet"]) == 0
    assert Path("out/prompts.txt").read_text() == "film a\nfilm b\n"
    assert main(["sample", "teacher", "--prompt-file", "out/prompts.txt", "--output", "a.gif"]) == 0


# --- progress ---------------------------------------------------------------------------------------------------------


def test_a_log_in_a_file_shows_how_far_a_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = " ".join(f"a_long_name_of_a_loss_{i} 0.123" for i in range(8))
    with patch.object(logs, "EVERY", 0.0), RunLog(tmp_path, resume_step=0, total=3, quiet=False) as log:
        for step in (1, 2, 3):
            log.advance(step, note)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("steps: ")]
    assert [line[:13] for line in lines] == ["steps: 1 of 3", "steps: 2 of 3", "steps: 3 of 3", "steps: 3 of 3"]
    assert all(line.endswith(note) for line in lines)  # nothing is cut at 80 columns
    with RunLog(tmp_path, resume_step=0, total=3, quiet=True) as log:
        log.advance(1, note)
    assert capsys.readouterr().err == ""


def test_commands_leave_their_last_line_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.cli.pace import telling

    with telling(False) as tell:
        for done in range(3):
            tell("videos", done, 2, "x" * 200)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("videos: 2 of 2") and line.endswith("x" * 200)


# --- previews ---------------------------------------------------------------------------------------------------------


def test_the_columns_of_a_preview_have_names(tmp_path: Path) -> None:
    plain = Image.new("RGB", (600, 50), "white")
    made = labelled(plain, ["student, 1 step", "teacher, 50 steps"])
    assert made.size == (600, 50 + HEAD)
    dark = (torch.frombuffer(bytearray(made.convert("L").tobytes()), dtype=torch.uint8).view(-1, 600) < 128).nonzero()
    assert dark[:, 0].max() < HEAD
    assert ((dark[:, 1] < 300).any(), (dark[:, 1] > 300).any()) == (True, True)


def test_previews_say_who_is_who(tmp_path: Path) -> None:
    from faults.given import teacher as tiny_teacher
    from fewstep.core import Rng
    from fewstep.engine import preview as previews
    from fewstep.world.data import WorldClips

    model = VideoModel.from_pretrained(tiny_teacher(tmp_path))
    source = WorldClips(num_frames=4).open(model, frozenset({"prompts"}))
    shown = previews.Preview.of(model, source, Rng(0))
    told: list[list[str]] = []
    with patch.object(previews, "labelled", lambda picture, names: told.append(names) or picture):
        shown.draw(model)
        shown.draw(VideoModel(replace(model.card, role="student"), model.parts))
    many = f"{model.card.contract.steps} steps"
    assert told == [[f"now, {many}", f"before training, {many}"], [f"student, {many}", f"teacher, {many}"]]


# --- names and helps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_helps_say_a_default_once(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = " ".join(word for word in capsys.readouterr().out.split() if word != "│")
    for twice in ("(default: None)", "(default: )", "(default: '')", "(default: False)"):
        assert twice not in said
    assert "). (default" not in said


def test_lists_are_not_cut_at_colons() -> None:
    from fewstep.catalogue import _first_sentence

    assert _first_sentence("Two steps: one, and two. More.") == "Two steps: one, and two."


@pytest.mark.parametrize(
    ("theirs", "ours"), [("vae", "codec"), ("transformer", "denoiser"), ("unet", "denoiser"), ("text_encoder", "text")]
)
def test_parts_by_the_names_of_diffusers(
    theirs: str, ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.replace(f"  {ours}: ", f"  {theirs}: "))
    assert main(["explain", str(file)]) == 2
    assert f"did you mean {ours}?" in " ".join(capsys.readouterr().err.split())


def test_an_absent_part_is_called_what_diffusers_calls_it(tmp_path: Path) -> None:
    from faults.given import teacher as tiny_teacher

    model = VideoModel.from_pretrained(tiny_teacher(tmp_path))
    del model.parts["codec"]
    with pytest.raises(
        ValueError, match=r"has no codec \(vae in diffusers\), only denoiser \(transformer or unet in diffusers\)"
    ):
        model.part("codec")


def test_a_closed_standard_output_is_no_traceback() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    class Gone(Full):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        flush = write  # type: ignore[assignment]

    for out, says in (
        (Full(), "standard output: No space left on device"),
        (Gone(), "the program that reads standard output"),
    ):
        err = io.StringIO()
        with patch("sys.stdout", out), patch("sys.stderr", err):
            assert main(["--version"]) == 2
        assert err.getvalue().startswith("fewstep: ") and says in err.getvalue() and err.getvalue().count("\n") == 1
