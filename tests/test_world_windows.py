"""Windows of long clips: right against their own scene, since when, and the same object or another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.world.checker import Checker
from fewstep.world.grammar import ATTRIBUTES, parse, sample_scenes
from fewstep.world.renderer import Variation
from fewstep.world.scripts import Script, render_script
from fewstep.world.windows import NEVER, Windows, joined, read_windows

RING = parse("a large red ring moves quickly left over a navy background")
TURNED = replace(RING, direction="up")
STAR = replace(RING, shape="star")


def clips(*scripts: Script, frames: int = 64) -> torch.Tensor:
    return render_script(scripts, Variation.sample(len(scripts), torch.Generator().manual_seed(1)), frames)


@pytest.fixture(scope="module")
def windows() -> tuple[list[Script], Windows]:
    scripts = [Script((RING,)), Script((RING, TURNED), (0, 24)), Script((RING, STAR), (0, 32))]
    return scripts, read_windows(clips(*scripts), stride=8)


def test_each_window_is_compared_with_its_own_scene(windows: tuple[list[Script], Windows]) -> None:
    scripts, read = windows
    right = read.right(scripts)
    assert read.first == (0, 8, 16, 24, 32, 40, 48)
    assert right[0].eq(1).all()
    assert right[1].isnan().all(1).tolist() == [False, False, True, False, False, False, False]
    assert right[1][~right[1].isnan()].eq(1).all()
    against = read.right([Script((TURNED,))] * 3)[1].all(1)
    assert against.tolist() == [False] * 3 + [True] * 4
    with pytest.raises(ValueError, match="one script per clip"):
        read.right(scripts[:2])


def test_it_is_right_since_the_frame_of_its_change(windows: tuple[list[Script], Windows]) -> None:
    _, read = windows
    right = read.right([Script((TURNED,))] * 3).all(2)
    assert read.since(right).tolist() == [NEVER, 24, NEVER]
    assert read.since(right, frame=33).tolist() == [NEVER, 40, NEVER]
    assert read.since(read.right([Script((RING,))] * 3).all(2)).tolist() == [0, NEVER, NEVER]
    once = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1] * 7, [0] * 7]).double()
    assert read.since(once).tolist() == [24, 0, NEVER], "a relapse begins the count again"


def test_it_is_the_same_object_until_it_changes_or_jumps(windows: tuple[list[Script], Windows]) -> None:
    _, read = windows
    same = read.same_object()
    assert same[0].all() and same[1].all(), "an object that turns is the same"
    assert same[2].tolist() == [True] * 3 + [False] * 4
    assert read.same_object(since=4)[2].tolist() == [False] * 4 + [True] * 3
    here = clips(Script((RING,)), frames=48)
    jumped = torch.cat([here[:, :, :16], here[:, :, 16:].roll((9, 9), (3, 4))], 2)
    assert read_windows(here).same_object().tolist() == [[True, True, True]]
    assert read_windows(jumped).same_object().tolist() == [[True, False, False]], "alike, but elsewhere"
    gone = here.clone()
    gone[:, :, 20] = here[:, :, 20, :1, :1]
    assert read_windows(gone).same_object().tolist() == [[True, False, False]], "gone for a frame"


def test_reading_in_parts_is_reading_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    long = clips(*(Script((scene,)) for scene in sample_scenes(6, generator)), frames=48)
    whole, checker = read_windows(long), Checker()
    parts = joined([checker.read(part) for part in long.split(16, 2)], 16)
    assert torch.equal(whole.values, parts.values) and torch.equal(whole.unbroken, parts.unbroken)
    assert whole.values.shape == (6, 3, len(ATTRIBUTES))
    assert torch.equal(whole.values[:, 0], checker.read(long[:, :, :16]).values)


@pytest.mark.parametrize(("length", "stride"), [(65, 8), (0, 0), (16, 17)])
def test_windows_that_do_not_fit_are_refused(length: int, stride: int) -> None:
    with pytest.raises(ValueError, match="1 <= stride <= length <= frames"):
        read_windows(clips(Script((RING,))), length, stride)
