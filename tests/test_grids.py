"""What every time grid promises; contracts and streams; contracts of the first version."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fewstep.catalogue import entries
from fewstep.core import RecipeError, build, dump
from fewstep.diffusion import (
    CFG,
    DDIM,
    GRIDS,
    SAMPLERS,
    Angles,
    Contract,
    DPMpp2M,
    Euler,
    Exact,
    FlowSchedule,
    FromVideo,
    Heun,
    LinearQuadratic,
    Renoise,
    Sampler,
    Shifted,
    StepCountError,
    Stream,
    TimeGrid,
    Timesteps,
)
from fewstep.models.bundle import read_card
from support_engine import tiny_model

NAMES = {cls.__name__: cls for cls in (*SAMPLERS, *GRIDS)}
EXACT = Exact(grids=((1.0, 0.0), (1.0, 0.6, 0.0)), otherwise=Shifted(shift=3.0))
EVERY: list[TimeGrid] = [*(cls() for cls in GRIDS), EXACT, Shifted(shift=5.0, terminal=0.1)]
every = pytest.mark.parametrize("grid", EVERY, ids=lambda g: type(g).__name__)


def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers")


def read(tree: dict[str, Any]) -> Contract:
    contract: Contract = build(Contract, tree, NAMES, "card.json")
    return contract


# --- every grid -------------------------------------------------------------------------------------------------------


@every
def test_times_decrease_from_noise_to_data(grid: TimeGrid) -> None:
    for steps in grid.counts or (1, 2, 4, 25):
        times = grid.times(steps)
        assert len(times) == steps + 1 and times[-1] == 0
        assert times[0] == {Angles: 80 / 81, FlowSchedule: 1 - 1e-6, FromVideo: 0.4}.get(type(grid), 1)
        assert all(a > b for a, b in zip(times, times[1:]))


@every
def test_it_takes_any_count_or_those_it_names(grid: TimeGrid) -> None:
    contract = Contract(grid=grid, steps=(grid.counts or (7,))[-1])
    assert contract.counts == (grid.counts or (7,)) and set(contract.trained) == set(grid.counts)
    if grid.counts:
        with pytest.raises(StepCountError, match="and was asked for 9"):
            contract.times(9)
    assert contract.times(9, force=True) == grid.free.times(9) and not grid.free.counts
    for steps, times in contract.trained.items():
        assert contract.times(steps, force=True) == times  # a trained count keeps its own times


@every
def test_it_travels_in_a_card(grid: TimeGrid) -> None:
    contract = Contract(grid=grid, steps=(grid.counts or (7,))[-1])
    assert read(json.loads(json.dumps(dump(contract)))) == contract
    assert hash(read(dump(contract))) == hash(contract)


@every
def test_it_is_listed(grid: TimeGrid) -> None:
    (entry,) = [entry for entry in entries("grids") if entry.name == type(grid).__name__]
    assert entry.doc


@every
def test_export_visits_its_times_or_says_that_it_cannot(grid: TimeGrid) -> None:
    diffusers()
    from fewstep.diffusion import RectifiedFlow
    from fewstep.models.adapters.export.schedulers import exact_scheduler

    steps = (grid.counts or (4,))[-1]
    if grid.times(steps)[0] != 1:  # diffusers' pipelines begin with pure noise
        with pytest.raises(ValueError, match="no scheduler that does what"):
            exact_scheduler(RectifiedFlow(), "flow", Contract(grid=grid, steps=steps), steps)
        return
    scheduler: Any = exact_scheduler(RectifiedFlow(), "flow", Contract(grid=grid, steps=steps), steps).pin()
    scheduler.set_timesteps(steps)
    assert scheduler.sigmas.tolist() == pytest.approx(grid.times(steps), abs=1e-6)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_angles_are_those_of_rcm() -> None:
    """By hand: sigma 80 is t = 80 / 81; an angle a is t = tan a / (1 + tan a)."""
    tan = 14.101419947, 5.797883715, 1.557407725  # of 1.5, 1.4 and 1.0
    assert Angles().times(4) == pytest.approx((80 / 81, *(x / (1 + x) for x in tan), 0.0), abs=1e-9)
    assert Angles().times(1) == (pytest.approx(80 / 81), 0.0)
    assert Angles().times(2)[1] == pytest.approx(tan[0] / (1 + tan[0]), abs=1e-9)
    with pytest.raises(ValueError, match="angles decrease"):
        Angles(sigma_max=1.0)


@pytest.mark.parametrize("steps", [1, 4, 25, 50])
@pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)], ids=lambda v: str(v)
)
def test_grids_of_timesteps_are_those_of_diffusers(spacing: str, offset: int, steps: int) -> None:
    scheduler = diffusers().DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    for clean in (True, False):
        grid = Timesteps(spacing=spacing, steps_offset=offset, ends_clean=clean).times(steps)  # type: ignore[arg-type]
        assert [round(1000 * t) - 1 for t in grid[:-1]] == scheduler.timesteps.tolist()
        assert grid[-1] == (0.0 if clean else 0.001)


def test_a_contract_follows_its_timesteps() -> None:
    contract = Contract(steps=25, grid=Timesteps(spacing="leading", steps_offset=1))
    assert contract.times()[:2] == (0.962, 0.922) and contract.times(2) == (0.502, 0.002, 0.0)
    with pytest.raises(ValueError, match="1 to 1000 steps"):
        contract.times(1001)
    with pytest.raises(ValueError, match="beyond timestep 999"):
        contract.times(1000)


def test_the_terminal_time_is_the_last_before_0() -> None:
    assert Shifted(shift=3.0, terminal=0.1).times(4)[-2:] == (pytest.approx(0.1), 0.0)
    assert Shifted(terminal=0.1).times(1) == (1.0, 0.0)


def test_a_student_refuses_untrained_step_counts() -> None:
    contract = Contract(steps=2, grid=Exact(grids=((1.0, 0.6, 0.0),), otherwise=Shifted(shift=3.0)))
    assert contract.times() == (1.0, 0.6, 0.0)
    with pytest.raises(StepCountError, match="trained for 2 steps and was asked for 3"):
        contract.times(3)
    assert contract.times(3, force=True) == Shifted(shift=3.0).times(3)


REFUSED = [
    (lambda: Exact(grids=()), "at least one"),
    (lambda: Exact(grids=((1.0, 0.5, 0.0), (1.0, 0.4, 0.0))), "one grid per step count"),
    (lambda: Exact(grids=((0.9, 0.0),)), r"from 1\.0 to 0\.0"),
    (lambda: Shifted(shift=0.0), "shift > 0"),
    (lambda: Shifted(terminal=1.0), "terminal < 1"),
    (lambda: LinearQuadratic(threshold=1.5), "between 0 and 1"),
    (lambda: Contract(steps=0), "at least 1 step"),
    (lambda: Stream(chunks=()), "at least 1 latent frame"),
    (lambda: Stream(chunks=(1, 0)), "at least 1 latent frame"),
    (lambda: Stream(window=-1), "cannot be negative"),
    (lambda: Stream(sink=1), "has no sink"),
    (lambda: Stream(positions="window"), "no positions in a window"),
    (lambda: Stream(chunks=(3,), window=5, sink=3), "cannot hold a sink of 3 and a chunk of 3"),
    (lambda: Stream(commit="noised"), "context_time"),
    (lambda: Stream(commit="last", context_time=0.1), "context_time"),
    (lambda: Stream(chunks=(3,)).lengths(7), "clips of 6 or 9, not 7"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_a_stream_travels_and_knows_its_chunks() -> None:
    stream = Stream(chunks=(1, 3), window=12, sink=3, commit="noised", context_time=0.02, positions="window")
    assert read(json.loads(json.dumps(dump(Contract(stream=stream))))).stream == stream
    assert stream.lengths(7) == (1, 3, 3) and Stream(chunks=(2,)).lengths(4) == (2, 2) and stream.lengths(1) == (1,)
    with pytest.raises(ValueError, match=r"chunks of \[1, 3\] latent frames make clips of 4 or 7, not 6"):
        stream.lengths(6)


# --- the first version ------------------------------------------------------------------------------------------------

TEACHER = """{"solver": "euler", "steps": 50, "shift": 3.0, "grids": {},
              "guidance": {"scale": 2.5, "low": 0.0, "high": 1.0}}"""
"""As the world's teacher was shipped."""
STUDENT = """{"solver": "renoise", "steps": 4, "shift": 5.0, "terminal": 0.0, "threshold": 0.0, "timesteps": null,
              "grids": {"4": [1.0, 0.9375, 0.8333333333333334, 0.625, 0.0], "1": [1.0, 0.0]},
              "guidance": {"scale": 1.0, "low": 0.0, "high": 1.0, "outside": 1.0}}"""
LTX = """{"solver": "euler", "steps": 50, "shift": 2.5, "terminal": 0.1, "grids": {}, "guidance": {"scale": 3.0}}"""
LTX_CONDITION = '{"solver": "euler", "steps": 50, "shift": 1.0, "terminal": 0.0, "threshold": 0.025, "grids": {}}'
UNET = """{"solver": "ddim", "steps": 25, "shift": 1.0, "terminal": 0.0, "threshold": 0.0, "grids": {},
           "timesteps": {"spacing": "leading", "num_train_timesteps": 1000, "steps_offset": 1, "ends_clean": false}}"""
FOUR = (1.0, 0.9375, 0.8333333333333334, 0.625, 0.0)
FIRST = {
    TEACHER: Contract(grid=Shifted(shift=3.0), guidance=CFG(scale=2.5)),
    STUDENT: Contract(
        grid=Exact(grids=((1.0, 0.0), FOUR), otherwise=Shifted(shift=5.0)), sampler=Renoise(), steps=4
    ),
    LTX: Contract(grid=Shifted(shift=2.5, terminal=0.1), guidance=CFG(scale=3.0)),
    LTX_CONDITION: Contract(grid=LinearQuadratic(threshold=0.025)),
    UNET: Contract(
        grid=Timesteps(spacing="leading", steps_offset=1, ends_clean=False), sampler=DDIM(), steps=25
    ),
    '{"solver": "dpmpp_2m"}': Contract(sampler=DPMpp2M()),
    '{"solver": "heun", "steps": 8}': Contract(sampler=Heun(), steps=8),
    "{}": Contract(),
}  # fmt: skip


@pytest.mark.parametrize(("text", "contract"), FIRST.items(), ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_contracts_of_the_first_version_are_read(text: str, contract: Contract) -> None:
    assert read(json.loads(text)) == contract


def test_a_folder_of_the_first_version_is_read(tmp_path: Path) -> None:
    folder = tiny_model().save(tmp_path)
    tree = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(tree | {"contract": json.loads(STUDENT)}))
    assert read_card(folder).contract == FIRST[STUDENT]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"solver": "eular"}, r"contract\.solver\.eular is unknown; did you mean euler|solver.* did you mean euler"),
        ({"shift": "wide"}, r"shift must be a number"),
        ({"grids": {"2": [1.0, 0.0]}}, "the grid of 2 steps needs"),
        ({"grids": {"2": [1.0, 0.4, 0.5, 0.0]}}, "the grid of 2 steps needs"),
        ({"shift": -1.0}, "shift > 0"),
        ({"shifft": 3.0}, "shifft is unknown"),
        (
            {"solver": "heun", "sampler": {"type": "Heun"}},
            r"solver is a key of the first version .* change sampler instead",
        ),
        ({"shift": 3.0, "grid": {"type": "Shifted"}}, r"shift is a key of the first version .* change grid instead"),
        ([1], "must be keys"),
    ],
)
def test_what_the_first_version_would_not_have_taken_is_refused(tree: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read(tree)


@pytest.mark.parametrize("sampler", [Euler(), Heun()], ids=["euler", "heun"])
def test_people_may_go_on_typing_short_names(sampler: Sampler) -> None:
    assert read({"solver": type(sampler).__name__.lower(), "steps": 32, "guidance": {"scale": 2.0}}) == Contract(
        sampler=sampler, steps=32, guidance=CFG(scale=2.0)
    )
