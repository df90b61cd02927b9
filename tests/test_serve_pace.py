"""When a viewer needs the next chunk, how many are admitted, and whom the worker serves first."""

from __future__ import annotations

import pytest

from fewstep.serve.orders import Facts
from fewstep.serve.pace import Gate, Pace
from fewstep.serve.viewers import chunks_of

FPS = 8.0


def pace(**changes: object) -> Pace:
    return Pace(**({"fps": FPS, "ahead": 12, "opened": 100.0} | changes))  # type: ignore[arg-type]


def test_a_new_stream_is_due_when_it_was_opened() -> None:
    assert pace().due() == 100.0 and not pace().waits(500.0)


def test_a_stream_is_due_when_its_viewer_runs_out_of_frames() -> None:
    one = pace()
    one.send(4, now=101.0)
    assert one.due() == 101.5
    one.send(4, now=101.2)
    assert one.due() == 102.0


def test_a_viewer_that_stalled_plays_on_from_there() -> None:
    """The half second that it has got lasts from when it came, not from when it was due."""
    one = pace()
    one.send(4, now=101.0)
    one.send(4, now=103.0)
    assert one.due() == 103.5 and one.at(103.25) == 6


def test_a_stream_waits_when_it_is_far_enough_ahead_in_real_time() -> None:
    one = pace()
    for _ in range(3):
        one.send(4, now=101.0)
    assert one.waits(101.0) and one.waits(101.1)
    assert not one.waits(101.13)  # a frame has been played


def test_a_viewer_that_says_what_it_has_played_is_believed() -> None:
    one = pace(acknowledged=True)
    for _ in range(3):
        one.send(4, now=101.0)
    assert one.waits(200.0)
    one.play(4, now=200.0)
    assert one.at(300.0) == 4 and not one.waits(200.0)
    assert one.due() == 201.0  # 8 frames are left: its clock is later than it seemed
    one.play(2, now=200.0)
    assert one.played == 4
    one.play(10**9, now=200.0)
    assert one.played == 12


def test_a_pause_moves_the_clock() -> None:
    one = pace()
    one.send(4, now=101.0)
    one.pause(10.0)
    assert one.due() == 111.5
    pace().pause(3.0)  # before it has begun: nothing to move


def test_streams_are_admitted_up_to_the_share() -> None:
    gate = Gate()
    for _ in range(4):
        assert gate.admits(0.2)
        gate.enter(0.2)
    assert not gate.admits(0.2) and gate.admits(0.05)
    gate.leave(0.2)
    assert gate.admits(0.2)


def test_one_stream_is_always_admitted_and_nothing_is_left_of_rounding() -> None:
    gate = Gate()
    assert gate.admits(7.0)
    gate.enter(7.0)
    assert not gate.admits(0.01)
    gate.leave(7.0)
    for _ in range(10):
        gate.enter(0.1)
    for _ in range(10):
        gate.leave(0.1)
    assert gate.load == 0.0 and gate.streams == 0


@pytest.mark.parametrize(
    ("first", "later", "seconds", "chunks"),
    [(4, 4, 0.1, 1), (4, 4, 0.5, 1), (4, 4, 0.51, 2), (9, 12, 2.625, 2), (9, 12, 2.63, 3)],
)
def test_a_stream_has_at_least_the_length_that_was_asked_for(
    first: int, later: int, seconds: float, chunks: int
) -> None:
    facts = Facts(
        name="a", role="student", fps=FPS, height=8, width=8, frames=8, steps=(4,), guided=False, takes_image=False,
        chunk_frames=(first, later), chunk_seconds=0.25,
    )  # fmt: skip
    assert chunks_of(facts, seconds) == chunks
    assert facts.load == pytest.approx(0.25 * FPS / later)
