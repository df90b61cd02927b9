"""The result of a run is in a folder named after what was trained, and a missing one says how to make it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.cli.watch import ended
from fewstep.core.shipped import command_for
from fewstep.engine import train
from fewstep.engine.result import result_of
from fewstep.methods import METHODS, Consistency, FlowMatching, Method, ReadAttributes, Reconstruction
from fewstep.models.bundle import read_card
from fewstep.models.results import RESULTS, result_in
from support_engine import CASES, Everything, small, tiny_model


def run(method: Method, output: Path) -> list[str]:
    """The folders with a card that a short run leaves."""
    train(tiny_model(), method, Everything(), small(2), output, quiet=True)
    return [path.parent.name for path in output.glob("*/card.json")]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (CASES["Consistency"], "student"),
        (FlowMatching(), "teacher"),
        (Reconstruction(), "codec"),
        (ReadAttributes(of="text"), "text"),
    ],
)
def test_the_folder_says_what_was_trained(method: Method, name: str, tmp_path: Path) -> None:
    assert result_in(tmp_path) is None and not ended(tmp_path)
    assert run(method, tmp_path) == [name]
    assert result_in(tmp_path) == tmp_path / name and ended(tmp_path)
    if method.part == "denoiser":
        assert read_card(tmp_path / name).role == name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_known_result(method: type[Method]) -> None:
    assert result_of(method(), tiny_model().card) in RESULTS


def test_a_student_that_is_trained_on_stays_one(tmp_path: Path) -> None:
    card = replace(tiny_model().card, role="student")
    assert result_of(FlowMatching(), card) == "student" == result_of(Consistency(), card)


def test_a_run_of_the_first_version_is_still_found(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "student")
    assert result_in(tmp_path) == tmp_path / "student"


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("runs/videos/teacher/teacher", "fewstep train videos/teacher --output runs/videos/teacher"),
        (
            "/data/runs/world/style_lora/teacher/adapter",
            "fewstep train world/style_lora --output /data/runs/world/style_lora",
        ),
        ("runs/videos/teachers/teacher", None),
        ("videos/teacher/teacher", None),
        ("mine", None),
    ],
)
def test_the_command_for_a_missing_result(folder: str, command: str | None) -> None:
    assert command_for(folder) == command


def test_a_missing_result_names_the_command_or_the_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["distill", "videos/dmd2", "--output", "run"]) == 2
    said = capsys.readouterr().err
    assert "Make it first: fewstep train videos/teacher --output runs/videos/teacher." in said
    tiny_model().save("runs/videos/teacher/student")  # as version 0.1.0 called it
    assert main(["distill", "videos/dmd2", "--output", "run"]) == 2
    assert "Give runs/videos/teacher/student." in capsys.readouterr().err
    assert main(["sample", "runs/videos/teacher", "--prompt", "a"]) == 2
    assert "Give runs/videos/teacher/student." in capsys.readouterr().err
    assert not Path("run").exists()
