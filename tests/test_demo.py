"""The demo's path, shortened: same recipe, same measurement, same files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep import demo
from fewstep.evaluate import Suite
from fewstep.leaderboard import contestants
from fewstep.leaderboard.budget import DEMO, work
from fewstep.models.bundle import VideoModel
from fewstep.models.source import Pretrained
from fewstep.recipe import Recipe
from fewstep.world.data import WorldClips
from support_engine import FRAMES, tiny_model


@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize("teacher", ["tiny", pytest.param("world", marks=pytest.mark.slow)])
def test_demo_writes_what_it_promises(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the built-in teacher it takes a minute; a leaderboard's run measures that one in test_leaderboard.py."""
    monkeypatch.setattr(demo, "compile_problem", lambda: "compiling takes longer than this test")
    short = replace(demo.RECIPE, settings=replace(demo.RECIPE.settings, steps=1, batch=2), probe=None)
    if teacher == "tiny":
        tiny = tiny_model()
        tiny.card = replace(tiny.card, contract=replace(tiny.card.contract, steps=50))
        folder = tiny.save(tmp_path / "teacher")
        short = replace(short, model=Pretrained(source=str(folder)), data=WorldClips(num_frames=FRAMES))
    suite = Suite(prompts=2, seeds_per_prompt=2, batch=4, latency_runs=1, latency_budget=0.0)
    made = demo.run_demo(tmp_path / "demo", recipe=short, suite=suite, quiet=True)
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [f"teacher {n}" for n in (50, 4, 2, 1)] + [
        f"student {n}" for n in (4, 2, 1)
    ]
    assert [row["nfe"] for row in rows] == [100, 8, 4, 2, 4, 2, 1]
    wanted = {
        "name",
        "steps",
        "nfe",
        "accuracy",
        "accuracy_ci",
        "frechet",
        "frechet_n",
        "motion",
        "diversity",
        "flicker",
    }
    assert all(wanted | {"seconds"} <= row.keys() for row in rows)
    assert made.film.stat().st_size > 1000
    assert "<svg" in made.page.read_text(encoding="utf-8")
    assert VideoModel.from_pretrained(made.student).card.contract.counts == (1, 2, 4)


def test_the_longer_recipe_makes_a_student_like_the_demos() -> None:
    longer = Recipe.load("world/dmd2")
    assert (longer.model, longer.data) == (demo.RECIPE.model, demo.RECIPE.data)
    teacher = demo.RECIPE.model.card().contract
    assert longer.method.contract(teacher) == demo.RECIPE.method.contract(teacher)  # its student is sampled alike
    assert work(longer) > 5 * work(demo.RECIPE)


def test_the_demo_runs_a_row_of_the_leaderboard() -> None:
    """What the run writes besides, and when, is its own; the iterations are those of the budget that all rows have."""
    row, run = contestants()["dmd2+batch_4_one_turn"].prepared(DEMO, seed=0), demo.RECIPE
    assert (run.model, run.method, run.data) == (row.model, row.method, row.data)
    own = {name: getattr(run.settings, name) for name in ("log_every", "save_every")}
    assert run.settings == replace(row.settings, **own)
